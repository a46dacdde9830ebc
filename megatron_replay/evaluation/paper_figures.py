"""The paper's figures 2 to 4 from rows, one of each for every base and size."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from megatron_replay.evaluation import scores
from megatron_replay.evaluation.comparison import Measure, Spread
from megatron_replay.evaluation.figure_style import (
    FONT,
    Style,
    deviation,
    grouped_bars,
    new_figure,
    over_seeds,
    save,
    score_limits,
    styles,
    tidy,
)
from megatron_replay.evaluation.paper_tables import variants
from megatron_replay.evaluation.pareto_figure import draw_pareto
from megatron_replay.evaluation.rows import Row
from megatron_replay.evaluation.tables import Group, by_method, groups_of, in_table

Lines = dict[str, list[Row]]


def draw_figures(rows: Sequence[Row], output: Path) -> list[str]:
    """Draw what the rows suffice for, two methods at least; the files' names, in order."""
    drawn = []
    for group in groups_of(rows):
        for name, draw in _FIGURES.items():
            file = _file(name, *group)
            if draw(rows, group, output / file):
                drawn.append(file)
    for size in dict.fromkeys(size for _, size in groups_of(rows)):
        file = _file("pareto", size)
        if draw_pareto(rows, size, output / file):
            drawn.append(file)
    return drawn


def figure_files(rows: Sequence[Row]) -> list[str]:
    """Names of all the files that `draw_figures` may write for these rows."""
    groups = groups_of(rows)
    of_groups = [_file(name, *group) for group in groups for name in _FIGURES]
    return [*of_groups, *dict.fromkeys(_file("pareto", size) for _, size in groups)]


def _file(name: str, *of: str) -> str:
    return "-".join([name, *(re.sub(r"[^\w.]+", "_", part) for part in of if part)]) + ".png"


def _lines(rows: Sequence[Row], name: Callable[[Row], str]) -> Lines:
    found: Lines = {}
    for row in rows:
        found.setdefault(name(row), []).append(row)
    return found


def _methods(rows: Sequence[Row], group: Group) -> tuple[Lines, dict[str, Style]]:
    """The methods' rows, and styles that figures 2 to 4 share; the base comes last in them."""
    lines = _lines(in_table(rows, "methods", group), lambda row: by_method(row)[0])
    return lines, styles(sorted(lines, key=lambda name: name == "Base"))


def _trained(lines: Lines) -> Lines:
    return {name: own for name, own in lines.items() if not own[0].is_base}


def _measured(rows: Sequence[Row], measure: Measure) -> bool:
    return any(measure(row) is not None for row in rows)


def _title(group: Group) -> str:
    return ", ".join(part for part in group if part)


def _figure_2(rows: Sequence[Row], group: Group, path: Path) -> bool:
    """Bars: every benchmark of the domain, every general one."""
    lines, style = _methods(rows, group)
    own = [row for line in lines.values() for row in line]
    kinds = [
        ("Domain", scores.names_of(scores.domain_scores(row.evaluation) for row in own),
         scores.task_quantity),
        ("General", scores.names_of(scores.general_scores(row.evaluation) for row in own),
         scores.general_quantity),
    ]  # fmt: skip
    kinds = [kind for kind in kinds if kind[1]]
    if not kinds or len(_trained(lines)) < 2:
        return False
    figure = new_figure(18, 8)
    panels = figure.subplots(1, len(kinds), squeeze=False, width_ratios=[len(k[1]) for k in kinds])
    for axes, (title, names, quantity) in zip(panels[0], kinds, strict=True):
        series = {
            name: [over_seeds(line, quantity(of).measure) for of in names]
            for name, line in lines.items()
        }
        grouped_bars(axes, names, series, style)
        axes.set_ylabel("score, %")
        tidy(axes, f"{title} benchmarks (higher is better)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=4, fontsize=FONT, frameon=False
    )
    figure.suptitle(f"{_title(group)}: mean ± standard deviation over seeds", fontsize=FONT + 2)
    save(figure, path)
    return True


def _figure_3(rows: Sequence[Row], group: Group, path: Path) -> bool:
    """Horizontal bars: how steady, and how long."""
    lines, style = _methods(rows, group)
    lines = _trained(lines)
    own = [row for line in lines.values() for row in line]
    step, stage0, _, whole = scores.EFFICIENCY
    hidden = ("loss_variance", "gradient_spikes")
    wanted = [*(q for q in scores.STABILITY if q.name not in hidden), step, whole]
    wanted = [quantity for quantity in wanted if _measured(own, quantity.measure)]
    if not wanted or len(lines) < 2:
        return False
    figure = new_figure(3.2 * len(wanted) + 3.5, 2.2 + 0.52 * len(lines))
    panels = figure.subplots(1, len(wanted), squeeze=False, sharey=True)[0]
    names = list(lines)
    for axes, quantity in zip(panels, wanted, strict=True):
        values = [over_seeds(lines[name], quantity.measure) for name in names]
        _horizontal(axes, names, values, quantity.form, style)
        if quantity is whole and _measured(own, stage0.measure):
            shares = [over_seeds(lines[name], stage0.measure) for name in names]
            axes.barh(
                range(len(names)), [s.mean if s else 0.0 for s in shares], height=0.66,
                color="none", edgecolor="white", hatch="////", label="of it Stage 0",
            )  # fmt: skip
        title = {"s a step": "seconds a step", "both, s": "all seconds\n(hatched: Stage 0)"}
        tidy(axes, title.get(quantity.title, quantity.title.replace(" ", "\n", 1)))
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.suptitle(
        f"{_title(group)}: stability and cost, mean ± standard deviation over seeds "
        "(less is better)",
        fontsize=FONT + 1,
    )
    save(figure, path)
    return True


def _horizontal(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[Spread | None],
    form: str,
    style: dict[str, Style],
) -> None:
    """Bars with the number beyond the end of their error bar."""
    for y, (name, value) in enumerate(zip(names, values, strict=True)):
        if value is None:
            axes.annotate("–", (0, y), fontsize=FONT, va="center")
            continue
        axes.barh(
            y, value.mean, height=0.66, color=style[name].colour, xerr=deviation(value) or None,
            error_kw={"elinewidth": 1.5, "capsize": 3, "ecolor": "#555555"},
        )  # fmt: skip
        axes.annotate(
            format(value.mean, form), (value.mean + deviation(value), y), xytext=(5, 0),
            textcoords="offset points", fontsize=FONT - 2, va="center",
        )  # fmt: skip
    axes.margins(x=0.42)
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", nbins=3)


def _figure_4(rows: Sequence[Row], group: Group, path: Path) -> bool:
    """Four panels: positions, loss std against accuracy, the largest angle, the ablation."""
    lines, style = _methods(rows, group)
    lines = _trained(lines)
    if len(lines) < 2:
        return False
    positions, angles = (variants(rows, kind, group) for kind in ("positions", "angles"))
    domain = scores.domain_mean(rows)
    panels: list[Callable[[Axes], None]] = []
    panels += [lambda axes: _positions(axes, positions)] if _differ(positions) else []
    panels += [lambda axes: _pareto_of_noise(axes, lines, domain, style)]
    panels += [lambda axes: _angles(axes, angles, domain)] if _differ(angles) else []
    panels += [lambda axes: _ablation(axes, lines, domain, style)]
    high = -(-len(panels) // 2)
    figure = new_figure(20, 7.5 * high)
    grid = figure.subplots(high, 2, squeeze=False).ravel()
    for axes, draw in zip(grid, panels, strict=False):
        draw(axes)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(f"{_title(group)}: mean ± standard deviation over seeds", fontsize=FONT + 2)
    save(figure, path)
    return True


def _differ(rows: Sequence[Row]) -> bool:
    return len({row.variant for row in rows}) > 1


def _positions(axes: Axes, rows: Sequence[Row]) -> None:
    lines = _lines(rows, lambda row: row.variant)
    tasks = scores.names_of(scores.domain_scores(row.evaluation) for row in rows)
    series = {
        name: [over_seeds(line, scores.task_quantity(task).measure) for task in tasks]
        for name, line in lines.items()
    }
    grouped_bars(axes, tasks, series, styles(series))
    axes.set_ylabel("score, %")
    axes.legend(
        fontsize=FONT, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.06)
    )
    tidy(axes, "A: positions that Stage 0 takes")


def _pareto_of_noise(axes: Axes, lines: Lines, domain: Measure, style: dict[str, Style]) -> None:
    """Retention is the marker's area: from the least at 60 to the most at 400 points²."""
    own = [row for line in lines.values() for row in line]
    sql = _measured(own, scores.sql_mean)
    score = scores.sql_mean if sql else domain
    kept = {name: over_seeds(line, scores.RETENTION.measure) for name, line in lines.items()}
    known = [value.mean for value in kept.values() if value]
    for name, line in lines.items():
        x, y = over_seeds(line, scores.LOSS_STD.measure), over_seeds(line, score)
        if x is None or y is None:
            continue
        value, area, label = kept[name], 150.0, name
        if value is not None:
            span = max(known) - min(known) or 1.0
            area = 60 + 340 * (value.mean - min(known)) / span
            label = f"{name} ({value.mean:.0f})"
        axes.errorbar(
            x.mean, y.mean, xerr=deviation(x), yerr=deviation(y), color=style[name].colour,
            fmt="none", capsize=3, alpha=0.6,
        )  # fmt: skip
        axes.scatter(
            x.mean, y.mean, s=area, color=style[name].colour, marker=style[name].marker,
            label=label, zorder=3,
        )  # fmt: skip
    axes.set_ylim(score_limits(axes.get_ylim()))
    axes.set_xlabel("standard deviation of the loss")
    axes.set_ylabel(f"{'NL2SQL execution match' if sql else 'domain score'}, mean, %")
    axes.grid(alpha=0.25)
    legend = axes.legend(
        fontsize=FONT - 2, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False,
        title="size and number:\nretention, %" if known else None, title_fontsize=FONT - 2,
        labelspacing=0.9,
    )  # fmt: skip
    for handle in legend.legend_handles:
        handle.set_sizes([120])  # type: ignore[union-attr]
    tidy(axes, "B1: noise of the loss against accuracy (up and left is better)")


def _angles(axes: Axes, rows: Sequence[Row], domain: Measure) -> None:
    lines = _lines(rows, lambda row: f"{row.variant}°")
    series = {"domain mean": [over_seeds(line, domain) for line in lines.values()]}
    grouped_bars(axes, list(lines), series, {"domain mean": Style("#56B4E9", "s", "")})
    kept = [over_seeds(line, scores.RETENTION.measure) for line in lines.values()]
    axes.set_xlabel("Δ_max")
    axes.set_ylabel("domain score, mean, %  (bars)")
    _retention_axis(axes, kept, "o-")
    tidy(axes, "B2: the largest angle")


def _ablation(axes: Axes, lines: Lines, domain: Measure, style: dict[str, Style]) -> None:
    for x, (name, line) in enumerate(lines.items()):
        value = over_seeds(line, domain)
        if value:
            axes.bar(
                x, value.mean, 0.7, yerr=deviation(value), color=style[name].colour,
                error_kw={"elinewidth": 1.5, "capsize": 3, "ecolor": "#555555"},
            )  # fmt: skip
    axes.set_xticks(range(len(lines)), list(lines), rotation=35, ha="right")
    axes.set_ylabel("domain score, mean, %  (bars)")
    kept = [over_seeds(line, scores.RETENTION.measure) for line in lines.values()]
    _retention_axis(axes, kept, "D")
    tidy(axes, "C: the methods")


def _retention_axis(axes: Axes, kept: Sequence[Spread | None], form: str) -> None:
    """Points with their deviation on an axis of their own at the right."""
    there = [(x, value) for x, value in enumerate(kept) if value]
    if not there:
        return
    right = axes.twinx()
    right.errorbar(
        [x for x, _ in there], [v.mean for _, v in there], yerr=[deviation(v) for _, v in there],
        fmt=form, color="black", markersize=11, linewidth=2, capsize=4, markerfacecolor="white",
        markeredgewidth=2,
    )  # fmt: skip
    right.set_ylabel("retention, %  (white points)", fontsize=FONT)
    right.tick_params(labelsize=FONT)
    right.spines["top"].set_visible(False)


_FIGURES = {"figure2": _figure_2, "figure3": _figure_3, "figure4": _figure_4}
