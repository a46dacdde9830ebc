"""The study's tables: every method at every rate, and forgetting at equal gain."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from examples.replicate import curves
from examples.replicate.curves import MEASURES, Values, curve, draw, interval
from examples.replicate.plan import FULL
from examples.replicate.results import Row
from megatron_replay.errors import DataError
from megatron_replay.evaluation.results import BASE

Table = list[dict[str, str]]


def base_of(rows: Iterable[Row], domain: str) -> Row:
    """The base's row on a domain.

    Raises:
        DataError: there is none.
    """
    for row in rows:
        if (row.method, row.domain) == (BASE, domain):
            return row
    raise DataError("no row of the base", where=f"domain {domain}")


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple[object, ...], list[Row]]:
    """Rows by the values of these fields, in the order of their first rows."""
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(getattr(row, name) for name in names), []).append(row)
    return found


def runs(rows: Sequence[Row], domain: str) -> Table:
    """A line for each method and rate: means over seeds; of score and retention 95 % intervals."""
    base = base_of(rows, domain)
    own = sorted((row for row in rows if row.domain == domain), key=lambda row: row.lr)
    order = list(dict.fromkeys(row.method for row in rows))
    own.sort(key=lambda row: (row.method != BASE, order.index(row.method)))
    return [
        {"method": str(method), "rate": f"{lr:g}" if lr else "–", **_measures(seeds, base)}
        for (method, lr), seeds in grouped(own, "method", "lr").items()
    ]


def _measures(seeds: Sequence[Row], base: Row) -> dict[str, str]:
    values_BC = curve(seeds, base, draw(base))[:, 0]
    score_B, change_B, lost_B = values_BC.T
    return {
        "score, %": _with_interval(score_B),
        "ΔPPL": f"{change_B[0]:+.2f}",
        "retention, %": _with_interval(100 - lost_B),
        **{
            f"{name}, %": _mean(".1f", [100 * row.general[name].mean() for row in seeds])
            for name in base.general
        },
        "outside mass, %": _mean(
            ".2f", [list(row.outside.values())[-1] for row in seeds if row.outside]
        ),
        "relative L2, %": _mean(".2f", [row.relative_l2_percent for row in seeds]),
        "gradient-norm CV": _mean(".2f", [row.gradient_norm_cv for row in seeds]),
        "Stage 1, s": _mean(".0f", [row.seconds for row in seeds]),
        "seeds": str(len(seeds)),
    }


def _with_interval(values_B: Values) -> str:
    """What was measured, and the 95 % interval of the draws after it."""
    low, high = np.percentile(values_B[1:], [2.5, 97.5])
    return f"{values_B[0]:.1f} [{low:.1f}, {high:.1f}]"


def _mean(form: str, values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return format(float(np.mean(known)), form) if known else "–"


def equal_gain(rows: Sequence[Row]) -> Table:
    """Each method's curve less full softmax's, at scores that both reach."""
    table = []
    for domain in dict.fromkeys(row.domain for row in rows):
        base = base_of(rows, domain)
        own = [row for row in rows if row.domain == domain and row.method != BASE]
        reference = [row for row in own if row.method == FULL]
        for (method,), its in grouped(own, "method").items():
            if method == FULL or len({row.lr for row in its}) < 2 or not reference:
                continue
            found = list(curves.compare(its, reference, base))
            table += [
                {"domain": domain, "method": str(method), "score, %": f"{score:.1f}"}
                | {name: _difference(values) for name, values in differences.items()}
                for score, differences in found
            ] or [
                {"domain": domain, "method": str(method), "score, %": "none above the base's that "
                 "both reach"} | dict.fromkeys(MEASURES, "–")
            ]  # fmt: skip
    return table


def _difference(values: Values) -> str:
    ends = interval(values[1:])
    shown = "too rarely reached" if ends is None else f"{ends[0]:+.2f}, {ends[1]:+.2f}"
    return f"{values[0]:+.2f} [{shown}]"


def markdown(table: Table) -> str:
    """A Markdown table."""
    lines = [list(table[0]), ["---"] * len(table[0]), *(list(line.values()) for line in table)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
