"""The numbers in a corpus's files: how they are written, and checked before they are used.

``corpus.py`` describes the files.
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
from megatron_replay.files import read_json

CORPUS_VERSION = 2
MASK_HEADER = struct.Struct("<8sQQ")  # magic, version, number of tokens
MASK_MAGIC = b"MRLOSSMK"
# megatron/core/datasets/indexed_dataset.py, _IndexWriter: magic, version, type code (4 = int32),
# number of sequences, number of document boundaries.
IDX_HEADER = struct.Struct("<9sQBQQ")
_IDX_MAGIC, _IDX_VERSION, _IDX_INT32 = b"MMIDIDX\0\0", 1, 4
TOKEN_BYTES = 4
_AT_ONCE = 1 << 20  # numbers read from an index at a time, so a false count costs no memory
MAX_INT32 = np.iinfo(np.int32).max


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


def corpus_file(prefix: str | os.PathLike[str], suffix: str) -> Path:
    """``PREFIX`` + ``.suffix``; a dot in the prefix stays."""
    return Path(f"{os.fspath(prefix)}.{suffix}")


def corpus_error(what: str, where: object, **facts: Any) -> DataError:
    """The error of a damaged corpus, which the user can only write again."""
    fix = "Write the corpus again with tools/preprocess_data.py"
    return DataError(what, where=where, fix=fix, **facts)


def checksum(description: Mapping[str, Any]) -> str:
    """SHA-256 of everything in PREFIX.json but its ``checksum``."""
    content = {name: value for name, value in description.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def document_crc(tokens: npt.NDArray[np.int32], loss_mask: npt.NDArray[np.uint8]) -> int:
    """crc32 of a document: its tokens as they are stored, then its mask."""
    return zlib.crc32(loss_mask.data, zlib.crc32(tokens.data))


class ContentFingerprint:
    """SHA-256 over the digests of three streams, each of which is fed piece by piece."""

    def __init__(self) -> None:
        self.tokens, self.loss_mask = hashlib.sha256(), hashlib.sha256()

    def hexdigest(self, lengths_D: npt.NDArray[np.int32]) -> str:
        """The fingerprint of what was fed, cut into documents of these lengths."""
        digest = hashlib.sha256(self.tokens.digest() + self.loss_mask.digest())
        digest.update(hashlib.sha256(lengths_D.astype("<i4").tobytes()).digest())
        return digest.hexdigest()


def _idx_header(num_documents: int) -> bytes:
    return IDX_HEADER.pack(_IDX_MAGIC, _IDX_VERSION, _IDX_INT32, num_documents, num_documents + 1)


def _idx_rest(lengths_D: npt.NDArray[np.int32]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """What follows the lengths: where each document begins in PREFIX.bin, and its number."""
    starts_D = np.cumsum(lengths_D, dtype=np.int64) - lengths_D
    return (starts_D * TOKEN_BYTES).astype("<i8"), np.arange(len(lengths_D) + 1, dtype="<i8")


def idx_bytes(lengths_D: npt.NDArray[np.int32]) -> bytes:
    """The whole of PREFIX.idx, which follows from the lengths."""
    parts = (lengths_D.astype("<i4"), *_idx_rest(lengths_D))
    return _idx_header(len(lengths_D)) + b"".join(part.tobytes() for part in parts)


def read_lengths(handle: IO[bytes], about: CorpusDescription, path: Path) -> npt.NDArray[np.int32]:
    """The lengths, int32 [D]; the rest of the index, which follows from them, is compared.

    Reads piece by piece: a sparse file that claims a terabyte fails at its first lengths.
    """
    num_documents = about.num_documents

    def require(is_right: bool) -> None:
        if not is_right:
            raise corpus_error("the index is damaged", path)

    require(handle.read(IDX_HEADER.size) == _idx_header(num_documents))
    pieces, total = [], 0
    for start in range(0, num_documents, _AT_ONCE):
        count = min(_AT_ONCE, num_documents - start)
        piece = np.frombuffer(handle.read(4 * count), "<i4")
        total += int(piece.sum(dtype=np.int64))
        require(len(piece) == count and piece.min() >= 2 and total <= about.num_tokens)
        pieces.append(piece)
    require(total == about.num_tokens)
    lengths_D = np.concatenate(pieces).astype(np.int32)
    for expected in _idx_rest(lengths_D):
        for start in range(0, len(expected), _AT_ONCE):
            piece_bytes = expected[start : start + _AT_ONCE].tobytes()
            require(handle.read(len(piece_bytes)) == piece_bytes)
    return lengths_D


def read_description(path: Path) -> CorpusDescription:
    """The content of PREFIX.json.

    Raises:
        DataError: it cannot be read, is damaged, or of another version.
    """
    try:
        content = read_json(path, DataError)
    except DataError as error:
        if isinstance(error.__cause__, OSError):
            fix = "Give the prefix that tools/preprocess_data.py wrote, let it finish"
            raise DataError(str(error), fix=fix) from error
        raise corpus_error(str(error), None) from error
    version = content.get("version")
    if version != CORPUS_VERSION:
        what = "an older corpus, without checksums" if version == 1 else "unknown corpus version"
        raise corpus_error(what, path, expected=CORPUS_VERSION, found=version)
    if content.pop("checksum", None) != checksum(content):
        raise corpus_error("damaged: its own checksum differs", path)
    kinds = {"int": int, "str": str, "dict[str, Any]": dict, "dict[str, str]": dict}
    values: dict[str, Any] = {}
    for field in fields(CorpusDescription):
        value = values[field.name] = content.get(field.name)
        if type(value) is not kinds[str(field.type)]:
            raise corpus_error(
                f"{field.name!r} is damaged", path, expected=field.type, found=repr(value)
            )
    about = CorpusDescription(**values)
    if not (
        1 <= about.num_documents <= MAX_INT32
        and 2 * about.num_documents <= about.num_tokens <= MAX_INT32 * about.num_documents
        and 0 <= about.num_loss_tokens < about.num_tokens
        and 0 <= about.max_token_id < about.vocab_size <= MAX_INT32
    ):
        raise corpus_error("the counts are damaged", path)
    return about
