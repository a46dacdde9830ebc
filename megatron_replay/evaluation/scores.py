"""What the tables and figures show of a row: benchmarks by name, and measures with their units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_replay.evaluation.comparison import Measure
from megatron_replay.evaluation.rows import Row


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A measure as a table's column or a figure's axis.

    Attributes:
        name: key in ``tables.json`` and ``tables`` CSV.
        title: with its unit.
        measure: of a row.
        form: a format specification; ``+`` in it shows the sign.
        better: 1 where more is better, -1 where less is, 0 where neither is marked.
    """

    name: str
    title: str
    measure: Measure
    form: str = ".1f"
    better: int = 0


Scores = dict[str, float]


def value_at(evaluation: Mapping[str, Any], path: str | Sequence[str]) -> Any:
    """``value_at(m, "general.perplexity")``: None where it was not measured."""
    value: Any = evaluation
    for key in path.split(".") if isinstance(path, str) else path:
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def sql_scores(evaluation: Mapping[str, Any]) -> Scores:
    """Execution match by set of questions, in per cent."""
    return {k: 100 * v["accuracy"] for k, v in evaluation.get("sql", {}).items()}


def is_share(result: Mapping[str, Any]) -> bool:
    """Whether a score is a share of one that is better when higher: only lm-eval has others.

    Evaluations from before this was told are read as if all were.
    """
    return bool(result.get("share", True) and result.get("higher_is_better", True))


def domain_scores(evaluation: Mapping[str, Any]) -> Scores:
    """Score by task of the domain, in per cent: SQL, multiple choice, lm-eval's that are shares."""
    return sql_scores(evaluation) | _benchmarks(evaluation, general=False)


def general_scores(evaluation: Mapping[str, Any]) -> Scores:
    """Score by general benchmark, in per cent."""
    return _benchmarks(evaluation, general=True)


def _benchmarks(evaluation: Mapping[str, Any], *, general: bool) -> Scores:
    kinds = (("choices", "accuracy"), ("lm_eval", "score"))
    return {
        name: 100 * result[score]
        for kind, score in kinds
        for name, result in evaluation.get(kind, {}).items()
        if bool(result.get("general")) is general and is_share(result)
    }


def names_of(scores: Iterable[Mapping[str, float]]) -> list[str]:
    """The benchmarks of several rows, in the order in which they are first met."""
    return list(dict.fromkeys(name for row in scores for name in row))


def domain_mean(rows: Iterable[Row]) -> Measure:
    """Mean over the tasks of all ``rows`` of a row's base and size.

    None for a row that lacks one: means over other tasks do not compare. For the same reason every
    table, curve and figure takes it of all rows that are given, never of its own only.
    """
    tasks: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        tasks.setdefault((row.base, row.size), {}).update(domain_scores(row.evaluation))
    return lambda row: _mean(
        domain_scores(row.evaluation), list(tasks.get((row.base, row.size), {}))
    )


def sql_mean(row: Row) -> float | None:
    """Mean execution match in per cent."""
    scores = sql_scores(row.evaluation)
    return _mean(scores, list(scores))


def _mean(scores: Mapping[str, float], names: list[str]) -> float | None:
    if not names or any(name not in scores for name in names):
        return None
    return sum(scores[name] for name in names) / len(names)


def _evaluated(path: str, scale: float = 1.0) -> Measure:
    return lambda row: _scaled(value_at(row.evaluation, path), scale)


def _trained(name: str, scale: float = 1.0) -> Measure:
    return lambda row: _scaled((row.run or {}).get(name), scale)


def _scaled(value: Any, scale: float) -> float | None:
    return None if value is None else scale * float(value)


def _seconds_a_step(row: Row) -> float | None:
    run = row.run or {}
    return run["seconds"] / run["iterations"] if run.get("seconds") is not None else None


def _all_seconds(row: Row) -> float | None:
    seconds = (row.run or {}).get("seconds")
    return None if seconds is None else seconds + (row.stage0_seconds or 0.0)


def task_quantity(name: str) -> Quantity:
    """The score of one domain task."""
    return Quantity(
        name=name,
        title=f"{name}, %",
        measure=lambda row: domain_scores(row.evaluation).get(name),
        better=1,
    )


def other_quantities(evaluations: Iterable[Mapping[str, Any]]) -> list[Quantity]:
    """Scores of domain tasks that are no shares, a perplexity, say: in their own unit, in no mean.

    In the order in which they are first met.
    """
    found = {}
    for evaluation in evaluations:
        for task, result in evaluation.get("lm_eval", {}).items():
            if not is_share(result):
                metric = result["metric"].partition(",")[0]
                found[task, metric] = Quantity(
                    name=f"{task} {metric}",
                    title=f"{task}, {metric}",
                    measure=partial(_own_unit, task),
                    form=".3f",
                    better=1 if result.get("higher_is_better", True) else -1,
                )
    return list(found.values())


def _own_unit(task: str, row: Row) -> float | None:
    result = value_at(row.evaluation, ("lm_eval", task))
    return None if result is None or is_share(result) else float(result["score"])


def general_quantity(name: str) -> Quantity:
    """The score of one general benchmark."""
    return Quantity(
        name=name,
        title=f"{name}, %",
        measure=lambda row: general_scores(row.evaluation).get(name),
        better=1,
    )


def domain_quantity(rows: Iterable[Row]) -> Quantity:
    """`domain_mean` of all ``rows``."""
    return Quantity(name="domain_mean", title="domain mean, %", measure=domain_mean(rows), better=1)


RETENTION = Quantity(
    name="retention_percent", title="retention, %", measure=_evaluated("retention_percent"),
    better=1,
)  # fmt: skip
PERPLEXITY = Quantity(
    name="general_perplexity", title="general perplexity",
    measure=_evaluated("general.perplexity"), form=".2f", better=-1,
)  # fmt: skip
FORGETTING = Quantity(
    name="delta_perplexity", title="ΔPPL", measure=_evaluated("general.delta_perplexity"),
    form="+.2f", better=-1,
)  # fmt: skip
DISTANCE = Quantity(
    name="relative_l2_percent", title="relative L2, %", measure=_evaluated("relative_l2_percent"),
    form=".2f", better=-1,
)  # fmt: skip
OUTSIDE_MASS = Quantity(
    name="outside_mass_percent", title="outside mass, %",
    measure=_evaluated("candidates.outside_mass", 100), form=".2f", better=-1,
)  # fmt: skip
PROBED_OUTSIDE_MASS = Quantity(
    name="probed_outside_mass_percent", title="run: outside mass, %",
    measure=_trained("outside_mass", 100), form=".2f", better=-1,
)  # fmt: skip
LOSS_STD = Quantity(
    name="loss_std", title="loss std", measure=_trained("loss_std"), form=".4f", better=-1
)
STABILITY = (
    LOSS_STD,
    Quantity(
        name="loss_variance", title="loss variance", measure=_trained("loss_variance"),
        form=".2e", better=-1,
    ),
    Quantity(
        name="gradient_norm_cv", title="gradient-norm CV", measure=_trained("gradient_norm_cv"),
        form=".3f", better=-1,
    ),
    Quantity(
        name="loss_spikes", title="loss spikes", measure=_trained("loss_spikes"), better=-1
    ),
    Quantity(
        name="gradient_spikes", title="gradient spikes", measure=_trained("gradient_spikes"),
        better=-1,
    ),
)  # fmt: skip
EFFICIENCY = (
    Quantity(
        name="seconds_a_step", title="s a step", measure=_seconds_a_step, form=".3f", better=-1
    ),
    Quantity(
        name="stage0_seconds", title="Stage 0, s", measure=lambda row: row.stage0_seconds
    ),
    Quantity(
        name="stage1_seconds", title="Stage 1, s", measure=_trained("seconds"), better=-1
    ),
    Quantity(
        name="all_seconds", title="both, s", measure=_all_seconds, better=-1
    ),
)  # fmt: skip
