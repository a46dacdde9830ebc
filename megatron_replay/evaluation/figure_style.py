"""How figures look: a colour and a marker for each method, sizes that are legible at half."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from megatron_replay.evaluation.comparison import Measure, Spread, spread
from megatron_replay.evaluation.rows import Row
from megatron_replay.files import atomic_file

FONT = 16
#: Okabe and Ito (2008), its yellow darkened for a white page, and four of Paul Tol's muted ones:
#: told apart by the colour-blind. Neighbours differ in lightness too.
COLOURS = (
    "#000000", "#56B4E9", "#0072B2", "#CC79A7", "#E69F00", "#009E73", "#999999", "#882255",
    "#D55E00", "#44AA99", "#B5A300", "#332288", "#999933",
)  # fmt: skip
MARKERS = "osD^vP<X*>hpd"
HATCHES = ("", "//", "", "\\\\", "", "..", "", "xx", "", "--", "", "oo", "++")


@dataclass(frozen=True)
class Style:
    """Of one method, the same in every panel of a figure."""

    colour: str
    marker: str
    hatch: str


def styles(names: Iterable[str]) -> dict[str, Style]:
    """One for each name, in their order; after thirteen, colours come again with other markers."""
    n = len(COLOURS)
    return {
        name: Style(COLOURS[i % n], MARKERS[(i + 5 * (i // n)) % n], HATCHES[i % n])
        for i, name in enumerate(dict.fromkeys(names))
    }


def darker(colour: str) -> tuple[float, ...]:
    """Light colours are good for markers and too pale for text."""
    return tuple(0.65 * part for part in to_rgb(colour))


def new_figure(width: float, height: float) -> Figure:
    """A bare Figure draws with Agg: no display, no global state. 100 pixels an inch."""
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with atomic_file(path) as handle:
        figure.savefig(handle, format="png")


def tidy(axes: Axes, title: str) -> None:
    """Title, sizes of text, no frame above and at the right."""
    axes.set_title(title, fontsize=FONT + 1)
    axes.tick_params(labelsize=FONT)
    axes.xaxis.label.set_fontsize(FONT)
    axes.yaxis.label.set_fontsize(FONT)
    axes.spines[["top", "right"]].set_visible(False)


def over_seeds(rows: Iterable[Row], measure: Measure) -> Spread | None:
    """Mean and deviation of what is drawn; None where that is not finite."""
    value = spread([measure(row) for row in rows])
    return value if value and math.isfinite(value.mean) else None


def deviation(value: Spread | None) -> float:
    """The length of an error bar: none for one seed."""
    return value.std or 0.0 if value else 0.0


def grouped_bars(
    axes: Axes,
    groups: Sequence[str],
    series: Mapping[str, Sequence[Spread | None]],
    style: dict[str, Style],
) -> None:
    """A bar with its deviation for each series in each group; what is missing leaves its room."""
    width = 0.84 / max(1, len(series))
    for i, (name, values) in enumerate(series.items()):
        there = [(x, v) for x, v in enumerate(values) if v is not None]
        axes.bar(
            [x + (i - (len(series) - 1) / 2) * width for x, _ in there],
            [v.mean for _, v in there],
            width=0.92 * width,
            yerr=[deviation(v) for _, v in there],
            label=name,
            color=style[name].colour,
            hatch=style[name].hatch,
            edgecolor="white",
            linewidth=0.5,
            error_kw={"elinewidth": 1.5, "capsize": 3, "ecolor": "#555555"},
        )
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)


def score_limits(limits: tuple[float, float]) -> tuple[float, float]:
    """Limits of an axis of scores: hardly below 0, and never a fraction of a point magnified."""
    high = max(limits[1], 1.0)
    return max(limits[0], -0.03 * high), high
