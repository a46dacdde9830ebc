"""The store beside plainer ways to keep the same ids: python -m benchmarks.store

Documents of 512 positions with sets of 1 to 200 ids by Zipf's law, copied until they do not fit the
cache; one thread, files in the page cache. Each round reads other documents into flat arrays.
"first touch": a reader just opened, which checks index and crc32 of what it reads; the others have
checked those before, and check every rule of the format on every read. "copied": raw int32 ids of
the same documents, memory-mapped and concatenated: memory's speed. zlib holds the int32 ids of one
document each.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.timing import interleave, machine
from megatron_replay.store import (
    CandidateReader,
    CandidateWriter,
    DocumentCandidates,
    StoreDescription,
    offsets_of_counts,
)

CPU = torch.device("cpu")
VOCAB_SIZE, DOCUMENTS, POSITIONS, LARGEST_SET = 151_936, 24, 512, 200
COPIES, DOCUMENTS_PER_SHARD = 8, 32
Documents = Sequence[DocumentCandidates]
Work = dict[str, Callable[[], object]]


def write(directory: Path, documents: Documents, *, logits: str = "none") -> Path:
    """A store of ``documents``: encoding, checks, crc32 and fsync of every shard."""
    description = StoreDescription(
        vocab_size=VOCAB_SIZE,
        num_documents=len(documents),
        documents_per_shard=DOCUMENTS_PER_SHARD,
        logits=logits,
        corpus_fingerprint="corpus",
        tokenizer_fingerprint="tokenizer",
        checkpoint_fingerprint="checkpoint",
        selection={},
    )
    with CandidateWriter(directory, description) as writer:
        for number in writer.missing_shards():
            with writer.shard(number) as shard:
                for document_id in description.documents(number):
                    shard.add(document_id, documents[document_id])
        writer.finish()
    return directory


def make_documents() -> list[DocumentCandidates]:
    """p ~ 1 / (rank + 3), ranks shuffled."""
    rng = np.random.default_rng(0)
    cumulative_V = np.cumsum(1 / (np.arange(VOCAB_SIZE) + 3.0))
    id_of_rank_V = rng.permutation(VOCAB_SIZE).astype(np.int32)
    documents = []
    for _ in range(DOCUMENTS):
        sets = []
        for size in rng.integers(1, LARGEST_SET, POSITIONS, endpoint=True):
            drawn = rng.random(size) * cumulative_V[-1]
            sets.append(np.unique(id_of_rank_V[np.searchsorted(cumulative_V, drawn)]))
        zeros_T = np.zeros(POSITIONS, np.float32)
        documents.append(
            DocumentCandidates(
                positions=np.arange(POSITIONS, dtype=np.int32),
                offsets=offsets_of_counts(np.array([len(ids) for ids in sets])),
                ids=np.concatenate(sets),
                lse=zeros_T, label_logprob=zeros_T, tail_mass=zeros_T, logits=None,
            )
        )  # fmt: skip
    return documents


def print_bytes(folder: Path, documents: Documents) -> None:
    positions, rng = sum(len(d.positions) for d in documents), np.random.default_rng(0)
    for logits in ("none", "fp16"):
        content = list(documents)
        if logits == "fp16":
            drawn = (rng.normal(10, 4, len(d.ids)).astype(np.float32) for d in documents)
            content = [
                dataclasses.replace(d, logits=z) for d, z in zip(content, drawn, strict=True)
            ]
        store = write(folder / f"bytes-{logits}", content, logits=logits)
        size = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
        print(f"bytes a position, logits {logits}: {size / positions:.1f}")


def print_rates(title: str, work: Work, num_ids: int, rounds: int) -> None:
    times = interleave(work, rounds=rounds, each=num_ids, device=CPU)
    print(f"\n{title}\n{'':24}{'M ids/s':>9}{'best':>9}")
    for name, each in times.items():
        print(f"{name:24}{1e3 / each.median:9.1f}{1e3 / each.least:9.1f}", flush=True)


def reading(folder: Path, documents: Documents, count: int) -> Work:
    """Ways to read ``count`` documents, drawn anew each time."""
    rng = np.random.default_rng(0)
    store = write(folder / "store", documents)
    reader = CandidateReader(store)
    reader.read(range(len(reader)))
    np.concatenate([document.ids for document in documents]).tofile(folder / "raw")
    offsets = offsets_of_counts(np.array([len(document.ids) for document in documents]))
    raw = np.memmap(folder / "raw", np.int32, "r")
    few = documents[: len(documents) // COPIES]
    deflated = [zlib.compress(document.ids) for document in few]

    def drawn() -> list[int]:
        return rng.choice(len(documents), count, replace=False).tolist()

    return {
        "copied": lambda: np.concatenate([raw[offsets[d] : offsets[d + 1]] for d in drawn()]),
        "store": lambda: reader.read(drawn()),
        "store, first touch": lambda: CandidateReader(store).read(drawn()),
        "store, one by one": lambda: [reader[d] for d in drawn()],
        "zlib": lambda: np.concatenate(
            [np.frombuffer(zlib.decompress(deflated[d % len(few)]), np.int32) for d in drawn()]
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--documents", type=int, default=16, help="of a batch")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine(CPU)}; numpy {np.__version__}, {time.strftime('%Y-%m-%d')}")
    documents = make_documents()
    num_ids = sum(len(document.ids) for document in documents)
    many, count = documents * COPIES, options.documents
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        print_bytes(folder, documents)
        title = f"reading {count} of {len(many)} documents"
        work = reading(folder, many, count)
        print_rates(title, work, round(num_ids / len(documents) * count), options.rounds)

        def fresh() -> None:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                write(Path(place) / "store", documents)

        print_rates("writing", {"store": fresh}, num_ids, max(3, options.rounds // 5))


if __name__ == "__main__":
    main()
