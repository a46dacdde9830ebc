"""The study's figures: forgetting against gain, the methods, the ablations."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL import Image

from examples.replicate.tables import ABLATIONS, GROUP, in_table
from megatron_replay.files import atomic_file

FONT = 16
#: Okabe and Ito (2008), its yellow darkened for a white page, and four of Paul Tol's muted colours,
#: which the colour-blind can tell apart.
COLOURS = (
    "#000000", "#56B4E9", "#0072B2", "#CC79A7", "#E69F00", "#009E73", "#999999", "#882255",
    "#D55E00", "#44AA99", "#B5A300", "#332288", "#999933",
)  # fmt: skip
MARKERS = "osD^vP<X*>hpd"
#: Where the labels of the first, second, ... curve are, in points from its markers.
_LABELS = ((9, -16, "left"), (-9, 7, "right"), (-9, -16, "right"), (9, 7, "left"))
#: Forgetting has a logarithmic scale where it spans more than this factor.
_LOG_FROM = 10.0
_MEASURES = {
    "forgetting": "ΔPPL", "loss_std": "loss std", "gradient_norm_cv": "gradient-norm CV",
    "step_seconds": "seconds a step", "all_seconds": "s, with Stage 0",
}  # fmt: skip


def draw_figures(rows: pd.DataFrame, output: Path) -> list[str]:
    """Draw every figure that has at least two methods, or runs, to compare; returns the names."""
    figures: dict[str, Figure | None] = {
        f"forgetting-{size}.png": forgetting(own) for size, own in rows.groupby("size", sort=False)
    }
    for group, own in rows.groupby(GROUP, sort=False):
        where = "-".join(group).replace(", ", "-")
        figures[f"methods-{where}.png"] = methods(own)
        figures[f"ablations-{where}.png"] = ablations(own)
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    for name, figure in drawn.items():
        drawing = io.BytesIO()
        figure.savefig(drawing, format="png")
        with atomic_file(output / name) as handle:  # 64 colours: a third of the bytes
            Image.open(drawing).convert("RGB").quantize(64).save(handle, "png", optimize=True)
    return list(drawn)


def _figure(width: float, height: float, title: str) -> Figure:
    """A bare Figure draws without a display and without global state; sizes are in inches."""
    figure = Figure(figsize=(width, height), dpi=80, layout="constrained")
    figure.suptitle(f"{title}: mean ± standard deviation over seeds", fontsize=FONT + 2)
    return figure


def _tidy(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=FONT + 1)
    axes.tick_params(labelsize=FONT)
    axes.xaxis.label.set_fontsize(FONT)
    axes.yaxis.label.set_fontsize(FONT)
    axes.spines[["top", "right"]].set_visible(False)


def _where(rows: pd.DataFrame) -> str:
    return ", ".join(rows[GROUP].iloc[0])


def forgetting(rows: pd.DataFrame) -> Figure | None:
    """Forgetting against gain, a panel for each base, a curve over learning rates for each method.

    None where no method was run at two learning rates.
    """
    swept = in_table(rows, "sweep")
    swept = swept[(swept.method != "Base") & swept.domain_mean.notna()]
    points = swept.groupby(["base", "method", "lr"], sort=False, observed=True)[
        ["domain_mean", "forgetting"]
    ].agg(["mean", "std"])
    rates = points.groupby(level=["base", "method"], sort=False, observed=True).size()
    panels = [base for base, counts in rates.groupby(level="base", sort=False) if max(counts) > 1]
    if not panels:
        return None
    by_rates = rates.groupby(level="method", observed=True).max()
    by_rates = by_rates.sort_values(ascending=False, kind="stable")
    look = {  # after thirteen methods, colours come again with other markers
        name: (COLOURS[i % 13], MARKERS[(i + 5 * (i // 13)) % 13])
        for i, name in enumerate(by_rates.index)
    }
    columns, high = min(2, len(panels)), -(-len(panels) // 2)
    figure = _figure(10 * columns, 7.5 * high + 1.6, "Forgetting against gain")
    grid = figure.subplots(high, columns, squeeze=False).ravel()
    for axes, base in zip(grid, panels, strict=False):
        _draw_curves(axes, points.loc[base], look)
        _tidy(axes, base)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    found = {
        label: handle
        for axes in grid[: len(panels)]
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        found.values(), found.keys(), loc="outside lower center", ncols=2 * columns, fontsize=FONT,
        frameon=False, title="right and down is better; labels: least and largest learning rate",
        title_fontsize=FONT,
    )  # fmt: skip
    return figure


def _draw_curves(axes: Axes, points: pd.DataFrame, look: dict[str, tuple[str, str]]) -> None:
    for i, (name, own) in enumerate(points.groupby(level="method", sort=False, observed=True)):
        own = own.droplevel("method").sort_index()
        x, y = own["domain_mean"], own["forgetting"]
        (colour, marker), is_curve = look[name], len(own) > 1
        axes.errorbar(
            x["mean"], y["mean"], xerr=x["std"].fillna(0), yerr=y["std"].fillna(0), label=name,
            color=colour, marker=marker, markersize=11, linewidth=2.2 if is_curve else 0,
            elinewidth=1.2, capsize=3, markeredgewidth=1.8,
            markerfacecolor=colour if is_curve else "white",
        )  # fmt: skip
        right, up, alignment = _LABELS[i % len(_LABELS)]
        for end in (0, -1) if is_curve else ():
            label = f"{own.index[end]:.1e}".replace(".0e", "e").replace("e-0", "e-")
            axes.annotate(
                label, (x["mean"].iloc[end], y["mean"].iloc[end]), xytext=(right, up),
                ha=alignment, textcoords="offset points", fontsize=FONT - 3, color=colour,
                path_effects=[withStroke(linewidth=3, foreground="white")], zorder=4,
            )  # fmt: skip
    y = points["forgetting"]["mean"]
    if y.min() > 0 and y.max() > _LOG_FROM * y.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    # Never a fraction of a point magnified to the whole axis.
    high = max(axes.get_xlim()[1], 1.0)
    axes.set_xlim(max(axes.get_xlim()[0], -0.03 * high), high)
    axes.set_xlabel("domain score, mean, %")
    axes.set_ylabel(f"ΔPPL on general text{', log scale' if axes.get_yscale() == 'log' else ''}")
    axes.grid(alpha=0.25)


def methods(rows: pd.DataFrame) -> Figure | None:
    """A panel of bars for each measure: scores, forgetting, steadiness and time of every method."""
    own = in_table(rows, "methods")
    tasks = [name for name in own if name.startswith(("domain/", "general/"))]
    wanted = [name for name in (*tasks, *_MEASURES) if own[name].notna().any()]
    if own.method.nunique() < 3:
        return None
    seeds = own.groupby("method", observed=True)[wanted]
    mean, std = seeds.mean(), seeds.std().fillna(0)
    columns = -(-len(wanted) // 2)
    figure = _figure(3.2 * columns + 3.5, 2 * (1.4 + 0.4 * len(mean)), _where(own))
    panels = figure.subplots(2, columns, sharey=True).ravel()
    for axes, name in zip(panels, wanted, strict=False):
        axes.barh(mean.index, mean[name], xerr=std[name], color=COLOURS[1], capsize=3)
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=3)
        _tidy(axes, _MEASURES.get(name) or f"{name.partition('/')[2]}, %")
    for axes in panels[len(wanted) :]:
        axes.set_visible(False)
    panels[0].invert_yaxis()
    return figure


def ablations(rows: pd.DataFrame) -> Figure | None:
    """A panel for each ablation: bars of the domain mean, points of forgetting."""
    found = {table: in_table(rows, table) for table in ABLATIONS}
    found = {table: own for table, own in found.items() if own.variant.nunique() > 1}
    if not found:
        return None
    figure = _figure(8 * len(found), 7, _where(rows))
    for axes, (table, own) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(),
                                  strict=True):  # fmt: skip
        number = pd.to_numeric(own.variant, errors="coerce")
        own = own.assign(number=number).sort_values("number")
        seeds = own.groupby("variant", sort=False)[["domain_mean", "forgetting"]]
        mean, std = seeds.mean(), seeds.std().fillna(0)
        axes.bar(mean.index, mean.domain_mean, yerr=std.domain_mean, color=COLOURS[1], capsize=4)
        axes.set_ylabel("domain mean, %  (bars)")
        right = axes.twinx()
        right.errorbar(mean.index, mean.forgetting, yerr=std.forgetting, fmt="D", color="black",
                       markersize=11, markerfacecolor="white", capsize=4)  # fmt: skip
        right.set_ylabel("ΔPPL  (points)", fontsize=FONT)
        right.set_ylim(bottom=0)
        right.tick_params(labelsize=FONT)
        _tidy(axes, table)
    return figure
