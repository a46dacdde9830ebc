"""The report of several models: what each gained, what it kept, what its run cost; and its figure.

The figure shows gain against forgetting, and how far each model moved.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from megatron_replay.data.prompts import PromptStyle
from megatron_replay.errors import ConfigError, DataError
from megatron_replay.evaluation.results import KINDS, domain_mean, scores, value_at
from megatron_replay.run_log import RunSummary

Report = dict[str, Any]
Model = Mapping[str, Any]
#: A model's line of a table: texts by benchmark ("" for a column of all) and title; "" where
#: nothing was measured.
Cells = dict[tuple[str, str], str]
#: Columns of the tables: title, place in a model's results, format, factor.
_GAINED = (
    ("data perplexity", "data.perplexity", ".3f", 1),
    ("data next token %", "data.accuracy", ".1f", 100),
)
_KEPT = (
    ("general perplexity", "general.perplexity", ".2f", 1),
    ("Δ perplexity", "general.delta_perplexity", "+.2f", 1),
    ("retention %", "retention_percent", ".1f", 1),
    ("relative L2 %", "relative_l2_percent", ".2f", 1),
    ("outside mass %", "candidates.outside_mass", ".2f", 100),
    ("restricted loss", "candidates.restricted_loss", ".4f", 1),
    ("full loss", "candidates.full_loss", ".4f", 1),
    ("run: outside mass %", "run.outside_mass", ".2f", 100),
    ("run: relative L2 %", "run.relative_l2", ".2f", 100),
    ("run: general perplexity", "run.general_perplexity", ".2f", 1),
    ("run: Δ perplexity", "run.delta_ppl", "+.2f", 1),
)
_COST = (
    ("iterations", "run.iterations", "d", 1),
    ("tokens", "run.tokens", ",d", 1),
    ("computed %", "run.computed_share", ".1f", 100),
    ("seconds", "run.seconds", ".1f", 1),
    ("tokens/s", "run.tokens_per_second", ",.0f", 1),
    ("waiting for data %", "run.data_wait_share", ".2f", 100),
)
_STABILITY = (
    ("final loss", "run.final_loss", ".4f", 1),
    ("loss std", "run.loss_std", ".4f", 1),
    ("loss variance", "run.loss_variance", ".3g", 1),
    ("gradient-norm CV", "run.gradient_norm_cv", ".3f", 1),
    ("loss spikes", "run.loss_spikes", "d", 1),
    ("loss spikes per 1,000 steps", "run.loss_spike_rate", ".2f", 1000),
    ("gradient spikes", "run.gradient_spikes", "d", 1),
    ("gradient spikes per 1,000 steps", "run.gradient_spike_rate", ".2f", 1000),
    ("non-finite steps", "run.non_finite", "d", 1),
)
_NOTE = (
    "± is one standard error over the questions. Questions whose gold query returns nothing "
    "are left out. Retention can exceed 100 % by chance where a benchmark is small or the "
    "base's score is near that of guessing. Δ perplexity and relative L2 are relative to the "
    "base; outside mass is the probability outside the stored candidate sets. A run measures "
    "its own values (run:) on its own sample of general text, with fp32 weights."
)

#: Characters of a question or an answer that are shown.
_SHOWN = 200
_STYLE: Any = {
    "font.size": 16, "axes.titlesize": 17, "legend.fontsize": 15, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
#: Okabe and Ito (2008): the colour-blind can tell them apart; the yellow is darkened for a white
#: page.
COLOURS = (
    "#000000", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#0072B2", "#B5A300",
)  # fmt: skip
#: Height of a label as a share of the axes: labels closer than this would overlap.
_LABEL_HEIGHT = 0.075
_NO_GAIN = "Not measured: it takes --general-text,\nand --sql, --choices or --data"
_FORGETTING, _NEXT_TOKEN = "general.delta_perplexity", "data.accuracy"
#: What the right side shows: title, value, factor to per cent.
_MOVEMENT = (
    ("relative L2 to the base, %", "relative_l2_percent", 1.0),
    ("mass outside the candidates, %", "candidates.outside_mass", 100.0),
    ("mass outside the candidates in the run, %", "run.outside_mass", 100.0),
)


def build_report(
    evaluation: Mapping[str, Any],
    runs: Mapping[str, RunSummary],
    *,
    lines: Sequence[Sequence[str]],
    timings: Mapping[str, float],
    command: str,
    note: str = "",
) -> Report:
    """Join an evaluation with its runs and lines, by the models' names, and with timings.

    Args:
        lines: names of the models that each line of the figure joins.
        note: what a reader should know first.

    Raises:
        ConfigError: no model of this name was evaluated.
    """
    methods = {
        model["name"]: {key: value for key, value in model.items() if key != "key"}
        for model in evaluation["models"]
    }
    named = [("--run", name) for name in runs]
    named += [("--line", name) for line in lines for name in line]
    for flag, name in named:
        if name not in methods:
            raise ConfigError(
                f"the model {name!r} was not evaluated",
                where=flag,
                expected=" or ".join(methods),
                found=name,
            )
    for name, summary in runs.items():
        methods[name]["run"] = asdict(summary)
    return {
        "methods": list(methods.values()),
        "lines": [list(line) for line in lines],
        "note": note,
        "timings": dict(timings),
        "inputs": evaluation["inputs"],
        "settings": evaluation["settings"],
        "commands": [evaluation["command"], command],
    }


def _numbers(model: Model, columns: Sequence[tuple[str, str, str, float]]) -> Cells:
    found = ((title, value_at(model, path), form, factor) for title, path, form, factor in columns)
    return {
        ("", title): "" if value is None else format(factor * value, form)
        for title, value, form, factor in found
    }


def _benchmarks(model: Model, *, general: bool | None) -> Cells:
    """Each benchmark's score, number of questions and, for queries, why they failed.

    Those of general abilities, those of the domain, or, with None, no benchmark.
    """
    cells: Cells = {}
    for kind, score in KINDS.items():
        for name, found in model.get(kind, {}).items():
            if bool(found.get("general")) is not general:
                continue
            shares = [found[score], found.get("standard_error")]
            cells[name, f"{name} %"] = " ± ".join(
                format(100 * share, ".1f") for share in shares if share is not None
            )
            if found.get("questions") is not None:
                cells[name, "questions"] = format(found["questions"], "d")
            if "failures" in found:
                reasons = ", ".join(f"{n} {reason}" for reason, n in found["failures"].items())
                counts = (
                    ("unfinished", "cut off"), ("unwrapped", "unwrapped"),
                    ("empty_gold", "left out"), ("left_out", "left out by name"),
                )  # fmt: skip
                more = ", ".join(f"{found[key]} {what}" for key, what in counts if found.get(key))
                text = " ".join(filter(None, (reasons or "–", more and f"({more})")))
                cells[name, "failure reason"] = text
    return cells


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _table(lines: Mapping[str, Cells]) -> list[str]:
    """A Markdown table; models and columns without any value are left out."""
    columns = list(dict.fromkeys(column for cells in lines.values() for column in cells))
    used = [column for column in columns if any(cells.get(column) for cells in lines.values())]
    if not used:
        return ["Not measured."]
    table = [_row(["method", *(title for _, title in used)]), "|---" + "|---:" * len(used) + "|"]
    for name, cells in lines.items():
        if any(cells.values()):
            table.append(_row([name, *(cells.get(column) or "–" for column in used)]))
    return table


def _samples(methods: Mapping[str, Model]) -> list[str]:
    """What each model answers to the first questions of each SQL set."""
    tables: dict[tuple[str, int], list[str]] = {}
    for name, method in methods.items():
        for task, found in method.get("sql", {}).items():
            for number, sample in enumerate(found.get("samples", [])):
                table = tables.setdefault(
                    (task, number),
                    [f"**{task}**: {_line(sample['question'])}", "",
                     _row(["method", "answer", "right"]), "|---|---|---|",
                     _row(["gold query", f"`{_line(sample['gold'])}`", ""])],
                )  # fmt: skip
                right = "yes" if sample["right"] else "no"
                table.append(_row([name, f"`{_line(sample['answer'])}`", right]))
    lines = ["## What it answers", ""] if tables else []
    for table in tables.values():
        lines += [*table, ""]
    return lines


def _line(text: str) -> str:
    """The text on one line, cut, without what would end code."""
    return " ".join(text.replace("`", "'").split())[:_SHOWN]


def render_markdown(report: Report) -> str:
    """The report as Markdown; ``report.png`` is expected in the same directory."""
    methods = {method["name"]: method for method in report["methods"]}
    lines = ["# Report", "", "![gain against forgetting](report.png)", ""]
    lines += [report["note"], ""] if report["note"] else []
    for title, general, columns in (
        ("What it gained", False, _GAINED),
        ("What it kept", True, _KEPT),
        ("What it cost", None, _COST),
        ("How steady it was", None, _STABILITY),
    ):
        cells = {
            name: _benchmarks(method, general=general) | _numbers(method, columns)
            for name, method in methods.items()
        }
        lines += [f"## {title}", "", *_table(cells), ""]
    lines += [_NOTE, "", *_samples(methods)]
    if report["timings"]:
        lines += ["## Time of the parts", "", "| part | seconds |", "|---|---:|"]
        timings = report["timings"] | {"all": sum(report["timings"].values())}
        lines += [_row([part, f"{seconds:.1f}"]) for part, seconds in timings.items()]
        lines += [""]
    lines += ["## Where the numbers come from", "", "```", *report["commands"], "```", ""]
    style = {one.name: report["settings"].get(one.name) for one in fields(PromptStyle)}
    if style["chat_template"] is not None:
        lines.append(f"- prompts: {PromptStyle(**style)}")
    for name, entry in report["inputs"].items():
        lines.append(f"- {name}: `{entry['path']}`, SHA-256 `{entry['sha256'][:16]}…`")
    for name, method in methods.items():
        configured = f", configured by `{method['run']['config']}`" if "run" in method else ""
        lines.append(f"- {name}: `{method['path']}`{configured}")
    return "\n".join(lines) + "\n"


def report_figure(report: Report) -> Figure:
    """The figure, 1600 x 700 pixels.

    Left: gain against Δ perplexity on general text, with one standard error, and the lines; or a
    sentence that says what was not measured. Right: relative L2 and outside mass, or the time of
    the parts where only the base was measured.

    Raises:
        DataError: the models were measured on different things.
    """
    methods = report["methods"]
    with rc_context(_STYLE):
        figure = Figure(figsize=(16, 7), dpi=100, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        _draw_gain(left, methods, report["lines"])
        if any(method["relative_l2_percent"] > 0 for method in methods):
            _draw_movement(right, methods)
        else:
            bars = right.barh(list(report["timings"]), list(report["timings"].values()))
            right.bar_label(bars, fmt="%.1f", padding=4)
            right.set_title("Time of the parts, seconds")
        right.invert_yaxis()
        right.margins(x=0.15)
    return figure


def _draw_gain(
    axes: Axes, methods: Sequence[Mapping[str, Any]], lines: Sequence[Sequence[str]]
) -> None:
    base = methods[0]
    tasks, drawn = list(scores(base, general=False)), _drawn(base)
    axes.set_title("Domain against forgetting (up and left is better)")
    if _FORGETTING not in drawn or len(drawn) < 2:
        axes.set_axis_off()
        axes.text(0.5, 0.5, _NO_GAIN, ha="center", va="center", transform=axes.transAxes)
        return
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
    places = {name: (x, y) for y, x, name, _ in points}
    for line in lines:
        axes.plot(*zip(*(places[name] for name in line), strict=True), color="#888888", zorder=0)
    axes.margins(x=0.12, y=0.12)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    _label_points(axes, points)
    title = f"{tasks[0]}, %" if tasks else "next token of held-out data, %"
    axes.set_ylabel(f"domain: {f'mean of {len(tasks)} tasks, %' if len(tasks) > 1 else title}")
    axes.set_xlabel("forgetting: Δ perplexity on general text")
    axes.grid(alpha=0.25)


def _drawn(method: Mapping[str, Any]) -> set[str]:
    """Those of a model's results that the left side draws."""
    paths = {path for path in (_FORGETTING, _NEXT_TOKEN) if value_at(method, path) is not None}
    return paths | set(scores(method, general=False))


def _label_points(axes: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Name each point at the right of the axes, in the order of their heights.

    A column of labels with leader lines stays legible where several points nearly coincide.
    """
    bottom, top = axes.get_ylim()
    highest = 0.0
    for y, x, name, colour in sorted(points):
        highest = max((y - bottom) / (top - bottom), highest + _LABEL_HEIGHT)
        axes.annotate(
            name, xy=(x, y), xytext=(1.03, highest), textcoords="axes fraction",
            color=[0.65 * part for part in to_rgb(colour)], va="center",  # darker, for text
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.35, "shrinkB": 8},
        )  # fmt: skip


def _draw_movement(axes: Axes, methods: Sequence[Mapping[str, Any]]) -> None:
    """Horizontal bars, two for each model, with the number at the end of its bar."""
    measured = [m for m in _MOVEMENT if any(value_at(one, m[1]) is not None for one in methods)]
    height = 0.8 / len(measured)
    for i, (label, path, factor) in enumerate(measured):
        found = [value_at(method, path) for method in methods]
        bars = axes.barh(
            [y + (i - (len(measured) - 1) / 2) * height for y in range(len(methods))],
            [math.nan if value is None else factor * value for value in found],
            height=0.92 * height,
            label=label,
        )
        axes.bar_label(bars, fmt="%.2f", padding=4)
    axes.set_yticks(range(len(methods)), [method["name"] for method in methods])
    axes.set_xlabel("%")
    axes.set_title("How far it moved (less is better)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12))
