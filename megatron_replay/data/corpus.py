"""The frozen corpus: four files under one prefix, written once and then only read.

=====================  =========================================================================
``PREFIX.bin``         tokens, int32, documents one after another (Megatron IndexedDataset)
``PREFIX.idx``         lengths and byte offsets (Megatron IndexedDataset, version 1)
``PREFIX.loss_mask``   header ``<8sQQ`` (magic, version, number of tokens), uint8 per token; then
                       uint32 per document, the crc32 of its token bytes and mask bytes; int32 per
                       document, its first label; uint32, the crc32 of the header and these two
``PREFIX.json``        counts, tokenizer and fingerprints, and a checksum of these; written last,
                       so it vouches for the rest
=====================  =========================================================================

A document's first label is its first token, from 1 on, that carries loss; where none does, its
length. All numbers are little-endian. The pair .bin/.idx can be opened by
``megatron.core.datasets.indexed_dataset.IndexedDataset``; neither reading nor writing needs it.
``corpus_writer.py`` writes all four. The address space of everything later is (document, position).
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megatron_replay.data.corpus_format import (
    CORPUS_VERSION,
    IDX_HEADER,
    MASK_HEADER,
    MASK_MAGIC,
    TOKEN_BYTES,
    ContentFingerprint,
    corpus_error,
    corpus_file,
    document_crc,
    read_description,
    read_lengths,
)
from megatron_replay.errors import DataError
from megatron_replay.files import open_regular


@dataclass(frozen=True, eq=False)
class Document:
    """One sequence of tokens that is packed, scored and recorded as a unit.

    The label convention of the whole project: *position* ``t`` is the input position whose logits
    predict token ``t + 1``. A document of n tokens therefore has n - 1 positions.

    Attributes:
        tokens: int32 [n].
        loss_mask: bool [n]; ``loss_mask[i]``: whether token i carries loss as a label.
            ``loss_mask[0]`` has no effect, because nothing predicts the first token.
    """

    tokens: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.tokens)

    def eligible_positions(self) -> npt.NDArray[np.int32]:
        """Positions whose label carries loss: ``{t : loss_mask[t + 1]}``, int32, ascending."""
        return np.flatnonzero(self.loss_mask[1:]).astype(np.int32)

    def split(self, max_tokens: int) -> list[Document]:
        """Cut into pieces of at most ``max_tokens`` tokens that keep every label exactly once.

        A piece starts with the last token of the piece before: there it was a label, here it is
        the input that predicts the next one, and its own loss is not counted again.
        """
        if len(self) <= max_tokens:
            return [self]
        pieces = []
        for start in range(0, len(self) - 1, max_tokens - 1):
            stop = start + max_tokens
            loss_mask = self.loss_mask[start:stop].copy()
            loss_mask[0] &= start == 0
            pieces.append(Document(self.tokens[start:stop], loss_mask))
        return pieces


def pick_documents(lengths: npt.NDArray[np.int32], number: int) -> npt.NDArray[np.int64]:
    """Up to ``number`` documents that have a position, evenly spaced: the same in every run."""
    usable = np.flatnonzero(lengths > 1)
    number = min(number, len(usable))
    picks = np.unique(np.linspace(0, len(usable) - 1, number).round().astype(np.int64))
    return usable[picks]


class Corpus:
    """A frozen corpus, memory-mapped: ``corpus[i]`` is document i.

    Opening reads PREFIX.json, the index and the numbers behind the masks; a document is checked
    when it is first read; ``verify`` reads everything. May be used by several threads, and be sent
    to another process, which opens it again.

    Attributes:
        description: what PREFIX.json holds.
        lengths: int32 [D], tokens of each document.
        first_labels: int32 [D], the first token, from 1 on, that carries loss; a document's length
            where none does.

    Raises:
        DataError: a file is missing, damaged, or not as long as PREFIX.json records.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self.description = read_description(corpus_file(prefix, "json"))
        about, trailer = self.description, 8 * self.description.num_documents + 4
        with (
            self._open("idx", IDX_HEADER.size + 20 * about.num_documents + 8) as idx,
            self._open("bin", TOKEN_BYTES * about.num_tokens) as tokens,
            self._open("loss_mask", MASK_HEADER.size + about.num_tokens + trailer) as loss_mask,
        ):
            self.lengths = read_lengths(idx, about, corpus_file(prefix, "idx"))
            self._starts = np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64)))
            self._crcs, self.first_labels = self._read_trailer(loss_mask)
            # An ndarray over the mapping: indexing a memmap itself costs microseconds a time.
            self._tokens = np.asarray(np.memmap(tokens, dtype="<i4", mode="r"))
            mapped = np.asarray(np.memmap(loss_mask, dtype=np.uint8, mode="r"))
        self._loss_mask = mapped[MASK_HEADER.size : MASK_HEADER.size + about.num_tokens]
        self._is_checked = np.zeros(about.num_documents, np.bool_)

    def __reduce__(self) -> tuple[type[Corpus], tuple[str]]:
        return Corpus, (os.path.abspath(self.prefix),)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content; stores made from this corpus carry it."""
        return self.description.fingerprint

    @property
    def tokenizer_fingerprint(self) -> str:
        """SHA-256 of the files of the tokenizer that made it."""
        return self.description.tokenizer_fingerprint

    @property
    def vocab_size(self) -> int:
        """All tokens are in [0, vocab_size)."""
        return self.description.vocab_size

    @property
    def pad_id(self) -> int:
        """The token at empty positions of a batch."""
        return self.description.pad_id

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, document: int) -> Document:
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        if not self._is_checked[document]:
            self._check(document)
        start, stop = self._starts[document], self._starts[document + 1]
        return Document(
            np.asarray(self._tokens[start:stop], dtype=np.int32),
            np.asarray(self._loss_mask[start:stop]) != 0,
        )

    def labels(
        self,
        documents_D: npt.NDArray[np.integer[Any]],
        counts_D: npt.NDArray[np.integer[Any]],
        positions_P: npt.NDArray[np.integer[Any]],
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Labels of positions, ``counts_D[d]`` of each document in turn; and which carry loss.

        Every position must be below its document's length less one.

        Raises:
            DataError: a document is damaged.
        """
        for document in documents_D[~self._is_checked[documents_D]].tolist():
            self._check(document)
        at_P = np.repeat(self._starts[documents_D], counts_D) + positions_P + 1
        return self._tokens[at_P], self._loss_mask[at_P] != 0

    def verify(self) -> None:
        """Read every byte and compare with the fingerprint.

        Raises:
            DataError: the content is not what was written.
        """
        fingerprint = ContentFingerprint()
        for start in range(0, len(self._tokens), 1 << 22):  # 16 MiB of tokens at a time
            fingerprint.tokens.update(self._tokens[start : start + (1 << 22)].data)
            fingerprint.loss_mask.update(self._loss_mask[start : start + (1 << 22)].data)
        found = fingerprint.hexdigest(self.lengths)
        if found != self.fingerprint:
            raise corpus_error(
                "the corpus is damaged: its content has another fingerprint",
                self.prefix,
                expected=self.fingerprint,
                found=found,
            )

    def _check(self, document: int) -> None:
        """Raise DataError unless a document is as it was written, its tokens in the vocabulary."""
        start, stop = self._starts[document], self._starts[document + 1]
        tokens, loss_mask = self._tokens[start:stop], self._loss_mask[start:stop]
        if tokens.view(np.uint32).max() >= self.vocab_size:  # a negative one is large as well
            position = int(np.argmax((tokens < 0) | (tokens >= self.vocab_size)))
            raise corpus_error(
                f"document {document}, position {position}: token {tokens[position]} is outside "
                "the vocabulary",
                corpus_file(self.prefix, "bin"),
                expected=f"0 to {self.vocab_size - 1}",
            )
        if document_crc(tokens, loss_mask) != self._crcs[document]:
            raise corpus_error(
                f"document {document} is damaged: the crc32 of its tokens and loss mask differs",
                self.prefix,
            )
        self._is_checked[document] = True

    def _open(self, suffix: str, expected: int) -> IO[bytes]:
        """A file of the corpus, checked to be regular and ``expected`` bytes long."""
        path = corpus_file(self.prefix, suffix)
        try:
            handle = open_regular(path, DataError)
        except DataError as error:
            raise corpus_error(str(error), None) from error
        found = os.fstat(handle.fileno()).st_size
        if found != expected:
            handle.close()
            what = "truncated" if found < expected else "longer than its corpus"
            raise corpus_error(what, path, expected=f"{expected} bytes", found=f"{found} bytes")
        return handle

    def _read_trailer(
        self, handle: IO[bytes]
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int32]]:
        """crc32 and first label of each document, from behind the masks."""
        path, about = corpus_file(self.prefix, "loss_mask"), self.description
        header = handle.read(MASK_HEADER.size)
        found, expected = MASK_HEADER.unpack(header), (MASK_MAGIC, CORPUS_VERSION, about.num_tokens)
        if found != expected:
            raise corpus_error("the header is damaged", path, expected=expected, found=found)
        handle.seek(about.num_tokens, os.SEEK_CUR)
        trailer = handle.read(8 * about.num_documents)
        if handle.read() != zlib.crc32(header + trailer).to_bytes(4, "little"):
            raise corpus_error("damaged: the crc32 of its checksums and first labels differs", path)
        crcs = np.frombuffer(trailer, "<u4", about.num_documents).astype(np.uint32)
        first_labels = np.frombuffer(trailer, "<i4", offset=4 * about.num_documents)
        return crcs, first_labels.astype(np.int32)
