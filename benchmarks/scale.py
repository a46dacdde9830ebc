"""Stage 0 for 10 billion tokens on 512 devices: a calculation, and its store's files in earnest.

    python -m benchmarks.scale

First arithmetic, from the sizes that docs/store_format.md gives and the assumptions named; then a
store with as many shards as that, of one tiny document each, is written, finished, opened, listed
and continued here, and what that took is measured. docs/scale.md has the result and what it means.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_replay.progress import Progress
from megatron_replay.store import (
    CandidateReader,
    CandidateWriter,
    DocumentCandidates,
    StoreDescription,
)
from megatron_replay.store.format import BYTES_PER_POSITION, high_bits
from megatron_replay.store.manifest import SHARDS_PER_DIRECTORY

VOCAB_SIZE = 151_936
#: Offset, crc32, last position.
INDEX_BYTES_PER_DOCUMENT = 16


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is assumed, all of it named in the output."""

    tokens: float = 10e9
    tokens_per_document: int = 1000
    loss_share: float = 0.5
    position_fraction: float = 0.5
    set_size: int = 100
    documents_per_shard: int = 4096
    devices: int = 512
    devices_per_replica: int = 8  # TP 4, PP 2
    parameters: float = 8.19e9
    device_flops: float = 313e12  # bf16, Ascend 910B3
    utilisation: float = 0.35

    @property
    def replicas(self) -> int:
        return self.devices // self.devices_per_replica

    @property
    def documents(self) -> int:
        return round(self.tokens / self.tokens_per_document)

    @property
    def shards(self) -> int:
        return -(-self.documents // self.documents_per_shard)

    @property
    def positions(self) -> float:
        return self.tokens * self.loss_share * self.position_fraction

    @property
    def bytes_per_position(self) -> float:
        return BYTES_PER_POSITION + self.set_size * (2 + high_bits(VOCAB_SIZE) / 8)

    @property
    def seconds(self) -> float:
        """Of the forward pass, 2 FLOP a parameter and token."""
        flops = self.devices * self.device_flops * self.utilisation
        return 2 * self.parameters * self.tokens / flops

    def rows(self) -> Iterator[tuple[str, str]]:
        size = self.positions * self.bytes_per_position
        shard = size / self.shards
        directories = -(-self.shards // SHARDS_PER_DIRECTORY)
        renames = 2 * self.shards
        yield "documents, positions", f"{self.documents:,}, {self.positions:,.0f}"
        yield "replicas that write", f"{self.replicas}"
        yield "forward pass", f"{self.seconds / 60:.0f} minutes"
        yield "store", f"{size / 1e9:,.0f} GB, {self.bytes_per_position:.0f} bytes a position"
        yield (
            "written, all and each writer",
            (
                f"{size / self.seconds / 1e6:,.0f} MB/s, "
                f"{size / self.seconds / self.replicas / 1e6:.1f} MB/s"
            ),
        )
        yield "shards", f"{self.shards:,} of {shard / 1e6:,.0f} MB"
        yield "files", f"{2 * self.shards + 2:,} in {directories} directories and the store's own"
        yield "most entries of a directory", f"{min(2 * self.shards, 2 * SHARDS_PER_DIRECTORY):,}"
        yield (
            "creates and renames",
            (f"{2 * renames:,}, {2 * renames / self.seconds:.1f} a second over the forward pass"),
        )
        yield "fsyncs (files and directories)", f"{2 * renames:,}"
        yield (
            "a replica's shard under way",
            (
                f"{self.seconds * self.replicas / self.shards:.0f} seconds of forward pass: "
                "the most that a death costs"
            ),
        )
        index = INDEX_BYTES_PER_DOCUMENT * self.documents
        yield "indexes, read at first touch", f"{index / 1e6:,.0f} MB, held by each reading process"
        yield (
            "report, read by all writers",
            (f"{size / self.replicas / 1e9:.1f} GB each, rank 0 merges {self.replicas} tallies"),
        )


@contextmanager
def timed(what: str, say: Callable[[str], None]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    say(f"{what:<58} {time.perf_counter() - start:8.2f} s")


def rehearse(shards: int, root: Path) -> None:
    """Files and metadata operations of a store of ``shards`` shards, on this machine's disk."""
    description = StoreDescription(
        vocab_size=VOCAB_SIZE,
        num_documents=shards,
        documents_per_shard=1,
        codec="planar",
        logits="none",
        corpus_fingerprint="corpus",
        tokenizer_fingerprint="tokenizer",
        checkpoint_fingerprint="checkpoint",
        selection={},
    )
    tiny = DocumentCandidates(
        positions=np.array([0], np.int32),
        offsets=np.array([0, 1], np.int64),
        ids=np.array([7], np.int32),
        lse=np.zeros(1, np.float32),
        gold_logprob=np.zeros(1, np.float32),
        tail_mass=np.zeros(1, np.float32),
        logits=None,
    )
    with CandidateWriter(root, description, lock=True) as writer:
        half = shards // 2
        with (
            timed(f"write {shards:,} shards, every file synced, one process", print),
            Progress("write", shards, "shards") as progress,
        ):
            for number in range(shards):
                if number == half:
                    writer.close()
                    with timed(
                        "  of that: open the half-written store, list what is missing", print
                    ):
                        writer = CandidateWriter(root, description, lock=True)
                        assert writer.missing_shards() == list(range(half, shards))
                with writer.shard(number) as out:
                    out.add(number, tiny)
                progress.advance()
        with timed("finish: read every index, stat every .bin, write the manifest", print):
            writer.finish()
    with timed("open the finished store", print):
        reader = CandidateReader(root)
    with timed("touch every shard once", print):
        reader.read(range(shards))
    entries = max(len(os.listdir(path)) for path in [root, *root.glob("[0-9]*")])
    manifest = (root / "manifest.json").stat().st_size
    print(f"most entries of a directory {entries:,}; manifest {manifest:,} bytes")


def main() -> None:
    """Print the calculation and the rehearsal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rehearse-shards", type=int, default=10_000, metavar="N")
    options = parser.parse_args()
    job = Job()
    print("Assumed: " + ", ".join(f"{name} {value:,}" for name, value in vars(job).items()))
    for what, value in job.rows():
        print(f"{what:<32} {value}")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    print(f"\nRehearsal; a process may have {limit:,} open files here")
    with tempfile.TemporaryDirectory(dir=".") as directory:
        rehearse(options.rehearse_shards, Path(directory))


if __name__ == "__main__":
    main()
