"""Exact counts over a store's positions: parts of a store are counted apart and then added up.

Every number that a summary needs is stored in a byte or in fp16, so counts by bit pattern have a
fixed size, give exact quantiles, and do not depend on which process counted which shard.

Shapes: P positions of some documents.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_replay.progress import Progress
from megatron_replay.store.document import MAX_SET_SIZE, CandidateBatch
from megatron_replay.store.reader import CandidateReader

Counts = npt.NDArray[np.int64]


class Distribution(NamedTuple):
    """The values that occur, ascending, and how often each does."""

    values: npt.NDArray[Any]
    counts: Counts

    @staticmethod
    def of(values: npt.NDArray[Any], counts: Counts) -> Distribution:
        """The distribution in which ``values[i]`` occurs ``counts[i]`` times."""
        occurs = np.flatnonzero(counts)
        order = occurs[np.argsort(values[occurs], kind="stable")]
        return Distribution(values[order], counts[order])

    @staticmethod
    def of_halves(counts: Counts) -> Distribution:
        """The distribution of fp16 numbers, counted by their 16 bits: int64 [65536]."""
        values = np.arange(1 << 16, dtype=np.uint16).view("<f2").astype(np.float64)
        return Distribution.of(values, counts)

    def mean(self) -> float:
        """The mean of all values."""
        return float(self.counts @ self.values.astype(np.float64) / self.counts.sum())

    def quantile(self, q: float) -> Any:
        """The least value that a share ``q`` of all does not exceed."""
        below = np.cumsum(self.counts)
        return self.values[np.searchsorted(below, np.ceil(q * below[-1]))].item()


@dataclass(eq=False)
class Tally:
    """What was counted; ``a + b`` is what both counted."""

    label_appended: int | None = None
    """Positions whose label the base model missed; None where the store's metadata has no coverage
    and max_candidates to derive it from."""
    documents: int = 0
    documents_with_positions: int = 0
    bin_bytes: int = 0
    sizes: Counts = field(default_factory=lambda: np.zeros(MAX_SET_SIZE + 1, np.int64))
    """int64 [257]: positions by the size of their set."""
    tail_masses: Counts = field(default_factory=lambda: np.zeros(1 << 16, np.int64))
    """int64 [65536]: positions by the bits of their fp16 tail mass."""
    label_logprobs: Counts = field(default_factory=lambda: np.zeros(1 << 16, np.int64))
    """int64 [65536]: positions by the bits of their label's fp16 log-probability."""

    def __add__(self, other: Tally) -> Tally:
        added: dict[str, Any] = {}
        for each in fields(self):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            unknown = mine is None or theirs is None
            added[each.name] = None if unknown else mine + theirs
        return Tally(**added)

    @property
    def positions(self) -> int:
        """Positions counted."""
        return int(self.sizes.sum())

    def set_sizes(self) -> Distribution:
        """The sizes of the candidate sets."""
        return Distribution.of(np.arange(MAX_SET_SIZE + 1), self.sizes)

    def tail_mass(self) -> Distribution:
        """The base model's probability outside the set."""
        return Distribution.of_halves(self.tail_masses)

    def coverage(self) -> Distribution:
        """The base model's probability inside the set."""
        tails, counts = self.tail_mass()
        return Distribution(1 - tails[::-1], counts[::-1])

    def label_logprob(self) -> Distribution:
        """The base model's log-probability of the label."""
        return Distribution.of_halves(self.label_logprobs)


def tally(
    reader: CandidateReader, shards: Iterable[int], progress: Progress | None = None
) -> Tally:
    """Count the positions of ``shards``, in memory that does not depend on how many there are.

    Args:
        progress: is advanced by documents.

    Raises:
        StoreError: a record is damaged.
    """
    selection = reader.description.selection
    coverage, most = selection.get("coverage"), selection.get("max_candidates")
    has_bounds = isinstance(coverage, float) and isinstance(most, int)
    total = Tally(label_appended=0 if has_bounds else None)
    for shard in shards:
        total.bin_bytes += reader.rows[shard].bin_bytes
        for documents, batch in reader.batches(shard, logits=False):
            appended = _appended(batch, coverage, most) if has_bounds else None
            total += _counted(batch, appended)
            if progress is not None:
                progress.advance(len(documents))
    return total


def _counted(batch: CandidateBatch, appended: int | None) -> Tally:
    def by_bits(numbers_P: npt.NDArray[np.float32]) -> Counts:
        return np.bincount(numbers_P.astype("<f2").view(np.uint16), minlength=1 << 16)

    counts_D = np.diff(batch.document_offsets)
    return Tally(
        label_appended=appended,
        documents=len(counts_D),
        documents_with_positions=int((counts_D > 0).sum()),
        sizes=np.bincount(np.diff(batch.offsets), minlength=MAX_SET_SIZE + 1),
        tail_masses=by_bits(batch.tail_mass),
        label_logprobs=by_bits(batch.label_logprob),
    )


def _appended(batch: CandidateBatch, coverage: Any, most: Any) -> int:
    """Positions whose label was not among the first K, so that it was appended to the set.

    Not stored, but it follows: the first K of a set reach the coverage, or there are
    max_candidates of them. Had the label been one of them, the set without it would not reach
    the coverage, for no candidate has less than the least needed. Exact up to fp16 rounding of
    the tail mass.
    """
    label_P = np.exp(np.minimum(batch.label_logprob.astype(np.float64), 0))
    others_P = 1 - batch.tail_mass.astype(np.float64) - label_P
    return int(((np.diff(batch.offsets) > most) | (others_P >= coverage)).sum())
