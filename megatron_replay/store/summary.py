"""A candidate store in numbers: sizes of the sets, coverage, missed labels, bytes.

Printed at the end of Stage 0 and by tools/inspect_store.py. The numbers show whether replay is
worth it: little coverage, many sets at the cap or many appended labels mean that the base model has
learnt little of the domain, and that a restricted loss lets probability leak out of the sets.
"""

from __future__ import annotations

from typing import Any

from megatron_replay.store.document import MAX_SET_SIZE
from megatron_replay.store.manifest import StoreDescription
from megatron_replay.store.tally import Distribution, Tally

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
#: Sizes that share a row of the histogram.
ROW_WIDTH = 20
BAR_WIDTH = 40
#: Largest --max-candidates: with the label a set has one more, and a byte must hold the size.
_MOST_CANDIDATES = MAX_SET_SIZE - 1


def summary(description: StoreDescription, counted: Tally) -> dict[str, Any]:
    """What was counted of a store as a JSON object; a function of the store alone."""
    content: dict[str, Any] = {
        "description": dict(vars(description)),
        "documents": counted.documents,
        "documents_with_positions": counted.documents_with_positions,
        "positions": counted.positions,
        "candidates": int(counted.sizes @ range(MAX_SET_SIZE + 1)),
        "bin_bytes": counted.bin_bytes,
    }
    if not counted.positions:
        return content
    coverage, tail_mass = counted.coverage(), counted.tail_mass()
    label_logprob, appended = counted.label_logprob(), counted.label_appended
    return content | {
        "bytes_per_position": counted.bin_bytes / counted.positions,
        "set_size": _set_sizes(counted),
        "coverage": _numbers(coverage) | {"min": coverage.values[0].item()},
        "tail_mass": _numbers(tail_mass) | {"max": tail_mass.values[-1].item()},
        "cap": _cap(counted, description.selection.get("max_candidates")),
        "label_logprob": _numbers(label_logprob) | {"min": label_logprob.values[0].item()},
        "share_label_appended": None if appended is None else appended / counted.positions,
    }


def _numbers(distribution: Distribution) -> dict[str, Any]:
    return {
        "mean": distribution.mean(),
        "quantiles": {f"{q:g}": distribution.quantile(q) for q in QUANTILES},
    }


def _set_sizes(counted: Tally) -> dict[str, Any]:
    sizes = counted.set_sizes()
    least, most = int(sizes.values[0]), int(sizes.values[-1])
    return _numbers(sizes) | {
        "median": sizes.quantile(0.5),
        "min": least,
        "max": most,
        "histogram": [
            {
                "from": low,
                "to": min(low + ROW_WIDTH - 1, MAX_SET_SIZE),
                "positions": int(counted.sizes[low : low + ROW_WIDTH].sum()),
            }
            for low in range(1, most + 1, ROW_WIDTH)
        ],
    }


def _cap(counted: Tally, max_candidates: object) -> dict[str, Any] | None:
    """Shares of positions at the cap and above it, where the metadata has the cap."""
    if type(max_candidates) is not int or max_candidates < 1:
        return None
    return {
        "max_candidates": max_candidates,
        "share_at_or_above": int(counted.sizes[max_candidates:].sum()) / counted.positions,
        # One more than the cap: the set was cut there and its label appended.
        "share_above": int(counted.sizes[max_candidates + 1 :].sum()) / counted.positions,
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
    lines += [
        f"bytes per position: {summary['bytes_per_position']:.1f}",
        f"label log-probability: mean {logprob['mean']:.4f}, least {logprob['min']:.4f}, "
        + _quantiles_text(logprob, ".4f"),
        _appended_line(summary["share_label_appended"]),
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
    lines += [f"advice: {line}" for line in _advice(summary)]
    return "\n".join(lines)


def _quantiles_text(numbers: dict[str, Any], form: str) -> str:
    return ", ".join(f"{float(q):.0%} {v:{form}}" for q, v in numbers["quantiles"].items())


def _appended_line(share: float | None) -> str:
    if share is None:
        return "label appended: the store's metadata has no coverage and max_candidates"
    return f"label missed by the base model, so appended to its set: {share:.2%} of positions"


#: Shares of positions beyond which the paper's loss has been seen to leak (docs/log.md). None is so
#: low as to promise that it does not: 0.2 % missed at a mean coverage of 0.99 has cost 47 points of
#: accuracy (docs/evidence.md).
_MANY_APPENDED, _MANY_AT_CAP = 0.10, 0.20
#: Mean coverage of sets that leave out nothing but rounding.
_ALL_COVERED = 1 - 1e-6
#: Mean coverage below which the sets no longer stand for the base model's distribution.
_LITTLE_COVERAGE = 0.90
_RECIPE = "--candidate-scope document --tail ghost --kl-weight 0.5 (needs Stage 0 --store-logits)"


def _verdict(summary: dict[str, Any]) -> str:
    """One line, whatever the numbers are, with the bounds it goes by."""
    missed, covered = summary["share_label_appended"], summary["coverage"]["mean"]
    if missed is None:
        return "unknown: the store's metadata has no coverage and max_candidates"
    found = f"the base model missed {missed:.1%} of labels, and the sets cover {covered:.1%}"
    if missed > _MANY_APPENDED or covered < _LITTLE_COVERAGE:
        return (
            f"Not with the paper's loss: {found} (bounds: {_MANY_APPENDED:.0%} missed, "
            f"{_LITTLE_COVERAGE:.0%} covered). The base model gives these answers too little mass."
        )
    if covered < _ALL_COVERED:
        return (
            f"Perhaps, not with the paper's loss: {found}. With 0.2 % to 0.5 % missed it has "
            "cost 6 to 47 points of accuracy (docs/evidence.md): sweep the learning rate of "
            f"--loss full --optimizer adamw first, then compare {_RECIPE}."
        )
    return f"No evidence either way: {found}, so it equals --loss full."


def _advice(summary: dict[str, Any]) -> list[str]:
    """The options that help where the numbers show that restricting the loss will hurt."""
    advice, cap = [], summary["cap"]
    at_cap = cap is not None and cap["share_at_or_above"] > _MANY_AT_CAP
    hopeless = summary["coverage"]["mean"] < _LITTLE_COVERAGE
    if (summary["share_label_appended"] or 0) > _MANY_APPENDED or hopeless:
        advice.append(
            f"probability will leak out of the sets: use --loss full, or {_RECIPE}, in Stage 1"
            + ("" if at_cap else "; or a higher --coverage in Stage 0")
        )
    if at_cap and not hopeless:
        room = cap["max_candidates"] < _MOST_CANDIDATES
        advice.append(
            "many sets are cut at the cap, so they cover less than --coverage: "
            + (f"raise --max-candidates (at most {_MOST_CANDIDATES}), or " if room else "")
            + "use --candidate-scope document --tail ghost in Stage 1"
        )
    return advice
