"""What Stage 0 tells when the store is whole: of the store itself, and of what it cost.

``report.json`` follows from the store alone, so that it is the same however often the run was
interrupted; ``cost.json`` and TensorBoard are this run's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist

from megatron_replay.files import make_directory, write_json
from megatron_replay.parallel import Parallel
from megatron_replay.progress import Progress
from megatron_replay.store import CandidateReader
from megatron_replay.store.summary import summary, summary_text
from megatron_replay.store.tally import Distribution, Tally, tally

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

REPORT_FILE, COST_FILE = "report.json", "cost.json"
#: Bars of TensorBoard's histogram of the coverage.
_COVERAGE_BINS = 100


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


def report(
    store: str, cost: Cost, groups: Parallel, *, tensorboard_dir: str | None, writes: bool
) -> None:
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
    groups.agreed(lambda: _tell(reader[0], gathered, tensorboard_dir) if groups.writer else None)


def _share(reader: CandidateReader, groups: Parallel) -> Tally:
    """The tally of every dp_size-th shard."""
    shards = range(reader.description.num_shards)[groups.dp_rank :: groups.dp_size]
    documents = sum(len(reader.description.documents(shard)) for shard in shards)
    with Progress("read", documents, "documents", enabled=groups.writer) as progress:
        return tally(reader, shards, progress)


def _tell(
    reader: CandidateReader, gathered: list[tuple[Tally, Cost]], tensorboard_dir: str | None
) -> None:
    (total, cost), *others = gathered
    for other_tally, other_cost in others:
        total, cost = total + other_tally, cost + other_cost
    facts, rates = summary(reader.description, total), cost.rates()
    write_json(reader.directory / REPORT_FILE, facts)
    print(summary_text(facts))
    if cost.shards:  # a run that found all shards there leaves what they cost
        write_json(reader.directory / COST_FILE, rates)
        print(cost_text(rates), flush=True)
    if tensorboard_dir is not None:
        _draw(make_directory(tensorboard_dir), facts, total, rates if cost.shards else {})


def cost_text(rates: dict[str, float]) -> str:
    """``Cost.rates`` in one line."""
    replicas = f" on {rates['replicas']} replicas" if rates["replicas"] > 1 else ""
    return (
        f"cost: {rates['positions']:,} positions of {rates['documents']:,} documents in "
        f"{rates['seconds']:.1f} s{replicas}: {rates['positions_per_second']:,.0f} a second; "
        f"waited for the disk {rates['share_waiting_for_disk']:.2%} of the time"
    )


def _draw(directory: Path, facts: dict[str, Any], total: Tally, rates: dict[str, float]) -> None:
    """Scalars of both, and histograms of |S| and of the coverage, as TensorBoard events."""
    from torch.utils.tensorboard import SummaryWriter  # 0.3 s to import, and seldom asked for

    with SummaryWriter(str(directory)) as events:
        facts = {name: value for name, value in facts.items() if name != "description"}
        for tag, number in [*_scalars("stage0", facts), *_scalars("stage0/cost", rates)]:
            events.add_scalar(tag, number, 0)
        if total.positions:
            _draw_histogram(events, "stage0/set_size", total.set_sizes())
            _draw_histogram(events, "stage0/coverage", _binned(total.coverage()))


def _draw_histogram(events: SummaryWriter, tag: str, of: Distribution) -> None:
    values, counts = of.values.astype(np.float64), of.counts
    events.add_histogram_raw(
        tag,
        min=values[0],
        max=values[-1],
        num=int(counts.sum()),
        sum=float(counts @ values),
        sum_squares=float(counts @ values**2),
        bucket_limits=values.tolist(),
        bucket_counts=counts.tolist(),
        global_step=0,
    )


def _binned(of: Distribution) -> Distribution:
    """Counts of ``_COVERAGE_BINS`` equal pieces of [0, 1], each under its upper end."""
    bins = np.minimum((of.values * _COVERAGE_BINS).astype(np.int64), _COVERAGE_BINS - 1)
    counts = np.bincount(bins, of.counts, minlength=_COVERAGE_BINS).astype(np.int64)
    return Distribution(np.arange(1, _COVERAGE_BINS + 1) / _COVERAGE_BINS, counts)


def _scalars(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _scalars(f"{name}/{key}", inner)
    elif isinstance(value, (int, float)):
        yield name, float(value)
