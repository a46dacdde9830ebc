"""What a candidate store holds, in numbers: sizes of the sets, coverage, missed golds, bytes.

Printed at the end of Stage 0 and by tools/inspect_store.py. It tells whether replay is worth it:
little coverage, many sets at the cap or many appended golds mean that the base model knows little
of the domain, and that restricting the loss to its candidates will let mass leak out of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_replay.progress import Progress
from megatron_replay.store.document import DocumentCandidates
from megatron_replay.store.reader import CandidateReader

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
HISTOGRAM_ROWS = 13  # 256 sizes in rows of 20
BAR_WIDTH = 40


class _Tally:
    """What a pass over the documents adds up."""

    def __init__(self) -> None:
        self.positions_of_size = np.zeros(257, np.int64)
        self.documents_with_positions = 0
        self._sizes: list[npt.NDArray[np.int64]] = []
        self._tail_masses: list[npt.NDArray[np.float32]] = []
        self._gold_logprobs: list[npt.NDArray[np.float32]] = []

    def add(self, document: DocumentCandidates) -> None:
        sizes = np.diff(document.offsets)
        self.positions_of_size += np.bincount(sizes, minlength=257)
        self._sizes.append(sizes)
        self.documents_with_positions += len(document.positions) > 0
        self._tail_masses.append(document.tail_mass)
        self._gold_logprobs.append(document.gold_logprob)

    @property
    def num_positions(self) -> int:
        return int(self.positions_of_size.sum())

    def set_sizes(self) -> dict[str, Any]:
        """Mean, extremes, exact quantiles and histogram of the sizes of the sets."""
        counts, sizes = self.positions_of_size, np.arange(257)
        present = np.flatnonzero(counts)
        below = np.cumsum(counts) / self.num_positions
        width = -(-256 // HISTOGRAM_ROWS)
        return {
            "mean": float(counts @ sizes / self.num_positions),
            "median": int(np.searchsorted(below, 0.5)),
            "min": int(present[0]),
            "max": int(present[-1]),
            "quantiles": {f"{q:g}": int(np.searchsorted(below, q)) for q in QUANTILES},
            "histogram": [
                {
                    "from": low,
                    "to": min(low + width - 1, 256),
                    "positions": int(counts[low : low + width].sum()),
                }
                for low in range(1, int(present[-1]) + 1, width)
            ],
        }

    def coverage(self) -> dict[str, Any]:
        """Mass of the base model inside the sets."""
        inside_P = 1 - np.concatenate(self._tail_masses).astype(np.float64)
        return {
            "mean": float(inside_P.mean()),
            "min": float(inside_P.min()),
            "quantiles": {f"{q:g}": float(np.quantile(inside_P, q)) for q in QUANTILES},
        }

    def cap(self, max_candidates: object) -> dict[str, Any] | None:
        """Shares of positions at the cap and above it, when the store tells the cap."""
        if type(max_candidates) is not int or max_candidates < 1:
            return None
        counts = self.positions_of_size
        return {
            "max_candidates": max_candidates,
            "share_at_or_above": float(counts[max_candidates:].sum() / self.num_positions),
            # One more than the cap: the set was cut there and its gold appended.
            "share_above": float(counts[max_candidates + 1 :].sum() / self.num_positions),
        }

    def gold_appended(self, selection: dict[str, Any]) -> float | None:
        """Share of positions whose gold was not among the first K, so that it was appended.

        Not stored, but it follows: the first K of a set reach the coverage, or there are
        max_candidates of them. Had the gold been one of them, the set without it would not reach
        the coverage, for no candidate has less than the least needed. Exact up to fp16 rounding of
        the tail mass.
        """
        coverage, most = selection.get("coverage"), selection.get("max_candidates")
        if not isinstance(coverage, float) or not isinstance(most, int):
            return None
        sizes_P, tail_P = np.concatenate(self._sizes), np.concatenate(self._tail_masses)
        gold_P = np.exp(np.concatenate(self._gold_logprobs).astype(np.float64))
        others_P = 1 - tail_P.astype(np.float64) - gold_P
        return float(((sizes_P > most) | (others_P >= coverage)).mean())

    def mean_gold_logprob(self) -> float:
        """Mean of log p(gold) under the base model."""
        return float(np.concatenate(self._gold_logprobs).mean(dtype=np.float64))


def summarize(reader: CandidateReader) -> dict[str, Any]:
    """Read every document and describe the store as a JSON object."""
    tally = _Tally()
    with Progress("read", len(reader), "documents") as progress:
        for document in reader:
            tally.add(document)
            progress.advance()
    sizes = tally.positions_of_size @ np.arange(257)
    bin_bytes = sum(path.stat().st_size for path in reader.directory.glob("shard-*.bin"))
    summary: dict[str, Any] = {
        "description": vars(reader.description),
        "documents": len(reader),
        "documents_with_positions": tally.documents_with_positions,
        "positions": tally.num_positions,
        "candidates": int(sizes),
        "bin_bytes": bin_bytes,
    }
    if tally.num_positions:
        summary |= {
            "bytes_per_position": bin_bytes / tally.num_positions,
            "set_size": tally.set_sizes(),
            "coverage": tally.coverage(),
            "cap": tally.cap(reader.description.selection.get("max_candidates")),
            "mean_gold_logprob": tally.mean_gold_logprob(),
            "share_gold_appended": tally.gold_appended(reader.description.selection),
        }
    return summary


def summary_text(summary: dict[str, Any]) -> str:
    """``summarize``'s object for a reader at a terminal."""
    lines = [f"{name}: {value}" for name, value in summary["description"].items()]
    lines += [
        f"documents: {summary['documents']}, {summary['documents_with_positions']} with positions",
        f"positions: {summary['positions']}",
        f"candidates: {summary['candidates']}",
    ]
    if not summary["positions"]:
        return "\n".join(lines)
    size, coverage, cap = summary["set_size"], summary["coverage"], summary["cap"]
    lines += [
        f"bytes per position: {summary['bytes_per_position']:.1f}",
        f"mean gold log-probability: {summary['mean_gold_logprob']:.4f}",
        _appended_line(summary["share_gold_appended"]),
        f"coverage: mean {coverage['mean']:.4f}, least {coverage['min']:.4f}, "
        + ", ".join(f"{float(q):.0%} {v:.4f}" for q, v in coverage["quantiles"].items()),
        f"|S|: mean {size['mean']:.1f}, median {size['median']}, {size['min']} to {size['max']}, "
        + ", ".join(f"{float(q):.0%} {v}" for q, v in size["quantiles"].items()),
    ]
    if cap is None:
        lines.append("at the cap: the store does not tell max_candidates")
    else:
        lines.append(
            f"at the cap of {cap['max_candidates']}: {cap['share_at_or_above']:.2%} of positions; "
            f"cut there and the gold appended: {cap['share_above']:.2%}"
        )
    lines += [f"advice: {line}" for line in _advice(summary)]
    most = max(row["positions"] for row in size["histogram"])
    for row in size["histogram"]:
        bar = "#" * -(-BAR_WIDTH * row["positions"] // most)  # upwards: one position is seen
        lines.append(f"{row['from']:5}-{row['to']:<3} {row['positions']:>10} {bar}".rstrip())
    return "\n".join(lines)


def _appended_line(share: float | None) -> str:
    if share is None:
        return "gold appended: the store does not tell coverage and max_candidates"
    return f"gold appended to its set: {share:.2%} of positions"


#: Beyond these shares of positions, the paper's loss has been seen to leak (docs/log.md).
_MANY_APPENDED, _MANY_AT_CAP = 0.10, 0.20


def _advice(summary: dict[str, Any]) -> list[str]:
    """What the numbers say of whether restricting the loss will hurt."""
    advice = []
    if (summary["share_gold_appended"] or 0) > _MANY_APPENDED:
        advice.append(
            "the base model misses many golds: use --candidate-scope document and --tail ghost, "
            "or --loss full"
        )
    if summary["cap"] and summary["cap"]["share_at_or_above"] > _MANY_AT_CAP:
        advice.append(
            "many sets are cut at the cap, so coverage is below --coverage: raise --max-candidates"
        )
    return advice
