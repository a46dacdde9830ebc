"""The study's figures: forgetting against gain, retention, and the mass outside during training."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, SymmetricalLogLocator
from PIL import Image

from examples.replicate.curves import curve, draw
from examples.replicate.plan import CLAIMED, FULL, LR, PAPER
from examples.replicate.results import Row
from examples.replicate.tables import base_of, grouped
from megatron_replay.evaluation.results import BASE
from megatron_replay.files import atomic_file

FONT = 14
#: Okabe and Ito (2008), its yellow darkened for a white page, and four of Paul Tol's muted colours,
#: which the colour-blind can tell apart.
COLOURS = (
    "#000000", "#56B4E9", "#D55E00", "#CC79A7", "#E69F00", "#009E73", "#999999", "#882255",
    "#0072B2", "#44AA99", "#B5A300", "#332288", "#999933",
)  # fmt: skip
MARKERS = "osD^vP<X*>hpd"
#: ΔPPL has a linear scale up to this, and a logarithmic one beyond.
LINEAR_TO = 1.0
Look = dict[str, tuple[str, str]]


def draw_figures(rows: Sequence[Row], output: Path) -> list[str]:
    """Draw every figure, a panel for each domain, without the ablations; returns their names."""
    rows = [row for row in rows if not row.method.startswith(f"{PAPER}, ")]
    domains, look = list(dict.fromkeys(row.domain for row in rows)), _look(rows)
    for name, (title, panel) in FIGURES.items():
        figure = Figure(figsize=(7 * len(domains), 8.5), dpi=80, layout="constrained")
        figure.suptitle(title, fontsize=FONT + 2)
        legend: dict[str, object] = {}
        panels = figure.subplots(1, len(domains), squeeze=False)[0]
        for axes, domain in zip(panels, domains, strict=True):
            panel(axes, [row for row in rows if row.domain == domain], look)
            axes.set_title(domain, fontsize=FONT)
            axes.tick_params(labelsize=FONT - 1)
            axes.spines[["top", "right"]].set_visible(False)
            legend |= {label: handle for handle, label in zip(
                *axes.get_legend_handles_labels(), strict=True)}  # fmt: skip
        figure.legend(legend.values(), legend.keys(), loc="outside lower center",
                      ncols=min(4, 2 * len(domains)), fontsize=FONT - 2, frameon=False)  # fmt: skip
        drawing = io.BytesIO()
        figure.savefig(drawing, format="png")
        with atomic_file(output / name) as handle:  # fewer colours would join two of ours
            Image.open(drawing).convert("RGB").quantize(256).save(handle, "png", optimize=True)
    return list(FIGURES)


def _look(rows: Sequence[Row]) -> Look:
    """Colour and marker of each method, the same in every panel."""
    names = sorted({row.method for row in rows} - {BASE}, key=lambda name: (name != FULL, name))
    return {
        name: (COLOURS[i % 13], MARKERS[(i + 5 * (i // 13)) % 13]) for i, name in enumerate(names)
    }


def forgetting(axes: Axes, rows: Sequence[Row], look: Look) -> None:
    """ΔPPL against the score: a curve over learning rates for each method; one rate is a point."""
    base, lowest = base_of(rows, rows[0].domain), 0.0
    for (method,), own in grouped(rows, "method").items():
        if method == BASE:
            continue
        points = curve(own, base, draw(base, 0))[0]
        lowest = min(lowest, float(points[:, 1].min()))
        colour, marker = look[str(method)]
        axes.plot(points[:, 0], points[:, 1], color=colour, marker=marker, markersize=8,
                  linewidth=3 if method == FULL else 1.6, label=str(method))  # fmt: skip
    axes.axvline(100 * base.hits.mean(), color="#bbbbbb", linestyle=":")
    axes.set_yscale("symlog", linthresh=LINEAR_TO)
    axes.set_ylim(bottom=lowest - 0.2)
    axes.yaxis.set_major_locator(
        SymmetricalLogLocator(base=10, linthresh=LINEAR_TO, subs=(1, 2, 5))
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("domain score, %  (dotted: the base)", fontsize=FONT)
    axes.set_ylabel("ΔPPL of general text", fontsize=FONT)
    axes.grid(alpha=0.25)


def retention(axes: Axes, rows: Sequence[Row], look: Look) -> None:
    """Bars: the retention of each method at the rate that all have."""
    base = base_of(rows, rows[0].domain)
    own = [row for row in rows if row.lr == LR]
    for (method,), seeds in grouped(own, "method").items():
        kept = 100 - curve(seeds, base, draw(base, 0))[0, 0, 2]
        axes.barh(str(method), kept, height=0.5, color=look[str(method)][0])
    axes.axvline(100, color="#bbbbbb", linestyle=":")
    axes.invert_yaxis()
    axes.set_xlabel(f"retention at the rate {LR:g}, %", fontsize=FONT)


def outside(axes: Axes, rows: Sequence[Row], look: Look) -> None:
    """The probability outside the candidate sets during training, at the rate that all have."""
    for row in rows:
        if row.method in (FULL, *CLAIMED) and (row.lr, row.seed) == (LR, 0):
            colour, marker = look[row.method]
            axes.plot(list(row.outside), list(row.outside.values()), color=colour, marker=marker,
                      label=row.method)  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step", fontsize=FONT)
    axes.set_ylabel("probability outside the candidate sets, %", fontsize=FONT)
    axes.grid(alpha=0.25)


FIGURES: dict[str, tuple[str, Callable[[Axes, Sequence[Row], Look], None]]] = {
    "forgetting.png": ("Forgetting against gain: right and down is better", forgetting),
    "retention.png": ("General abilities that are kept", retention),
    "outside.png": ("Probability outside the candidate sets", outside),
}
