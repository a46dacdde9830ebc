"""Small stores to write, and what it means that two documents are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_replay.store import (
    CandidateReader,
    CandidateWriter,
    DocumentCandidates,
    StoreDescription,
)
from megatron_replay.store.verify import verify_shard


def describe(**changes: Any) -> StoreDescription:
    fields: dict[str, Any] = {
        "vocab_size": 151_936,
        "num_documents": 5,
        "documents_per_shard": 2,
        "codec": "planar",
        "logits": "none",
        "corpus_fingerprint": "corpus",
        "tokenizer_fingerprint": "tokenizer",
        "checkpoint_fingerprint": "checkpoint",
        "selection": {"coverage": 0.95, "max_candidates": 200, "position_seed": 1},
    }
    return StoreDescription(**(fields | changes))


def draw_document(
    rng: np.random.Generator,
    *,
    vocab_size: int,
    set_sizes: list[int],
    has_logits: bool = False,
) -> DocumentCandidates:
    """A document of ``len(set_sizes)`` positions; its numbers are exact in fp16 and bf16."""
    num_positions = len(set_sizes)
    sets = [np.sort(rng.choice(vocab_size, size, replace=False)) for size in set_sizes]
    ids = np.concatenate([np.zeros(0, np.int64), *sets]).astype(np.int32)

    def halves(low: float, high: float, count: int) -> np.ndarray:
        # Of 8 significant bits, which both formats have.
        values = rng.uniform(low, high, count).astype(np.float32).view(np.uint32)
        return (values & 0xFFFF0000).view(np.float32).astype(np.float16)

    return DocumentCandidates(
        positions=np.sort(rng.choice(4096, num_positions, replace=False)).astype(np.int32),
        offsets=np.cumsum([0, *set_sizes]).astype(np.int64),
        ids=ids,
        lse=halves(-50, 50, num_positions).astype(np.float32),
        label_logprob=halves(-20, 0, num_positions).astype(np.float32),
        tail_mass=halves(0, 1, num_positions).astype(np.float32),
        logits=halves(-30, 30, len(ids)).astype(np.float32) if has_logits else None,
    )


def document_of(description: StoreDescription, document_id: int) -> DocumentCandidates:
    """Document ``document_id`` of the store every test means by ``description``."""
    rng = np.random.default_rng(document_id)
    most = min(4, description.vocab_size)
    set_sizes = rng.integers(1, most + 1, document_id % 4).tolist()  # document 0 has no position
    return draw_document(
        rng,
        vocab_size=description.vocab_size,
        set_sizes=set_sizes,
        has_logits=description.logits != "none",
    )


def write_store(directory: Path, description: StoreDescription) -> None:
    writer = CandidateWriter(directory, description)
    for number in writer.missing_shards():
        write_shard(writer, number)
    writer.finish()


def write_shard(writer: CandidateWriter, number: int) -> None:
    with writer.shard(number) as shard:
        for document_id in writer.description.documents(number):
            shard.add(document_id, document_of(writer.description, document_id))


def require_sound(reader: CandidateReader) -> None:
    """Raise StoreError, naming the first damage, unless every byte is as it was written."""
    for shard in range(reader.description.num_shards):
        verify_shard(reader, shard)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a store but the lock."""
    files = (p for p in sorted(directory.rglob("*")) if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}


def assert_same(found: DocumentCandidates, expected: DocumentCandidates) -> None:
    dtypes = {"positions": "i4", "offsets": "i8", "document_offsets": "i8", "ids": "i4"}
    for name, value in vars(expected).items():
        other = getattr(found, name)
        if value is None:
            assert other is None
        else:
            assert other.dtype == np.dtype(dtypes.get(name, "f4")), name
            np.testing.assert_array_equal(other, value, err_msg=name)
