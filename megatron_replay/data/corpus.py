"""The frozen corpus: four files under one prefix, written once and then only read.

=====================  =========================================================================
``PREFIX.bin``         tokens, int32, documents one after another (Megatron IndexedDataset)
``PREFIX.idx``         lengths and byte offsets (Megatron IndexedDataset, version 1)
``PREFIX.loss_mask``   header ``<8sQQ`` (magic, version, number of tokens), then uint8 per token
``PREFIX.json``        counts, tokenizer and fingerprints; written last, so it vouches for the rest
=====================  =========================================================================

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
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_replay.data.document import Document
from megatron_replay.errors import DataError

CORPUS_VERSION = 1
MASK_HEADER = struct.Struct("<8sQQ")  # magic, version, number of tokens
MASK_MAGIC = b"MRLOSSMK"
# megatron/core/datasets/indexed_dataset.py, _IndexWriter: magic, version, type code (4 = int32),
# number of sequences, number of document boundaries.
_IDX_HEADER = struct.Struct("<9sQBQQ")
_IDX_MAGIC, _IDX_VERSION, _IDX_INT32 = b"MMIDIDX\0\0", 1, 4
_TOKEN_BYTES = 4
_REBUILD = "Write the corpus again with tools/preprocess_data.py"


@dataclass(frozen=True, kw_only=True)
class CorpusDescription:
    """What PREFIX.json holds.

    Attributes:
        num_loss_tokens: labels that carry loss, over all documents.
        source: what it was made from; an equal ``source`` means that the corpus can be reused.
        fingerprint: SHA-256 of the three SHA-256 digests of tokens, loss mask and lengths.
    """

    version: int
    num_documents: int
    num_tokens: int
    num_loss_tokens: int
    vocab_size: int
    tokenizer_path: str
    tokenizer_fingerprint: str
    eos_id: int
    pad_id: int
    format: str
    source: dict[str, Any]
    fingerprint: str


def corpus_file(prefix: str | os.PathLike[str], suffix: str) -> Path:
    """``PREFIX`` + ``.suffix``; a dot in the prefix stays."""
    return Path(f"{os.fspath(prefix)}.{suffix}")


class ContentFingerprint:
    """SHA-256 over the digests of three streams, so that all can be fed as they come."""

    def __init__(self) -> None:
        self.tokens, self.loss_mask = hashlib.sha256(), hashlib.sha256()

    def hexdigest(self, lengths_D: npt.NDArray[np.int32]) -> str:
        """The fingerprint of what was fed, cut into documents of these lengths."""
        digest = hashlib.sha256(self.tokens.digest() + self.loss_mask.digest())
        digest.update(hashlib.sha256(lengths_D.astype("<i4").tobytes()).digest())
        return digest.hexdigest()


def idx_bytes(lengths_D: npt.NDArray[np.int32]) -> bytes:
    """The whole of PREFIX.idx: it follows from the lengths."""
    num_documents = len(lengths_D)
    stops = np.cumsum(lengths_D, dtype=np.int64)
    header = _IDX_HEADER.pack(
        _IDX_MAGIC, _IDX_VERSION, _IDX_INT32, num_documents, num_documents + 1
    )
    return b"".join(
        (
            header,
            lengths_D.astype("<i4").tobytes(),
            ((stops - lengths_D) * _TOKEN_BYTES).astype("<i8").tobytes(),
            np.arange(num_documents + 1, dtype="<i8").tobytes(),
        )
    )


class Corpus:
    """A frozen corpus, memory-mapped: ``corpus[i]`` is document i.

    Opening reads PREFIX.json, the index and the file sizes; ``verify`` reads everything.

    Attributes:
        description: what PREFIX.json holds.
        lengths: int32 [D], tokens of each document.

    Raises:
        DataError: a file is missing, damaged, or not as long as PREFIX.json says.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self.description = _read_description(corpus_file(prefix, "json"))
        num_documents, num_tokens = self.description.num_documents, self.description.num_tokens
        sizes = {
            "idx": _IDX_HEADER.size + 20 * num_documents + 8,
            "bin": _TOKEN_BYTES * num_tokens,
            "loss_mask": MASK_HEADER.size + num_tokens,
        }
        for suffix, size in sizes.items():
            _require_size(corpus_file(prefix, suffix), size)
        self.lengths = self._read_lengths()
        self._starts = np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64)))
        # An ndarray over the mapping: indexing a memmap itself costs microseconds a time.
        self._tokens = np.asarray(np.memmap(corpus_file(prefix, "bin"), dtype="<i4", mode="r"))
        self._loss_mask = self._map_loss_mask()

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
        """
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

    def _read_lengths(self) -> npt.NDArray[np.int32]:
        path = corpus_file(self.prefix, "idx")
        content, num_documents = path.read_bytes(), self.description.num_documents
        lengths_D = np.frombuffer(
            content, dtype="<i4", count=num_documents, offset=_IDX_HEADER.size
        ).astype(np.int32)
        # Lengths decide the rest of the file, so one comparison checks all of it.
        total = int(lengths_D.sum(dtype=np.int64))
        if (
            total != self.description.num_tokens
            or lengths_D.min() < 2
            or idx_bytes(lengths_D) != content
        ):
            raise DataError("the index is damaged", where=path, fix=_REBUILD)
        return lengths_D

    def _map_loss_mask(self) -> npt.NDArray[np.uint8]:
        path = corpus_file(self.prefix, "loss_mask")
        content = np.memmap(path, dtype=np.uint8, mode="r")
        found = MASK_HEADER.unpack(content[: MASK_HEADER.size].tobytes())
        expected = (MASK_MAGIC, CORPUS_VERSION, self.description.num_tokens)
        if found != expected:
            raise DataError(
                "the header is damaged", where=path, expected=expected, found=found, fix=_REBUILD
            )
        return content[MASK_HEADER.size :]


def _read_description(path: Path) -> CorpusDescription:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"cannot read: {error.strerror}",
            where=path,
            fix="Give the prefix that tools/preprocess_data.py wrote, and let it finish",
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", where=path, fix=_REBUILD) from error
    if not isinstance(content, dict) or content.get("version") != CORPUS_VERSION:
        found = content.get("version") if isinstance(content, dict) else "no object"
        raise DataError(
            "unknown corpus version",
            where=path,
            expected=CORPUS_VERSION,
            found=found,
            fix=_REBUILD,
        )
    kinds = {"int": int, "str": str, "dict[str, Any]": dict}
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
    description = CorpusDescription(**{name: content[name] for name in names})
    if description.num_documents < 1 or description.num_tokens < 2 * description.num_documents:
        raise DataError("the counts are damaged", where=path, fix=_REBUILD)
    return description


def _require_size(path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror}", where=path, fix=_REBUILD) from error
    if found != expected:
        raise DataError(
            "truncated" if found < expected else "longer than its corpus",
            where=path,
            expected=f"{expected} bytes",
            found=f"{found} bytes",
            fix=_REBUILD,
        )
