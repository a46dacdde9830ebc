"""Forgetting against gain: a curve a method over its learning rates, a panel a base."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from megatron_replay.evaluation import scores
from megatron_replay.evaluation.comparison import Measure
from megatron_replay.evaluation.figure_style import (
    FONT,
    Style,
    darker,
    deviation,
    new_figure,
    over_seeds,
    save,
    score_limits,
    styles,
    tidy,
)
from megatron_replay.evaluation.paper_tables import sweeps
from megatron_replay.evaluation.rows import Row
from megatron_replay.evaluation.tables import Group, groups_of

#: ΔPPL is drawn to a logarithmic scale where it spans more than this.
_LOG_FROM = 10.0
#: Where the labels of the first, second, … curve stand, in points from its markers: curves that
#: nearly coincide stay legible.
_LABELS = ((9, -16, "left"), (-9, 7, "right"), (-9, -16, "right"), (9, 7, "left"))
Place = tuple[float, float, float, float, float]


def draw_pareto(rows: Sequence[Row], size: str, path: Path) -> bool:
    """Draw one size's panels; False where no method was run at two learning rates."""
    domain = scores.domain_mean(rows)
    every = {group: _curves(rows, domain, group) for group in groups_of(rows)}
    every = {group: own for group, own in every.items() if any(len(p) > 1 for p in own.values())}
    curves = {group: own for group, own in every.items() if group[1] == size}
    if not curves:
        return False
    style = _styles(every.values())
    names = [name for name in style if any(name in own for own in curves.values())]
    columns = min(2, len(curves))
    lines = -(-len(curves) // columns)
    legend = -(-len(names) // 4)
    figure = new_figure(10 * columns, 7.5 * lines + 0.4 * legend)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, (group, own) in zip(panels, curves.items(), strict=False):
        _draw(axes, own, style)
        tidy(axes, ", ".join(part for part in group if part) or "sweep of learning rates")
    for axes in panels[len(curves) :]:
        axes.set_visible(False)
    found: dict[str, Any] = {}
    for axes in panels[: len(curves)]:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(
        [found[name] for name in names], names, loc="outside lower center",
        ncols=4 if columns > 1 else 2, fontsize=FONT, frameon=False,
    )  # fmt: skip
    figure.suptitle(
        "Forgetting against gain (right and down is better)\n"
        "mean ± standard deviation over seeds; labels: least and largest learning rate",
        fontsize=FONT + 1,
    )
    save(figure, path)
    return True


def _styles(every: Iterable[dict[str, list[Place]]]) -> dict[str, Style]:
    """One look a method in every figure; those with a curve have the first colours."""
    points = [(name, len(found)) for own in every for name, found in own.items()]
    swept = {name for name, count in points if count > 1}
    return styles(sorted(dict(points), key=lambda name: name not in swept))


def _curves(rows: Sequence[Row], domain: Measure, group: Group) -> dict[str, list[Place]]:
    """Method → (learning rate, score, its deviation, ΔPPL, its deviation), by learning rate."""
    found = {name: _points(own, domain) for name, own in sweeps(rows, group).items()}
    return {name: points for name, points in found.items() if points}


def _points(rows: Sequence[Row], domain: Measure) -> list[Place]:
    points = []
    for lr in sorted({row.lr or 0.0 for row in rows}):
        own = [row for row in rows if row.lr == lr]
        x, y = over_seeds(own, domain), over_seeds(own, scores.FORGETTING.measure)
        if x and y:
            points.append((lr, x.mean, deviation(x), y.mean, deviation(y)))
    return points


def _draw(axes: Axes, curves: dict[str, list[Place]], style: dict[str, Style]) -> None:
    for i, (name, points) in enumerate(curves.items()):
        right, up, alignment = _LABELS[i % len(_LABELS)]
        look, alone = style[name], len(points) == 1
        lrs, x, x_error, y, y_error = zip(*points, strict=True)
        axes.errorbar(
            x, y, xerr=x_error, yerr=y_error, label=name, color=look.colour,
            marker=look.marker, markersize=11, linewidth=0 if alone else 2.2, elinewidth=1.2,
            capsize=3, markerfacecolor="white" if alone else look.colour, markeredgewidth=1.8,
        )  # fmt: skip
        for end in () if alone else (0, -1):
            axes.annotate(
                _short(lrs[end]), (x[end], y[end]), xytext=(right, up), ha=alignment,
                textcoords="offset points", fontsize=FONT - 3, color=darker(look.colour),
                path_effects=[withStroke(linewidth=3, foreground="white")], zorder=4,
            )  # fmt: skip
    values = [point[3] for points in curves.values() for point in points]
    if min(values) > 0 and max(values) > _LOG_FROM * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(score_limits(axes.get_xlim()))
    axes.set_xlabel("domain score, mean, %")
    scale = ", log scale" if axes.get_yscale() == "log" else ""
    axes.set_ylabel(f"forgetting: ΔPPL on general text{scale}")
    axes.grid(alpha=0.25)


def _short(lr: float) -> str:
    """``2e-4``, ``1.2e-5``."""
    return f"{lr:.1e}".replace(".0e", "e").replace("e-0", "e-")
