"""The report of several models: what each gained, what it kept, what its run cost."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from megatron_replay.errors import ConfigError, DataError
from megatron_replay.evaluation.scores import KINDS, value_at
from megatron_replay.files import is_number, read_json
from megatron_replay.run_log import RunSummary

Report = dict[str, Any]
Model = Mapping[str, Any]
#: The title of a column, and the text of its cell for a model; None where nothing was measured.
Column = tuple[str, Callable[[Model], str | None]]
#: A thousand years: nothing longer was measured.
_LONGEST_SECONDS = 3e10


def build_report(
    evaluation: Mapping[str, Any],
    runs: Mapping[str, RunSummary],
    *,
    timings: Mapping[str, float],
    command: str,
) -> Report:
    """Join an evaluation with its runs, by the models' names, and with timings.

    Raises:
        ConfigError: no model of a run's name was evaluated.
    """
    names = [model["name"] for model in evaluation["models"]]
    for name in runs:
        if name not in names:
            raise ConfigError(
                f"the run {name!r} was not evaluated",
                where="--run",
                expected=" or ".join(names),
                found=name,
            )
    methods = []
    for model in evaluation["models"]:
        method = {key: value for key, value in model.items() if key != "key"}
        if model["name"] in runs:
            method["run"] = asdict(runs[model["name"]])
        methods.append(method)
    return {
        "methods": methods,
        "timings": dict(timings),
        "inputs": evaluation["inputs"],
        "settings": evaluation["settings"],
        "commands": [evaluation["command"], command],
    }


def read_timings(path: Path) -> dict[str, float]:
    """Read ``{"part": seconds, …}``, in the order of the file.

    Raises:
        DataError: the file holds anything else.
    """
    timings = read_json(path, DataError)
    for name, seconds in timings.items():
        if not (is_number(seconds) and 0 <= seconds < _LONGEST_SECONDS):
            raise DataError(
                "not timings",
                where=path,
                expected='{"part": seconds, …}',
                found=f"{name!r}: {json.dumps(seconds)[:60]}",
            )
    return {name: float(seconds) for name, seconds in timings.items()}


def _number(title: str, path: str | tuple[str, ...], form: str, scale: float = 1) -> Column:
    def cell(model: Model) -> str | None:
        value = value_at(model, path)
        return None if value is None else format(scale * value, form)

    return title, cell


def _score(kind: str, name: str) -> Column:
    """A benchmark's score and its standard error, in per cent."""

    def cell(model: Model) -> str | None:
        found = value_at(model, (kind, name))
        if found is None:
            return None
        numbers = [found[KINDS[kind]], found.get("standard_error")]
        return " ± ".join(format(100 * number, ".1f") for number in numbers if number is not None)

    return f"{name} %", cell


def _failures(model: Model, name: str) -> str | None:
    """Why queries did not match, and which questions the counts leave out."""
    found = value_at(model, ("sql", name))
    if found is None:
        return None
    reasons = ", ".join(f"{count} {reason}" for reason, count in found["failures"].items())
    counts = (("unfinished", "cut off"), ("empty_gold", "left out"))
    more = ", ".join(f"{found[key]} {what}" for key, what in counts if found.get(key))
    return " ".join(filter(None, (reasons or "–", more and f"({more})")))


def _benchmarks(models: Sequence[Model], *, general: bool) -> list[Column]:
    """The columns of each benchmark, in the order of their first results."""
    found: dict[tuple[str, ...], list[Column]] = {}
    for model, kind in itertools.product(models, KINDS):
        for name, result in model.get(kind, {}).items():
            if bool(result.get("general")) is not general:
                continue
            columns = [_score(kind, name)]
            if "questions" in result:
                columns.append(_number("questions", (kind, name, "questions"), "d"))
            if "failures" in result:
                columns.append(("failure reason", partial(_failures, name=name)))
            found[kind, name, columns[0][0]] = columns
    return list(itertools.chain.from_iterable(found.values()))


_GAINED = (
    _number("data perplexity", "data.perplexity", ".3f"),
    _number("data next token %", "data.accuracy", ".1f", 100),
)
_KEPT = (
    _number("general perplexity", "general.perplexity", ".2f"),
    _number("Δ perplexity", "general.delta_perplexity", "+.2f"),
    _number("retention %", "retention_percent", ".1f"),
    _number("relative L2 %", "relative_l2_percent", ".2f"),
    _number("outside mass %", "candidates.outside_mass", ".2f", 100),
    _number("restricted loss", "candidates.restricted_loss", ".4f"),
    _number("full loss", "candidates.full_loss", ".4f"),
    _number("run: relative L2 %", "run.relative_l2", ".2f", 100),
    _number("run: general perplexity", "run.general_perplexity", ".2f"),
    _number("run: Δ perplexity", "run.delta_ppl", "+.2f"),
)
_COST = (
    _number("iterations", "run.iterations", "d"),
    _number("tokens", "run.tokens", ",d"),
    _number("seconds", "run.seconds", ".1f"),
    _number("tokens/s", "run.tokens_per_second", ",.0f"),
    _number("waiting for data %", "run.data_wait_share", ".2f", 100),
)
_STABILITY = (
    _number("final loss", "run.final_loss", ".4f"),
    _number("loss std", "run.loss_std", ".4f"),
    _number("loss variance", "run.loss_variance", ".3g"),
    _number("gradient-norm CV", "run.gradient_norm_cv", ".3f"),
    _number("loss spikes", "run.loss_spikes", "d"),
    _number("loss spikes per 1,000 steps", "run.loss_spike_rate", ".2f", 1000),
    _number("gradient spikes", "run.gradient_spikes", "d"),
    _number("gradient spikes per 1,000 steps", "run.gradient_spike_rate", ".2f", 1000),
    _number("non-finite steps", "run.non_finite", "d"),
)


def markdown_row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _table(models: Sequence[Model], columns: Sequence[Column]) -> list[str]:
    """A Markdown table; models and columns without any value are left out."""
    cells = {model["name"]: [cell(model) for _, cell in columns] for model in models}
    used = [i for i in range(len(columns)) if any(row[i] is not None for row in cells.values())]
    lines = [markdown_row(["method", *(columns[i][0] for i in used)])]
    lines.append("|---" + "|---:" * len(used) + "|")
    for name, row in cells.items():
        if any(row[i] is not None for i in used):
            lines.append(markdown_row([name, *(row[i] or "–" for i in used)]))
    return lines if used else ["Not measured."]


def render_markdown(report: Report) -> str:
    """The report as Markdown; ``report.png`` is expected in the same directory."""
    methods = report["methods"]
    lines = ["# Report", "", "![gain against forgetting](report.png)", ""]
    for title, columns in (
        ("What it gained", [*_benchmarks(methods, general=False), *_GAINED]),
        ("What it kept", [*_benchmarks(methods, general=True), *_KEPT]),
        ("What it cost", _COST),
        ("How steady it was", _STABILITY),
    ):
        lines += [f"## {title}", "", *_table(methods, columns), ""]
    lines += [
        "± is one standard error over the questions. Questions whose gold query returns nothing "
        "are left out. Retention can exceed 100 % by chance where a benchmark is small or the "
        "base's score is near that of guessing. Δ perplexity and relative L2 are relative to the "
        "base; outside mass is the probability outside the stored candidate sets. A run measures "
        "its own values (run:) on its own sample of general text, with fp32 weights.",
        "",
    ]
    if report["timings"]:
        lines += ["## Time of the parts", "", "| part | seconds |", "|---|---:|"]
        timings = report["timings"] | {"all": sum(report["timings"].values())}
        lines += [markdown_row([part, f"{seconds:.1f}"]) for part, seconds in timings.items()]
        lines += [""]
    lines += ["## Where the numbers come from", "", "```", *report["commands"], "```", ""]
    for name, entry in report["inputs"].items():
        lines.append(f"- {name}: `{entry['path']}`, SHA-256 `{entry['sha256'][:16]}…`")
    for method in methods:
        configured = f", configured by `{method['run']['config']}`" if "run" in method else ""
        lines.append(f"- {method['name']}: `{method['path']}`{configured}")
    return "\n".join(lines) + "\n"
