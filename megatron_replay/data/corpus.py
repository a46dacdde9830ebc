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
length. What is read is checked: PREFIX.json, the index and the numbers behind the masks when the
corpus is opened, a document when it is first read.

All numbers are little-endian. The pair .bin/.idx can be opened by
``megatron.core.datasets.indexed_dataset.IndexedDataset``; neither reading nor writing needs it.
``corpus_writer.py`` writes all four.
The address space of everything later is (document, position).
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

from megatron_replay.data.document import Document
from megatron_replay.errors import DataError
from megatron_replay.files import open_regular, read_json

CORPUS_VERSION = 2
MASK_HEADER = struct.Struct("<8sQQ")  # magic, version, number of tokens
MASK_MAGIC = b"MRLOSSMK"
# megatron/core/datasets/indexed_dataset.py, _IndexWriter: magic, version, type code (4 = int32),
# number of sequences, number of document boundaries.
_IDX_HEADER = struct.Struct("<9sQBQQ")
_IDX_MAGIC, _IDX_VERSION, _IDX_INT32 = b"MMIDIDX\0\0", 1, 4
_TOKEN_BYTES = 4
_AT_ONCE = 1 << 20  # numbers of an index that are read at a time: a lie in it costs no memory
MAX_INT32 = np.iinfo(np.int32).max
_REBUILD = "Write the corpus again with tools/preprocess_data.py"


@dataclass(frozen=True, kw_only=True)
class CorpusDescription:
    """What PREFIX.json holds.

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


def corpus_file(prefix: str | os.PathLike[str], suffix: str) -> Path:
    """``PREFIX`` + ``.suffix``; a dot in the prefix stays."""
    return Path(f"{os.fspath(prefix)}.{suffix}")


def checksum(description: Mapping[str, Any]) -> str:
    """SHA-256 of what PREFIX.json holds beside its ``checksum``."""
    content = {name: value for name, value in description.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def document_crc(tokens: npt.NDArray[np.int32], loss_mask: npt.NDArray[np.uint8]) -> int:
    """crc32 of a document: its tokens as they are stored, then its mask."""
    return zlib.crc32(loss_mask.data, zlib.crc32(tokens.data))


class ContentFingerprint:
    """SHA-256 over the digests of three streams, so that all can be fed as they come."""

    def __init__(self) -> None:
        self.tokens, self.loss_mask = hashlib.sha256(), hashlib.sha256()

    def hexdigest(self, lengths_D: npt.NDArray[np.int32]) -> str:
        """The fingerprint of what was fed, cut into documents of these lengths."""
        digest = hashlib.sha256(self.tokens.digest() + self.loss_mask.digest())
        digest.update(hashlib.sha256(lengths_D.astype("<i4").tobytes()).digest())
        return digest.hexdigest()


def _idx_header(num_documents: int) -> bytes:
    return _IDX_HEADER.pack(_IDX_MAGIC, _IDX_VERSION, _IDX_INT32, num_documents, num_documents + 1)


def _pointers(lengths_D: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Where each document begins in PREFIX.bin, in bytes."""
    stops = np.cumsum(lengths_D, dtype=np.int64)
    return ((stops - lengths_D) * _TOKEN_BYTES).astype("<i8")


def idx_bytes(lengths_D: npt.NDArray[np.int32]) -> bytes:
    """The whole of PREFIX.idx: it follows from the lengths."""
    return b"".join(
        (
            _idx_header(len(lengths_D)),
            lengths_D.astype("<i4").tobytes(),
            _pointers(lengths_D).tobytes(),
            np.arange(len(lengths_D) + 1, dtype="<i8").tobytes(),
        )
    )


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
        DataError: a file is missing, damaged, or not as long as PREFIX.json says.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self.description = _read_description(corpus_file(prefix, "json"))
        about, trailer = self.description, 8 * self.description.num_documents + 4
        with (
            self._open("idx", _IDX_HEADER.size + 20 * about.num_documents + 8) as idx,
            self._open("bin", _TOKEN_BYTES * about.num_tokens) as tokens,
            self._open("loss_mask", MASK_HEADER.size + about.num_tokens + trailer) as loss_mask,
        ):
            self.lengths = _read_lengths(idx, about, corpus_file(prefix, "idx"))
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
        """All tokens lie in [0, vocab_size)."""
        return self.description.vocab_size

    @property
    def pad_id(self) -> int:
        """What empty positions of a batch hold."""
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
            raise DataError(
                "the corpus is damaged: its content has another fingerprint",
                where=self.prefix,
                expected=self.fingerprint,
                found=found,
                fix=_REBUILD,
            )

    def _check(self, document: int) -> None:
        """Raise DataError unless a document is as it was written, its tokens in the vocabulary."""
        start, stop = self._starts[document], self._starts[document + 1]
        tokens, loss_mask = self._tokens[start:stop], self._loss_mask[start:stop]
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            position = int(np.argmax((tokens < 0) | (tokens >= self.vocab_size)))
            raise DataError(
                f"document {document}, position {position}: token {tokens[position]} lies outside "
                "the vocabulary",
                where=corpus_file(self.prefix, "bin"),
                expected=f"0 to {self.vocab_size - 1}",
                fix=_REBUILD,
            )
        if document_crc(tokens, loss_mask) != self._crcs[document]:
            raise DataError(
                f"document {document} is damaged: the crc32 of its tokens and loss mask differs",
                where=self.prefix,
                fix=_REBUILD,
            )
        self._is_checked[document] = True

    def _open(self, suffix: str, expected: int) -> IO[bytes]:
        """A file of the corpus, checked to be regular and ``expected`` bytes long."""
        path = corpus_file(self.prefix, suffix)
        try:
            handle = open_regular(path, DataError)
        except DataError as error:
            raise DataError(str(error), fix=_REBUILD) from error
        found = os.fstat(handle.fileno()).st_size
        if found != expected:
            handle.close()
            raise DataError(
                "truncated" if found < expected else "longer than its corpus",
                where=path,
                expected=f"{expected} bytes",
                found=f"{found} bytes",
                fix=_REBUILD,
            )
        return handle

    def _read_trailer(
        self, handle: IO[bytes]
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int32]]:
        """crc32 and first label of each document, from behind the masks."""
        path, about = corpus_file(self.prefix, "loss_mask"), self.description
        header = handle.read(MASK_HEADER.size)
        found, expected = MASK_HEADER.unpack(header), (MASK_MAGIC, CORPUS_VERSION, about.num_tokens)
        if found != expected:
            raise DataError(
                "the header is damaged", where=path, expected=expected, found=found, fix=_REBUILD
            )
        handle.seek(about.num_tokens, os.SEEK_CUR)
        trailer = handle.read(8 * about.num_documents)
        if handle.read() != zlib.crc32(header + trailer).to_bytes(4, "little"):
            raise DataError(
                "damaged: the crc32 of its checksums and first labels differs",
                where=path,
                fix=_REBUILD,
            )
        crcs = np.frombuffer(trailer, "<u4", about.num_documents).astype(np.uint32)
        first_labels = np.frombuffer(trailer, "<i4", offset=4 * about.num_documents)
        return crcs, first_labels.astype(np.int32)


def _read_lengths(handle: IO[bytes], about: CorpusDescription, path: Path) -> npt.NDArray[np.int32]:
    """The lengths, int32 [D]; the rest of the index, which follows from them, is compared.

    Read piece by piece: a sparse file that claims a terabyte fails at its first lengths.
    """
    num_documents = about.num_documents

    def require(is_right: bool) -> None:
        if not is_right:
            raise DataError("the index is damaged", where=path, fix=_REBUILD)

    header = handle.read(_IDX_HEADER.size)
    require(header == _idx_header(num_documents))
    pieces, total = [], 0
    for start in range(0, num_documents, _AT_ONCE):
        count = min(_AT_ONCE, num_documents - start)
        piece = np.frombuffer(handle.read(4 * count), "<i4")
        total += int(piece.sum(dtype=np.int64))
        require(len(piece) == count and piece.min() >= 2 and total <= about.num_tokens)
        pieces.append(piece)
    require(total == about.num_tokens)
    lengths_D = np.concatenate(pieces).astype(np.int32)
    for expected in (_pointers(lengths_D), np.arange(num_documents + 1, dtype="<i8")):
        for start in range(0, len(expected), _AT_ONCE):
            piece_bytes = expected[start : start + _AT_ONCE].tobytes()
            require(handle.read(len(piece_bytes)) == piece_bytes)
    return lengths_D


def _read_description(path: Path) -> CorpusDescription:
    try:
        content = read_json(path, DataError, fix=_REBUILD)
    except DataError as error:
        if isinstance(error.__cause__, OSError):
            raise DataError(
                str(error), fix="Give the prefix that tools/preprocess_data.py wrote, let it finish"
            ) from error
        raise
    version = content.get("version")
    if version != CORPUS_VERSION:
        is_older = version == 1
        raise DataError(
            "an older corpus, without checksums" if is_older else "unknown corpus version",
            where=path,
            expected=CORPUS_VERSION,
            found=version,
            fix=_REBUILD,
        )
    if content.pop("checksum", None) != checksum(content):
        raise DataError("damaged: its own checksum differs", where=path, fix=_REBUILD)
    kinds = {"int": int, "str": str, "dict[str, Any]": dict, "dict[str, str]": dict}
    for field in fields(CorpusDescription):
        kind, value = kinds[str(field.type)], content.get(field.name)
        if type(value) is not kind:
            raise DataError(
                f"{field.name!r} is damaged",
                where=path,
                expected=field.type,
                found=repr(value),
                fix=_REBUILD,
            )
    names = {field.name for field in fields(CorpusDescription)}
    about = CorpusDescription(**{name: content[name] for name in names})
    if not (
        1 <= about.num_documents <= MAX_INT32
        and 2 * about.num_documents <= about.num_tokens <= MAX_INT32 * about.num_documents
        and 0 <= about.num_loss_tokens < about.num_tokens
        and 0 <= about.max_token_id < about.vocab_size <= MAX_INT32
    ):
        raise DataError("the counts are damaged", where=path, fix=_REBUILD)
    return about
