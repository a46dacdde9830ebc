"""A candidate store in numbers: sizes of the sets, coverage, missed labels, bytes.

Printed at the end of Stage 0 and by tools/inspect_store.py. The numbers show whether replay is
worth it: little coverage, many sets at the cap or many appended labels mean that the base model has
learnt little of the domain, and that a restricted loss lets probability leak out of the sets.

Every number is stored in a byte or in fp16, so counts by bit pattern have a fixed size, give exact
quantiles, and add up in any order: shards may be counted apart.

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
from megatron_replay.store.manifest import StoreDescription
from megatron_replay.store.reader import CandidateReader

Counts = npt.NDArray[np.int64]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
#: Sizes that share a row of the histogram.
ROW_WIDTH = 20
BAR_WIDTH = 40


@dataclass(eq=False)
class Tally:
    """What was counted of some shards; ``a + b`` is what both counted."""

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
            counts_D = np.diff(batch.document_offsets)
            total.documents += len(counts_D)
            total.documents_with_positions += int((counts_D > 0).sum())
            total.sizes += np.bincount(np.diff(batch.offsets), minlength=MAX_SET_SIZE + 1)
            total.tail_masses += _by_bits(batch.tail_mass)
            total.label_logprobs += _by_bits(batch.label_logprob)
            if total.label_appended is not None:
                total.label_appended += _appended(batch, coverage, most)
            if progress is not None:
                progress.advance(len(documents))
    return total


def _by_bits(numbers_P: npt.NDArray[np.float32]) -> Counts:
    return np.bincount(numbers_P.astype("<f2").view(np.uint16), minlength=1 << 16)


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


class _Distribution(NamedTuple):
    """The values that occur, ascending, and how often each does."""

    values: npt.NDArray[Any]
    counts: Counts

    @staticmethod
    def of(values: npt.NDArray[Any], counts: Counts) -> _Distribution:
        occurs = np.flatnonzero(counts)
        order = occurs[np.argsort(values[occurs], kind="stable")]
        return _Distribution(values[order], counts[order])

    def quantile(self, q: float) -> Any:
        """The least value that a share ``q`` of all does not exceed."""
        below = np.cumsum(self.counts)
        return self.values[np.searchsorted(below, np.ceil(q * below[-1]))].item()

    def numbers(self) -> dict[str, Any]:
        """Mean and quantiles, for JSON."""
        return {
            "mean": float(self.counts @ self.values.astype(np.float64) / self.counts.sum()),
            "quantiles": {f"{q:g}": self.quantile(q) for q in QUANTILES},
        }


def summary(description: StoreDescription, counted: Tally) -> dict[str, Any]:
    """What was counted of a store as a JSON object; a function of the store alone."""
    num_positions, appended = int(counted.sizes.sum()), counted.label_appended
    content: dict[str, Any] = {
        "description": dict(vars(description)),
        "documents": counted.documents,
        "documents_with_positions": counted.documents_with_positions,
        "positions": num_positions,
        "candidates": int(counted.sizes @ range(MAX_SET_SIZE + 1)),
        "bin_bytes": counted.bin_bytes,
    }
    if not num_positions:
        return content
    halves = np.arange(1 << 16, dtype=np.uint16).view("<f2").astype(np.float64)
    tail_mass = _Distribution.of(halves, counted.tail_masses)
    coverage = _Distribution(1 - tail_mass.values[::-1], tail_mass.counts[::-1])
    logprob = _Distribution.of(halves, counted.label_logprobs)
    return content | {
        "bytes_per_position": counted.bin_bytes / num_positions,
        "set_size": _set_sizes(counted.sizes),
        "coverage": coverage.numbers() | {"min": coverage.values[0].item()},
        "tail_mass": tail_mass.numbers() | {"max": tail_mass.values[-1].item()},
        "cap": _cap(counted.sizes, description.selection.get("max_candidates")),
        "label_logprob": logprob.numbers() | {"min": logprob.values[0].item()},
        "share_label_appended": None if appended is None else appended / num_positions,
    }


def _set_sizes(counts: Counts) -> dict[str, Any]:
    sizes = _Distribution.of(np.arange(MAX_SET_SIZE + 1), counts)
    least, most = int(sizes.values[0]), int(sizes.values[-1])
    histogram = [
        {
            "from": low,
            "to": min(low + ROW_WIDTH - 1, MAX_SET_SIZE),
            "positions": int(counts[low : low + ROW_WIDTH].sum()),
        }
        for low in range(1, most + 1, ROW_WIDTH)
    ]
    median = sizes.quantile(0.5)
    return sizes.numbers() | {"median": median, "min": least, "max": most, "histogram": histogram}


def _cap(counts: Counts, max_candidates: object) -> dict[str, Any] | None:
    """Shares of positions at the cap and above it, where the metadata has the cap."""
    if type(max_candidates) is not int or max_candidates < 1:
        return None
    return {
        "max_candidates": max_candidates,
        "share_at_or_above": int(counts[max_candidates:].sum()) / int(counts.sum()),
        # One more than the cap: the set was cut there and its label appended.
        "share_above": int(counts[max_candidates + 1 :].sum()) / int(counts.sum()),
    }


def summary_text(summary: dict[str, Any]) -> str:
    """``summary``'s object for a reader at a terminal."""
    lines = [f"{name}: {value}" for name, value in summary["description"].items()]
    lines += [
        f"documents: {summary['documents']}, {summary['documents_with_positions']} with positions",
        f"positions: {summary['positions']}",
        f"candidates: {summary['candidates']}",
    ]
    if not summary["positions"]:
        return "\n".join(lines)
    size, coverage, cap = summary["set_size"], summary["coverage"], summary["cap"]
    tail, logprob = summary["tail_mass"], summary["label_logprob"]
    missed = summary["share_label_appended"]
    lines += [
        f"bytes per position: {summary['bytes_per_position']:.1f}",
        f"label log-probability: mean {logprob['mean']:.4f}, least {logprob['min']:.4f}, "
        + _quantiles_text(logprob, ".4f"),
        "label appended: the store's metadata has no coverage and max_candidates"
        if missed is None
        else f"label missed by the base model, so appended to its set: {missed:.2%} of positions",
        f"coverage: mean {coverage['mean']:.4f}, least {coverage['min']:.4f}, "
        + _quantiles_text(coverage, ".4f"),
        f"tail mass: mean {tail['mean']:.4f}, most {tail['max']:.4f}, "
        + _quantiles_text(tail, ".4f"),
        f"|S|: mean {size['mean']:.1f}, median {size['median']}, {size['min']} to {size['max']}, "
        + _quantiles_text(size, "d"),
    ]
    if cap is None:
        lines.append("at the cap: the store's metadata has no max_candidates")
    else:
        lines.append(
            f"at the cap of {cap['max_candidates']}: {cap['share_at_or_above']:.2%} of positions; "
            f"cut there and the label appended: {cap['share_above']:.2%}"
        )
    most = max(row["positions"] for row in size["histogram"])
    for row in size["histogram"]:
        bar = "#" * -(-BAR_WIDTH * row["positions"] // most)  # upwards: one position is seen
        lines.append(f"{row['from']:5}-{row['to']:<3} {row['positions']:>10} {bar}".rstrip())
    lines.append(f"is replay worth it? {_verdict(summary)}")
    return "\n".join(lines)


def _quantiles_text(numbers: dict[str, Any], form: str) -> str:
    return ", ".join(f"{float(q):.0%} {v:{form}}" for q, v in numbers["quantiles"].items())


#: Missed labels, shares of positions, up to which the paper's loss learned as much as full softmax,
#: and beyond which no base had learned enough of the domain (docs/evidence.md).
_FEW_MISSED, _MOST_MISSED = 0.02, 0.25
#: Mean coverage of sets that leave out nothing but rounding.
_ALL_COVERED = 1 - 1e-6
#: Mean coverage below which the sets no longer stand for the base model's distribution.
_LITTLE_COVERAGE = 0.90


def _verdict(summary: dict[str, Any]) -> str:
    """One line, whatever the numbers are, with what was seen at such numbers."""
    missed, covered = summary["share_label_appended"], summary["coverage"]["mean"]
    if missed is None:
        return "unknown: the store's metadata has no coverage and max_candidates"
    found = f"the base model missed {missed:.1%} of labels, and the sets cover {covered:.1%}"
    if missed > _MOST_MISSED or covered < _LITTLE_COVERAGE:
        return (
            f"No: {found} (bounds: {_MOST_MISSED:.0%} missed, {_LITTLE_COVERAGE:.0%} covered). "
            "Probability will leak out of the sets: use --loss full, or start from a base model "
            "that has learned the domain."
        )
    if missed > _FEW_MISSED:
        return (
            f"Probably not: {found}. Where a base of 135 M parameters missed 6.1 and 7.8 %, it "
            "learned little or nothing by the paper's loss: use --loss full."
        )
    if covered < _ALL_COVERED:
        return (
            f"Perhaps: {found}. Where a base of 135 M parameters missed 1.0 %, the paper's loss "
            "scored like --loss full, and forgot as much (docs/evidence.md): compare both."
        )
    return f"No evidence either way: {found}, so it equals --loss full."
