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

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megatron_replay.errors import DataError
from megatron_replay.files import open_regular, read_json

CORPUS_VERSION = 2
MASK_HEADER = struct.Struct("<8sQQ")  # magic, version, number of tokens
MASK_MAGIC = b"MRLOSSMK"
# megatron/core/datasets/indexed_dataset.py, _IndexWriter: magic, version, type code (4 = int32),
# number of sequences, number of document boundaries.
_IDX_HEADER = struct.Struct("<9sQBQQ")
_IDX_START = (b"MMIDIDX\0\0", 1, 4)
_LENGTHS_AT_ONCE = 1 << 20  # so that a false count costs no memory
MAX_INT32 = np.iinfo(np.int32).max


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
            loss_mask = self.loss_mask[start : start + max_tokens].copy()
            loss_mask[0] &= start == 0
            pieces.append(Document(self.tokens[start : start + max_tokens], loss_mask))
        return pieces


def pick_documents(lengths: npt.NDArray[np.int32], number: int) -> npt.NDArray[np.int64]:
    """Up to ``number`` documents that have a position, evenly spaced: the same in every run."""
    usable = np.flatnonzero(lengths > 1)
    number = min(number, len(usable))
    picks = np.unique(np.linspace(0, len(usable) - 1, number).round().astype(np.int64))
    found: npt.NDArray[np.int64] = usable[picks]
    return found


@dataclass(frozen=True, kw_only=True)
class CorpusDescription:
    """The content of PREFIX.json.

    Attributes:
        num_loss_tokens: labels that carry loss, over all documents.
        max_token_id: the largest token that occurs.
        tokenizer_files: SHA-256 by name of each file that decided the ids.
        source: what it was made from; an equal ``source`` means that the corpus can be reused.
        fingerprint: SHA-256 of the three SHA-256 digests of tokens, loss mask and lengths.
    """

    version: int
    num_documents: int
    num_tokens: int
    num_loss_tokens: int
    vocab_size: int
    max_token_id: int
    tokenizer_path: str
    tokenizer_fingerprint: str
    tokenizer_files: dict[str, str]
    eos_id: int
    pad_id: int
    format: str
    source: dict[str, Any]
    fingerprint: str


class Corpus:
    """A frozen corpus, memory-mapped: ``corpus[i]`` is document i.

    Opening reads PREFIX.json, the index and the numbers after the masks; a document is checked
    when it is first read; ``verify`` reads everything. May be used by several threads, and be sent
    to another process, which opens it again.

    Attributes:
        description: what PREFIX.json holds.
        fingerprint: SHA-256 of the content; stores made from this corpus carry it.
        tokenizer_fingerprint: SHA-256 of the files of the tokenizer that made it.
        vocab_size: all tokens are in [0, vocab_size).
        pad_id: the token at empty positions of a batch.
        lengths: int32 [D], tokens of each document.
        first_labels: int32 [D], the first token, from 1 on, that carries loss; a document's length
            where none does.

    Raises:
        DataError: a file is missing, damaged, or not as long as PREFIX.json records.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self.description = about = _read_description(corpus_file(prefix, "json"))
        self.fingerprint = about.fingerprint
        self.tokenizer_fingerprint = about.tokenizer_fingerprint
        self.vocab_size, self.pad_id = about.vocab_size, about.pad_id
        trailer = 8 * about.num_documents + 4
        with (
            self._open("idx", _IDX_HEADER.size + 20 * about.num_documents + 8) as idx,
            self._open("bin", 4 * about.num_tokens) as tokens,
            self._open("loss_mask", MASK_HEADER.size + about.num_tokens + trailer) as loss_mask,
        ):
            self.lengths = self._read_lengths(idx)
            self._starts = np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64)))
            self._crcs, self.first_labels = self._read_trailer(loss_mask)
            # An ndarray over the mapping: indexing a memmap itself costs microseconds a time.
            self._tokens = np.asarray(np.memmap(tokens, dtype="<i4", mode="r"))
            mapped = np.asarray(np.memmap(loss_mask, dtype=np.uint8, mode="r"))
        self._loss_mask = mapped[MASK_HEADER.size : MASK_HEADER.size + about.num_tokens]
        self._is_checked = np.zeros(about.num_documents, np.bool_)

    def __reduce__(self) -> tuple[type[Corpus], tuple[str]]:
        return Corpus, (os.path.abspath(self.prefix),)

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
        tokens, loss_mask = hashlib.sha256(), hashlib.sha256()
        for start in range(0, len(self._tokens), 1 << 22):  # 16 MiB of tokens at a time
            tokens.update(self._tokens[start : start + (1 << 22)].data)
            loss_mask.update(self._loss_mask[start : start + (1 << 22)].data)
        found = content_fingerprint(tokens.digest(), loss_mask.digest(), self.lengths)
        if found != self.fingerprint:
            raise _damaged(
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
            raise _damaged(
                f"document {document}, position {position}: token {tokens[position]} is outside "
                "the vocabulary",
                corpus_file(self.prefix, "bin"),
                expected=f"0 to {self.vocab_size - 1}",
            )
        if document_crc(tokens, loss_mask) != self._crcs[document]:
            raise _damaged(
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
            raise _damaged(str(error), None) from error
        found = os.fstat(handle.fileno()).st_size
        if found != expected:
            handle.close()
            what = "truncated" if found < expected else "longer than its corpus"
            raise _damaged(what, path, expected=f"{expected} bytes", found=f"{found} bytes")
        return handle

    def _read_lengths(self, idx: IO[bytes]) -> npt.NDArray[np.int32]:
        """The lengths, int32 [D]; the rest of the index, which follows from them, is compared.

        A sparse file that claims a terabyte fails at its first lengths.
        """

        def require(is_right: bool) -> None:
            if not is_right:
                raise _damaged("the index is damaged", corpus_file(self.prefix, "idx"))

        num_documents, pieces = self.description.num_documents, []
        idx.seek(_IDX_HEADER.size)
        for start in range(0, num_documents, _LENGTHS_AT_ONCE):
            count = min(_LENGTHS_AT_ONCE, num_documents - start)
            pieces.append(np.frombuffer(idx.read(4 * count), "<i4"))
            require(pieces[-1].min() >= 2)
        lengths_D = np.concatenate(pieces).astype(np.int32)
        require(lengths_D.sum(dtype=np.int64) == self.description.num_tokens)
        idx.seek(0)
        for part in index_parts(lengths_D):
            require(idx.read(len(part)) == part)
        return lengths_D

    def _read_trailer(
        self, loss_mask: IO[bytes]
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int32]]:
        """crc32 and first label of each document, from behind the masks."""
        path, about = corpus_file(self.prefix, "loss_mask"), self.description
        header = loss_mask.read(MASK_HEADER.size)
        found, expected = MASK_HEADER.unpack(header), (MASK_MAGIC, CORPUS_VERSION, about.num_tokens)
        if found != expected:
            raise _damaged("the header is damaged", path, expected=expected, found=found)
        loss_mask.seek(about.num_tokens, os.SEEK_CUR)
        trailer = loss_mask.read(8 * about.num_documents)
        if loss_mask.read() != zlib.crc32(header + trailer).to_bytes(4, "little"):
            raise _damaged("damaged: the crc32 of its checksums and first labels differs", path)
        crcs, first_labels = np.split(np.frombuffer(trailer, "<u4"), 2)
        return crcs.astype(np.uint32), first_labels.view("<i4").astype(np.int32)


def corpus_file(prefix: str | os.PathLike[str], suffix: str) -> Path:
    """``PREFIX`` + ``.suffix``; a dot in the prefix stays."""
    return Path(f"{os.fspath(prefix)}.{suffix}")


def checksum(description: Mapping[str, Any]) -> str:
    """SHA-256 of everything in PREFIX.json but its ``checksum``."""
    content = {name: value for name, value in description.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def document_crc(tokens: npt.NDArray[np.int32], loss_mask: npt.NDArray[np.uint8]) -> int:
    """crc32 of a document: its tokens as they are stored, then its mask."""
    return zlib.crc32(loss_mask.data, zlib.crc32(tokens.data))


def content_fingerprint(tokens: bytes, loss_mask: bytes, lengths_D: npt.NDArray[np.int32]) -> str:
    """A corpus's fingerprint, from the SHA-256 digests of all its tokens and all its masks."""
    lengths = hashlib.sha256(lengths_D.astype("<i4").tobytes()).digest()
    return hashlib.sha256(tokens + loss_mask + lengths).hexdigest()


def index_parts(lengths_D: npt.NDArray[np.int32]) -> tuple[bytes, bytes, bytes, bytes]:
    """PREFIX.idx: header, lengths, the byte where each document begins, and document numbers."""
    num_documents = len(lengths_D)
    starts_D = np.cumsum(lengths_D, dtype=np.int64) - lengths_D
    return (
        _IDX_HEADER.pack(*_IDX_START, num_documents, num_documents + 1),
        lengths_D.astype("<i4").tobytes(),
        (4 * starts_D).astype("<i8").tobytes(),
        np.arange(num_documents + 1, dtype="<i8").tobytes(),
    )


def _damaged(what: str, where: object, **facts: Any) -> DataError:
    """The error of a damaged corpus, which the user can only write again."""
    fix = "Write the corpus again with tools/preprocess_data.py"
    return DataError(what, where=where, fix=fix, **facts)


def _read_description(path: Path) -> CorpusDescription:
    try:
        content = read_json(path, DataError)
    except DataError as error:
        if isinstance(error.__cause__, OSError):
            fix = "Give the PREFIX of a finished tools/preprocess_data.py, without .bin or .json"
            raise DataError(str(error), fix=fix) from error
        raise _damaged(str(error), None) from error
    version = content.get("version")
    if version != CORPUS_VERSION:
        what = "an older corpus, without checksums" if version == 1 else "unknown corpus version"
        raise _damaged(what, path, expected=CORPUS_VERSION, found=version)
    if content.pop("checksum", None) != checksum(content):
        raise _damaged("damaged: its own checksum differs", path)
    values: dict[str, Any] = {}
    for field in fields(CorpusDescription):
        value = values[field.name] = content.get(field.name)
        kind = str(field.type)  # such as "dict[str, str]"
        if type(value).__name__ != kind.partition("[")[0]:
            raise _damaged(f"{field.name!r} is damaged", path, expected=kind, found=repr(value))
    about = CorpusDescription(**values)
    if not (
        1 <= about.num_documents <= MAX_INT32
        and 2 * about.num_documents <= about.num_tokens <= MAX_INT32 * about.num_documents
        and 0 <= about.num_loss_tokens < about.num_tokens
        and 0 <= about.max_token_id < about.vocab_size <= MAX_INT32
    ):
        raise _damaged("the counts are damaged", path)
    return about
