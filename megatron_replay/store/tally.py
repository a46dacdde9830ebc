"""Exact counts over a store's positions: parts of it are counted apart, and the counts added up.

Every number that a summary needs is stored in a byte or in fp16, so counts by bit pattern have a
fixed size, give exact quantiles, and do not depend on who counted which shard.

Shapes: P positions of some documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_replay.progress import Progress
from megatron_replay.store.document import MAX_SET_SIZE, located, require
from megatron_replay.store.format import BYTES_PER_POSITION, NUM_POSITIONS
from megatron_replay.store.manifest import bin_path
from megatron_replay.store.reader import CandidateReader

Counts = npt.NDArray[np.int64]

#: Documents counted at a time.
_DOCUMENTS_AT_ONCE = 1024


def _half_values() -> npt.NDArray[np.float64]:
    return np.arange(1 << 16, dtype=np.uint16).view("<f2").astype(np.float64)


@dataclass(eq=False)
class Tally:
    """What was counted; ``a + b`` is what both counted. Pickles to what is not zero.

    ``gold_appended`` is None where the store does not tell coverage and max_candidates.
    """

    gold_appended: int | None = None
    documents: int = 0
    documents_with_positions: int = 0
    bin_bytes: int = 0
    sizes: Counts = field(default_factory=lambda: np.zeros(MAX_SET_SIZE + 1, np.int64))
    """int64 [257]: positions by the size of their set."""
    tail_masses: Counts = field(default_factory=lambda: np.zeros(1 << 16, np.int64))
    """int64 [65536]: positions by the bits of their fp16 tail mass."""
    gold_logprobs: Counts = field(default_factory=lambda: np.zeros(1 << 16, np.int64))
    """int64 [65536]: positions by the bits of their gold's fp16 log-probability."""

    def __add__(self, other: Tally) -> Tally:
        added: dict[str, Any] = {}
        for each in fields(self):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            unknown = mine is None or theirs is None
            added[each.name] = None if unknown else mine + theirs
        return Tally(**added)

    def __getstate__(self) -> dict[str, Any]:
        """Some hundred kilobytes at most, not a megabyte: few of the patterns occur."""
        state = dict(vars(self))
        for name in ("tail_masses", "gold_logprobs"):
            at = np.flatnonzero(state[name])
            state[name] = at.astype(np.uint16), state[name][at]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in ("tail_masses", "gold_logprobs"):
            at, counts = state[name]
            state[name] = np.zeros(1 << 16, np.int64)
            state[name][at] = counts
        vars(self).update(state)

    @property
    def positions(self) -> int:
        """Positions counted."""
        return int(self.sizes.sum())

    def set_sizes(self) -> Distribution:
        """Of the sizes of the sets."""
        return Distribution.of(np.arange(MAX_SET_SIZE + 1), self.sizes)

    def tail_mass(self) -> Distribution:
        """Of the base model's mass outside the set."""
        return Distribution.of(_half_values(), self.tail_masses)

    def coverage(self) -> Distribution:
        """Of the base model's mass inside the set."""
        tails, counts = self.tail_mass()
        return Distribution(1 - tails[::-1], counts[::-1])

    def gold_logprob(self) -> Distribution:
        """Of the base model's log-probability of the gold."""
        return Distribution.of(_half_values(), self.gold_logprobs)


class Distribution(NamedTuple):
    """The values that occur, ascending, and how often each does."""

    values: npt.NDArray[Any]
    counts: Counts

    @staticmethod
    def of(values: npt.NDArray[Any], counts: Counts) -> Distribution:
        """Of ``values[i]``, each ``counts[i]`` times."""
        occurs = np.flatnonzero(counts)
        order = occurs[np.argsort(values[occurs], kind="stable")]
        return Distribution(values[order], counts[order])

    def mean(self) -> float:
        """Their mean."""
        return float(self.counts @ self.values.astype(np.float64) / self.counts.sum())

    def quantile(self, q: float) -> Any:
        """The least value that a share ``q`` of all does not exceed."""
        below = np.cumsum(self.counts)
        return self.values[np.searchsorted(below, np.ceil(q * below[-1]))].item()


class _Columns(NamedTuple):
    """Columns of the positions of some documents, as stored."""

    sizes_P: npt.NDArray[np.int64]
    gold_logprob_P: npt.NDArray[np.uint16]
    tail_mass_P: npt.NDArray[np.uint16]


def tally(
    reader: CandidateReader, shards: Iterable[int], progress: Progress | None = None
) -> Tally:
    """Count the positions of ``shards``, in memory that does not depend on how many there are.

    Only the columns that are counted are read, 11 bytes a position of some hundreds: sizes and
    ranges are checked, crc32s not (``verify`` does).

    Args:
        progress: is advanced by documents.

    Raises:
        StoreError: a record is shorter than its counts say, or holds an impossible number.
    """
    selection = reader.description.selection
    coverage, most = selection.get("coverage"), selection.get("max_candidates")
    tells = isinstance(coverage, float) and isinstance(most, int)
    total = Tally(gold_appended=0 if tells else None)
    for shard in shards:
        total.bin_bytes += reader.rows[shard].bin_bytes
        for columns in _columns(reader, shard, total, progress):
            _count(columns, total)
            if isinstance(coverage, float) and isinstance(most, int):
                assert total.gold_appended is not None
                total.gold_appended += _appended(columns, coverage, most)
    return total


def tally_shard(reader: CandidateReader, shard: int) -> Tally:
    """``tally`` of one shard."""
    return tally(reader, [shard])


def _columns(
    reader: CandidateReader, shard: int, total: Tally, progress: Progress | None
) -> Iterator[_Columns]:
    """The columns of a shard, some documents at a time; counts those documents."""
    content, offsets = reader._records(shard), reader._shard(shard).index.offsets
    documents = reader.description.documents(shard)
    for first in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        bounds = offsets[first : first + _DOCUMENTS_AT_ONCE + 1].tolist()
        less_one, halves = [np.empty(0, np.uint8)], [np.empty((3, 0), np.uint16)]
        for row in range(len(bounds) - 1):
            record = content[bounds[row] : bounds[row + 1]]
            (count,) = NUM_POSITIONS.unpack_from(record)
            if NUM_POSITIONS.size + count * BYTES_PER_POSITION > len(record):
                document = documents[first + row]
                with located(f"{bin_path(reader.directory, shard)}, document {document}"):
                    require(False, "a record is cut off")
            at = NUM_POSITIONS.size + 4 * count
            less_one.append(np.frombuffer(record, np.uint8, count, at))
            halves.append(np.frombuffer(record, "<u2", 3 * count, at + count).reshape(3, count))
            total.documents_with_positions += count > 0
        total.documents += len(bounds) - 1
        _, gold_logprob_P, tail_mass_P = np.concatenate(halves, axis=1)
        with located(bin_path(reader.directory, shard)):
            _require_numbers(gold_logprob_P, tail_mass_P)
        yield _Columns(np.concatenate(less_one).astype(np.int64) + 1, gold_logprob_P, tail_mass_P)
        if progress is not None:
            progress.advance(len(bounds) - 1)


def _require_numbers(
    gold_logprob_P: npt.NDArray[np.uint16], tail_mass_P: npt.NDArray[np.uint16]
) -> None:
    tails_P = tail_mass_P.view("<f2")
    require(bool(((tails_P >= 0) & (tails_P <= 1)).all()), "tail_mass is no probability")
    require(bool(np.isfinite(gold_logprob_P.view("<f2")).all()), "gold_logprob is not finite")


def _count(columns: _Columns, total: Tally) -> None:
    total.sizes += np.bincount(columns.sizes_P, minlength=len(total.sizes))
    total.tail_masses += np.bincount(columns.tail_mass_P, minlength=1 << 16)
    total.gold_logprobs += np.bincount(columns.gold_logprob_P, minlength=1 << 16)


def _appended(columns: _Columns, coverage: float, most: int) -> int:
    """Positions whose gold was not among the first K, so that it was appended.

    Not stored, but it follows: the first K of a set reach the coverage, or there are
    max_candidates of them. Had the gold been one of them, the set without it would not reach
    the coverage, for no candidate has less than the least needed. Exact up to fp16 rounding of
    the tail mass.
    """
    gold_P = np.exp(np.minimum(columns.gold_logprob_P.view("<f2").astype(np.float64), 0))
    others_P = 1 - columns.tail_mass_P.view("<f2").astype(np.float64) - gold_P
    return int(((columns.sizes_P > most) | (others_P >= coverage)).sum())
