"""What Stage 0 tells when the store is whole: of the store itself, and of what it cost.

``report.json`` follows from the store alone, so that it is the same however often the run was
interrupted; ``cost.json`` is this run's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from megatron_replay.files import write_json
from megatron_replay.parallel import Parallel
from megatron_replay.progress import Progress
from megatron_replay.store import CandidateReader
from megatron_replay.store.summary import summary, summary_text
from megatron_replay.store.tally import Tally, tally

REPORT_FILE, COST_FILE = "report.json", "cost.json"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one model copy spent on its shards; ``a + b`` is what both spent side by side."""

    replicas: int = 1
    shards: int
    documents: int
    positions: int
    """Through the model, padding left out."""
    seconds: float
    """Of the replica that took longest."""
    replica_seconds: float
    """Of all together."""
    waited: float
    """Of these, how many the device waited for the disk."""

    def __add__(self, other: Cost) -> Cost:
        mine, theirs = asdict(self), asdict(other)
        longest = max(self.seconds, other.seconds)
        return Cost(**{name: mine[name] + theirs[name] for name in mine} | {"seconds": longest})

    def rates(self) -> dict[str, float]:
        """Counts, seconds, positions a second of all together, and the share of waiting."""
        return {
            "replicas": self.replicas,
            "shards": self.shards,
            "documents": self.documents,
            "positions": self.positions,
            "seconds": self.seconds,
            "positions_per_second": self.positions / max(self.seconds, 1e-9),
            "share_waiting_for_disk": self.waited / max(self.replica_seconds, 1e-9),
        }


def report(store: str, cost: Cost, groups: Parallel, *, writes: bool) -> None:
    """Tally a finished store together, then tell on one process.

    Each model copy's writing rank reads its share of the shards. Communication: an all-gather of
    errors over the world, and a gather of tallies, some hundred KB each, over the writing ranks.
    """
    told: list[tuple[Tally, Cost]] = []
    reader: list[CandidateReader] = []

    def read() -> None:
        if writes:
            reader.append(CandidateReader(store))
            told.append((_share(reader[0], groups), cost))

    groups.agreed(read)
    if writes:
        gathered: list[Any] = [None] * groups.dp_size
        dist.gather_object(
            told[0],
            gathered if groups.writer else None,
            dst=dist.get_global_rank(groups.dp_group, 0),
            group=groups.dp_group,
        )
    groups.agreed(lambda: _tell(reader[0], gathered) if groups.writer else None)


def _share(reader: CandidateReader, groups: Parallel) -> Tally:
    """The tally of every dp_size-th shard."""
    shards = range(reader.description.num_shards)[groups.dp_rank :: groups.dp_size]
    documents = sum(len(reader.description.documents(shard)) for shard in shards)
    with Progress("read", documents, "documents", enabled=groups.writer) as progress:
        return tally(reader, shards, progress)


def _tell(reader: CandidateReader, gathered: list[tuple[Tally, Cost]]) -> None:
    (total, cost), *others = gathered
    for other_tally, other_cost in others:
        total, cost = total + other_tally, cost + other_cost
    facts, rates = summary(reader.description, total), cost.rates()
    write_json(reader.directory / REPORT_FILE, facts)
    print(summary_text(facts))
    if cost.shards:  # a run that found all shards there leaves what they cost
        write_json(reader.directory / COST_FILE, rates)
        print(cost_text(rates), flush=True)


def cost_text(rates: dict[str, float]) -> str:
    """``Cost.rates`` in one line."""
    replicas = f" on {rates['replicas']} replicas" if rates["replicas"] > 1 else ""
    return (
        f"cost: {rates['positions']:,} positions of {rates['documents']:,} documents in "
        f"{rates['seconds']:.1f} s{replicas}: {rates['positions_per_second']:,.0f} a second; "
        f"waited for the disk {rates['share_waiting_for_disk']:.2%} of the time"
    )
