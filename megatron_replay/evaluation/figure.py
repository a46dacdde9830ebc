"""The report's figure: gain against forgetting, and how far each method moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_replay.errors import DataError
from megatron_replay.evaluation.figure_style import (
    COLOURS,
    FONT,
    darker,
    new_figure,
    tidy,
)
from megatron_replay.evaluation.report import Report
from megatron_replay.evaluation.scores import domain_scores, value_at

#: Height of a label as a share of the axes: labels closer than this would overlap.
_LABEL_HEIGHT = 0.075

#: Kinds of gain where no task of the domain is scored, best first: axis title, value.
_GAINS = (
    ("next token of held-out data, %", "data.accuracy"),
    ("next token of the task, %", "task.accuracy"),
)
_KINDS = ("sql", "choices", "lm_eval")


def report_figure(report: Report) -> Figure:
    """The figure, 1600 × 700 pixels.

    Left: gain against Δ perplexity on general text, with one standard error. Right: relative L2 and
    outside mass, or the time of the parts where neither is more than the base's zero.

    Raises:
        DataError: there is no gain or no forgetting to draw.
    """
    methods = report["methods"]
    figure = new_figure(16, 7)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    colours = {m["name"]: COLOURS[i % len(COLOURS)] for i, m in enumerate(methods)}
    _draw_gain(left, methods, colours)
    tuned = [m for m in methods if m["relative_l2_percent"] > 0]
    if tuned:
        _draw_movement(right, methods)
    else:
        _draw_timings(right, report["timings"])
    return figure


def _draw_gain(axes: Axes, methods: Sequence[Any], colours: dict[str, str]) -> None:
    title, _ = _gains(methods[:1])
    if not title or value_at(methods[0], "general.delta_perplexity") is None:
        raise DataError(
            "no gain against forgetting to draw",
            expected="an evaluation with --general-text and --sql, --choices or --data",
        )
    for method in methods:
        if missing := _drawn(methods[0]) ^ _drawn(method):
            raise DataError(
                f"{method['name']} was measured on something else than {methods[0]['name']}",
                found=f"only one of them has {', '.join(sorted(missing))}",
            )
    points = []
    for method, (gain, error) in zip(methods, _gains(methods)[1], strict=True):
        forgetting = value_at(method, "general.delta_perplexity")
        axes.errorbar(
            forgetting,
            gain,
            yerr=error,
            fmt="o",
            markersize=12,
            capsize=5,
            linewidth=2,
            color=colours[method["name"]],
        )
        points.append((forgetting, gain, method["name"]))
    axes.margins(x=0.12, y=0.12)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    _label_points(axes, points, colours)
    axes.set_xlabel("forgetting: Δ perplexity on general text")
    axes.set_ylabel(f"domain: {title}")
    axes.grid(alpha=0.25)
    tidy(axes, "Domain against forgetting (up and left is better)")


def _drawn(method: Any) -> set[str]:
    """Which of what the left side draws a method has."""
    paths = ("general.delta_perplexity", *(path for _, path in _GAINS))
    found = {path for path in paths if value_at(method, path) is not None}
    return found | set(domain_scores(method))


def _gains(methods: Sequence[Any]) -> tuple[str, list[tuple[float, float | None]]]:
    """What the gain is, and each method's with its standard error; no methods where none is."""
    tasks = list(domain_scores(methods[0]))
    if tasks:
        title = f"{tasks[0]}, %" if len(tasks) == 1 else f"mean of {len(tasks)} tasks, %"
        return title, [_domain_mean(method) for method in methods]
    for title, path in _GAINS:
        if value_at(methods[0], path) is not None:
            return title, [(100 * value_at(method, path), None) for method in methods]
    return "", []


def _domain_mean(method: Any) -> tuple[float, float | None]:
    """Mean over the domain's tasks; its standard error, the tasks being independent."""
    scores = domain_scores(method)
    results = {name: found for kind in _KINDS for name, found in method.get(kind, {}).items()}
    errors = [results[name].get("standard_error") for name in scores]
    mean = sum(scores.values()) / len(scores)
    if any(error is None for error in errors):
        return mean, None
    return mean, 100 * math.hypot(*errors) / len(errors)


def _label_points(
    axes: Axes, points: Sequence[tuple[float, float, str]], colours: dict[str, str]
) -> None:
    """Name each point, to the right of all of them, in the order of their heights.

    A column of labels with leader lines stays legible where several points nearly coincide.
    """
    bottom, top = axes.get_ylim()
    highest = 0.0
    for x, y, name in sorted(points, key=lambda point: point[1]):
        height = max((y - bottom) / (top - bottom), highest + _LABEL_HEIGHT)
        highest = height
        axes.annotate(
            name,
            xy=(x, y),
            xytext=(1.03, height),
            textcoords="axes fraction",
            fontsize=FONT,
            color=darker(colours[name]),
            va="center",
            arrowprops={"arrowstyle": "-", "color": colours[name], "alpha": 0.35, "shrinkB": 8},
        )


def _draw_movement(axes: Axes, methods: Sequence[Any]) -> None:
    """Horizontal bars, two a method; the number stands at the end of its bar."""
    kinds = [
        ("relative L2 to the base, %", "relative_l2_percent", 1.0, "#4C72B0"),
        ("mass outside the candidates, %", "candidates.outside_mass", 100.0, "#DD8452"),
    ]
    measured = [k for k in kinds if any(value_at(m, k[1]) is not None for m in methods)]
    height = 0.8 / len(measured)
    for i, (label, path, scale, colour) in enumerate(measured):
        rows = [(y, value_at(m, path)) for y, m in enumerate(methods)]
        bars = axes.barh(
            [y + (i - (len(measured) - 1) / 2) * height for y, v in rows if v is not None],
            [scale * v for _, v in rows if v is not None],
            height=0.92 * height,
            label=label,
            color=colour,
        )
        axes.bar_label(bars, fmt="%.2f", padding=4, fontsize=FONT - 1)
    axes.set_yticks(range(len(methods)), [m["name"] for m in methods])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("%")
    tidy(axes, "How far it moved (less is better)")
    axes.legend(fontsize=FONT - 1, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def _draw_timings(axes: Axes, timings: dict[str, float]) -> None:
    bars = axes.barh(list(timings), list(timings.values()), color="#4C72B0")
    axes.bar_label(bars, fmt="%.1f", padding=4, fontsize=FONT - 1)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    tidy(axes, "Time of the parts, seconds")
