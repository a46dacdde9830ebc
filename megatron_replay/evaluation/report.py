"""The report of several models: what each gained, what it kept, what its run cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_replay.errors import ConfigError, DataError
from megatron_replay.evaluation.scores import is_share, value_at
from megatron_replay.files import is_number, read_json
from megatron_replay.run_log import RunSummary

Report = dict[str, Any]
#: A thousand years: nothing longer was measured.
_LONGEST_SECONDS = 3e10
Method = dict[str, Any]
#: The place of a value in a model's results.
At = str | tuple[str, ...]
#: Title, place of the value, and the function that writes it.
Column = tuple[str, At, Callable[[Mapping[str, Any], At], str | None]]


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


def _number(form: str, scale: float = 1.0) -> Any:
    return lambda method, path: (
        None if value_at(method, path) is None else format(scale * value_at(method, path), form)
    )


def _accuracy(method: Mapping[str, Any], path: At) -> str | None:
    found = value_at(method, path)
    return None if found is None else _with_error(found, 100, ".1f", "accuracy")


def _failures(method: Mapping[str, Any], path: At) -> str | None:
    """Why queries did not match, and which questions the counts leave out."""
    found = value_at(method, path)
    if found is None:
        return None
    reasons = ", ".join(f"{count} {reason}" for reason, count in found["failures"].items())
    counts = (("unfinished", "cut off"), ("empty_gold", "left out"))
    more = ", ".join(f"{found[key]} {what}" for key, what in counts if found.get(key))
    return " ".join(filter(None, (reasons or "–", more and f"({more})")))


def _score(method: Mapping[str, Any], path: At) -> str | None:
    found = value_at(method, path)
    return _with_error(found, 100, ".1f") if found is not None and is_share(found) else None


def _own_unit(method: Mapping[str, Any], path: At) -> str | None:
    found = value_at(method, path)
    return None if found is None or is_share(found) else _with_error(found, 1, ".3f")


def _with_error(found: Mapping[str, Any], scale: int, form: str, name: str = "score") -> str:
    numbers = [found[name], found.get("standard_error")]
    return " ± ".join(format(scale * number, form) for number in numbers if number is not None)


def _benchmarks(methods: Sequence[Method], *, general: bool) -> list[Column]:
    """The columns of each benchmark, in the order of their first results."""
    kinds = (("sql", _accuracy), ("choices", _accuracy), ("lm_eval", _score))
    found: dict[tuple[str, ...], list[Column]] = {}
    for method in methods:
        for kind, form in kinds:
            for name, result in method.get(kind, {}).items():
                if bool(result.get("general")) is general:
                    of = (kind, name)
                    column: Column = (f"{name} %", of, form)
                    if not is_share(result):
                        metric = result["metric"].partition(",")[0]
                        arrow = "↑" if result.get("higher_is_better", True) else "↓"
                        column = (f"{name} {metric} {arrow}", of, _own_unit)
                    columns = found[kind, name, column[0]] = [column]
                    if "questions" in result:
                        columns.append(("questions", (*of, "questions"), _number("d", 1)))
                    if "failures" in result:
                        columns.append(("failure reason", of, _failures))
    return [column for columns in found.values() for column in columns]


_GAINED: Sequence[Column] = (
    ("task perplexity", "task.perplexity", _number(".3f")),
    ("data perplexity", "data.perplexity", _number(".3f")),
    ("data next token %", "data.accuracy", _number(".1f", 100)),
)
_KEPT: Sequence[Column] = (
    ("general perplexity", "general.perplexity", _number(".2f")),
    ("Δ perplexity", "general.delta_perplexity", _number("+.2f")),
    ("retention %", "retention_percent", _number(".1f")),
    ("relative L2 %", "relative_l2_percent", _number(".2f")),
    ("outside mass %", "candidates.outside_mass", _number(".2f", 100)),
    ("restricted loss", "candidates.restricted_loss", _number(".4f")),
    ("full loss", "candidates.full_loss", _number(".4f")),
    ("run: relative L2 %", "run.relative_l2", _number(".2f", 100)),
    ("run: general perplexity", "run.general_perplexity", _number(".2f")),
    ("run: Δ perplexity", "run.delta_ppl", _number("+.2f")),
)
_COST: Sequence[Column] = (
    ("iterations", "run.iterations", _number("d", 1)),
    ("tokens", "run.tokens", _number(",d", 1)),
    ("seconds", "run.seconds", _number(".1f")),
    ("tokens/s", "run.tokens_per_second", _number(",.0f")),
    ("waiting for data %", "run.data_wait_share", _number(".2f", 100)),
)
_STABILITY: Sequence[Column] = (
    ("final loss", "run.final_loss", _number(".4f")),
    ("loss std", "run.loss_std", _number(".4f")),
    ("loss variance", "run.loss_variance", _number(".3g")),
    ("gradient-norm CV", "run.gradient_norm_cv", _number(".3f")),
    ("loss spikes", "run.loss_spikes", _number("d", 1)),
    ("per 1,000 steps", "run.loss_spike_rate", _number(".2f", 1000)),
    ("gradient spikes", "run.gradient_spikes", _number("d", 1)),
    ("per 1,000 steps", "run.gradient_spike_rate", _number(".2f", 1000)),
    ("non-finite steps", "run.non_finite", _number("d", 1)),
)


def markdown_row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _table(methods: Sequence[Method], columns: Sequence[Column]) -> list[str]:
    """A Markdown table; models and columns without any value are left out."""
    cells = [[form(method, path) for _, path, form in columns] for method in methods]
    used = [i for i in range(len(columns)) if any(row[i] is not None for row in cells)]
    lines = [markdown_row(["method", *(columns[i][0] for i in used)])]
    lines.append("|---" + "|---:" * len(used) + "|")
    for method, row in zip(methods, cells, strict=True):
        if any(row[i] is not None for i in used):
            lines.append(markdown_row([method["name"], *(row[i] or "–" for i in used)]))
    return lines if used else ["Not measured."]


def render_markdown(report: Report) -> str:
    """The report as Markdown; ``report.png`` is expected beside it."""
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
        lines += [
            markdown_row([part, f"{seconds:.1f}"]) for part, seconds in report["timings"].items()
        ]
        lines += [markdown_row(["all", f"{sum(report['timings'].values()):.1f}"]), ""]
    lines += ["## Where the numbers come from", "", "```", *report["commands"], "```", ""]
    for name, entry in report["inputs"].items():
        lines.append(f"- {name}: `{entry['path']}`, SHA-256 `{entry['sha256'][:16]}…`")
    for method in methods:
        configured = f", configured by `{method['run']['config']}`" if "run" in method else ""
        lines.append(f"- {method['name']}: `{method['path']}`{configured}")
    return "\n".join(lines) + "\n"
