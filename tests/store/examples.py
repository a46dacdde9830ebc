"""Small stores and corpora to write, forgeries of them, and when two documents are the same."""

from __future__ import annotations

import itertools
import json
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_replay.data.corpus import Corpus, Document
from megatron_replay.data.corpus_writer import CorpusWriter
from megatron_replay.store import (
    CandidateReader,
    CandidateWriter,
    DocumentCandidates,
    StoreDescription,
)
from megatron_replay.store.verify import verify_shard

VOCAB_SIZE = 70_000
BIN_HEADER_BYTES, INDEX_HEADER_BYTES = 12, 44
Files = dict[str, bytes]


def describe(**changes: Any) -> StoreDescription:
    fields: dict[str, Any] = {
        "vocab_size": 151_936, "num_documents": 5, "documents_per_shard": 2, "logits": "none",
        "corpus_fingerprint": "corpus", "tokenizer_fingerprint": "tokenizer",
        "checkpoint_fingerprint": "checkpoint",
        "selection": {"coverage": 0.95, "max_candidates": 200, "position_seed": 1},
    }  # fmt: skip
    return StoreDescription(**(fields | changes))


def draw_document(
    rng: np.random.Generator, *, vocab_size: int, set_sizes: list[int], has_logits: bool = False
) -> DocumentCandidates:
    """A document of ``len(set_sizes)`` positions; its numbers are exact in fp16 and bf16."""
    num_positions = len(set_sizes)
    sets = [np.sort(rng.choice(vocab_size, size, replace=False)) for size in set_sizes]
    ids = np.concatenate([np.zeros(0, np.int64), *sets]).astype(np.int32)

    def numbers(low: float, high: float, count: int) -> np.ndarray:
        # Of 8 significant bits, which both formats have.
        values = rng.uniform(low, high, count).astype(np.float32).view(np.uint32)
        return (values & 0xFFFF0000).view(np.float32).astype(np.float16).astype(np.float32)

    return DocumentCandidates(
        positions=np.sort(rng.choice(4096, num_positions, replace=False)).astype(np.int32),
        offsets=np.cumsum([0, *set_sizes]).astype(np.int64),
        ids=ids,
        lse=numbers(-50, 50, num_positions),
        label_logprob=numbers(-20, 0, num_positions),
        tail_mass=numbers(0, 1, num_positions),
        logits=numbers(-30, 30, len(ids)) if has_logits else None,
    )


def document_of(description: StoreDescription, document_id: int) -> DocumentCandidates:
    """Document ``document_id`` of the store every test means by ``description``."""
    rng, most = np.random.default_rng(document_id), min(4, description.vocab_size)
    return draw_document(
        rng,
        vocab_size=description.vocab_size,
        # Document 0 has no position.
        set_sizes=rng.integers(1, most + 1, document_id % 4).tolist(),
        has_logits=description.logits != "none",
    )


Draw = Callable[[StoreDescription, int], DocumentCandidates]


def write_shard(writer: CandidateWriter, number: int, draw: Draw = document_of) -> None:
    with writer.shard(number) as shard:
        for document_id in writer.description.documents(number):
            shard.add(document_id, draw(writer.description, document_id))


def write_store(
    directory: Path, description: StoreDescription, draw: Draw = document_of
) -> CandidateReader:
    writer = CandidateWriter(directory, description)
    for number in writer.missing_shards():
        write_shard(writer, number, draw)
    writer.finish()
    return CandidateReader(directory)


def write_corpus(
    prefix: Path, documents: Iterable[Document], *, fingerprint: str = "tokenizer"
) -> Corpus:
    tokenizer: Any = SimpleNamespace(
        path="tokenizer", fingerprint=fingerprint, files={},
        vocab_size=VOCAB_SIZE, eos_id=0, pad_id=0,
    )  # fmt: skip
    with CorpusWriter(prefix, tokenizer, row_format="messages", source={}) as corpus:
        for document in documents:
            corpus.add(document)
    return Corpus(prefix)


def text_of(document: DocumentCandidates) -> Document:
    """Tokens whose labels at the recorded positions, and no others, carry loss: sets' last ids."""
    labelled = document.positions + 1
    tokens = np.zeros(int(labelled.max(initial=1)) + 1, np.int32)
    loss_mask = np.zeros(len(tokens), np.bool_)
    tokens[labelled], loss_mask[labelled] = document.ids[document.offsets[1:] - 1], True
    return Document(tokens, loss_mask)


def require_sound(reader: CandidateReader) -> None:
    """Raise StoreError, naming the first damage, unless every byte is as it was written."""
    for shard in range(reader.description.num_shards):
        verify_shard(reader, shard)


def contents(directory: Path) -> Files:
    """Every file of a store but the lock."""
    files = (p for p in sorted(directory.rglob("*")) if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}


def overwrite(path: Path, content: bytes | bytearray) -> None:
    """Replace in place: truncating first makes a file system flush, thousands of times here."""
    with open(path, "r+b") as handle:
        handle.write(content)
        handle.truncate()


def sign(files: Files, *, records: bool = True) -> Files:
    """``files`` with checksums and a manifest that fit what they hold, as far as they can be read.

    Args:
        records: also what the indexes say of sizes and crc32s of the records.
    """
    files, rows = dict(files), []
    for name in sorted(name for name in files if name.endswith(".bin")):
        content, index = files[name], bytearray(files[name.replace(".bin", ".idx")])
        count = (len(index) - INDEX_HEADER_BYTES - 12) // 16
        if records and count >= 0:
            struct.pack_into("<I", index, INDEX_HEADER_BYTES - 4, zlib.crc32(content))
            if count:
                struct.pack_into("<Q", index, 32, len(content))
                struct.pack_into("<Q", index, INDEX_HEADER_BYTES + 8 * count, len(content))
            offsets = struct.unpack_from(f"<{count + 1}q", index, INDEX_HEADER_BYTES)
            for i, (start, stop) in enumerate(itertools.pairwise(offsets)):
                crc = zlib.crc32(content[max(start, 0) : max(stop, 0)])
                struct.pack_into("<I", index, INDEX_HEADER_BYTES + 8 * (count + 1) + 4 * i, crc)
        if len(index) >= INDEX_HEADER_BYTES + 4:
            struct.pack_into("<I", index, len(index) - 4, zlib.crc32(index[:-4]))
            files[name.replace(".bin", ".idx")] = bytes(index)
            size, crc = *struct.unpack_from("<Q", index, 32), *struct.unpack_from("<I", index, 40)
            rows.append([size, crc, zlib.crc32(index[:-4])])
        else:
            rows.append([len(content), zlib.crc32(content), 0])
    try:
        manifest = json.loads(files["manifest.json"]) | {"shards": rows}
        files["manifest.json"] = json.dumps(manifest).encode()
    except (ValueError, TypeError, RecursionError):
        pass  # the manifest itself is the damaged file
    return files


def forge(store: Path, name: str, at: int, content: bytes, *, records: bool = True) -> None:
    """Write ``content`` into a file of ``store``, and checksums that fit."""
    files = contents(store)
    files[name] = files[name][:at] + content + files[name][at + len(content) :]
    for other, signed in sign(files, records=records).items():
        overwrite(store / other, signed)


def assert_same(found: Any, expected: Any) -> None:
    dtypes = {"positions": "i4", "offsets": "i8", "document_offsets": "i8", "ids": "i4"}
    for name, value in vars(expected).items():
        other = getattr(found, name)
        if value is None:
            assert other is None
        else:
            assert other.dtype == np.dtype(dtypes.get(name, "f4")), name
            np.testing.assert_array_equal(other, value, err_msg=name)
