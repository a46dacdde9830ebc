"""The report's figure: gain against forgetting, and how far each model moved."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from megatron_replay.errors import DataError
from megatron_replay.evaluation.report import Report
from megatron_replay.evaluation.scores import domain_mean, domain_scores, value_at
from megatron_replay.files import atomic_file

FONT = 16
#: Okabe and Ito (2008): the colour-blind can tell them apart; the yellow is darkened for a white
#: page.
COLOURS = (
    "#000000", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#0072B2", "#B5A300",
)  # fmt: skip
#: Height of a label as a share of the axes: labels closer than this would overlap.
_LABEL_HEIGHT = 0.075
_FORGETTING, _NEXT_TOKEN = "general.delta_perplexity", "data.accuracy"
#: What the right side shows: title, value, factor to per cent.
_MOVEMENT = (
    ("relative L2 to the base, %", "relative_l2_percent", 1.0),
    ("mass outside the candidates, %", "candidates.outside_mass", 100.0),
)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all. A bare Figure draws without a display."""
    with atomic_file(path) as handle:
        figure.savefig(handle, format="png")


def tidy(axes: Axes, title: str) -> None:
    """Set the title and the sizes of all text, and remove the frame above and at the right."""
    axes.set_title(title, fontsize=FONT + 1)
    axes.tick_params(labelsize=FONT)
    axes.xaxis.label.set_fontsize(FONT)
    axes.yaxis.label.set_fontsize(FONT)
    axes.spines[["top", "right"]].set_visible(False)


def report_figure(report: Report) -> Figure:
    """The figure, 1600 x 700 pixels.

    Left: gain against Δ perplexity on general text, with one standard error. Right: relative L2 and
    outside mass, or the time of the parts where only the base was measured.

    Raises:
        DataError: there is no gain or no forgetting to draw.
    """
    methods = report["methods"]
    figure = Figure(figsize=(16, 7), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _draw_gain(left, methods)
    if any(method["relative_l2_percent"] > 0 for method in methods):
        _draw_movement(right, methods)
    else:
        bars = right.barh(list(report["timings"]), list(report["timings"].values()))
        right.bar_label(bars, fmt="%.1f", padding=4, fontsize=FONT - 1)
        tidy(right, "Time of the parts, seconds")
    right.invert_yaxis()
    right.margins(x=0.15)
    return figure


def _draw_gain(axes: Axes, methods: Sequence[Mapping[str, Any]]) -> None:
    base = methods[0]
    tasks, drawn = list(domain_scores(base)), _drawn(base)
    if _FORGETTING not in drawn or len(drawn) < 2:
        raise DataError(
            "no gain against forgetting to draw",
            expected="an evaluation with --general-text and --sql, --choices or --data",
        )
    points = []
    for method, colour in zip(methods, itertools.cycle(COLOURS), strict=False):
        if missing := drawn ^ _drawn(method):
            raise DataError(
                f"{method['name']} and {base['name']} were measured on different things",
                found=f"only one of them has {', '.join(sorted(missing))}",
            )
        gain = domain_mean(method) if tasks else (100 * value_at(method, _NEXT_TOKEN), None)
        x, y = value_at(method, _FORGETTING), gain[0]
        axes.errorbar(
            x, y, yerr=gain[1], fmt="o", markersize=12, capsize=5, linewidth=2, color=colour
        )
        points.append((y, x, method["name"], colour))
    axes.margins(x=0.12, y=0.12)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    _label_points(axes, points)
    title = f"{tasks[0]}, %" if tasks else "next token of held-out data, %"
    axes.set_ylabel(f"domain: {f'mean of {len(tasks)} tasks, %' if len(tasks) > 1 else title}")
    axes.set_xlabel("forgetting: Δ perplexity on general text")
    axes.grid(alpha=0.25)
    tidy(axes, "Domain against forgetting (up and left is better)")


def _drawn(method: Mapping[str, Any]) -> set[str]:
    """Those of a model's results that the left side draws."""
    paths = {path for path in (_FORGETTING, _NEXT_TOKEN) if value_at(method, path) is not None}
    return paths | set(domain_scores(method))


def _label_points(axes: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Name each point at the right of the axes, in the order of their heights.

    A column of labels with leader lines stays legible where several points nearly coincide.
    """
    bottom, top = axes.get_ylim()
    highest = 0.0
    for y, x, name, colour in sorted(points):
        highest = max((y - bottom) / (top - bottom), highest + _LABEL_HEIGHT)
        axes.annotate(
            name, xy=(x, y), xytext=(1.03, highest), textcoords="axes fraction", fontsize=FONT,
            color=[0.65 * part for part in to_rgb(colour)], va="center",  # darker, for text
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.35, "shrinkB": 8},
        )  # fmt: skip


def _draw_movement(axes: Axes, methods: Sequence[Mapping[str, Any]]) -> None:
    """Horizontal bars, two for each model, with the number at the end of its bar."""
    measured = [m for m in _MOVEMENT if any(value_at(one, m[1]) is not None for one in methods)]
    height = 0.8 / len(measured)
    for i, (label, path, scale) in enumerate(measured):
        found = [(y, value_at(method, path)) for y, method in enumerate(methods)]
        bars = axes.barh(
            [y + (i - (len(measured) - 1) / 2) * height for y, v in found if v is not None],
            [scale * v for _, v in found if v is not None], height=0.92 * height, label=label,
        )  # fmt: skip
        axes.bar_label(bars, fmt="%.2f", padding=4, fontsize=FONT - 1)
    axes.set_yticks(range(len(methods)), [method["name"] for method in methods])
    axes.set_xlabel("%")
    tidy(axes, "How far it moved (less is better)")
    axes.legend(fontsize=FONT - 1, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12))
