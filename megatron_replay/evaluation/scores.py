"""The scores of one evaluated model, by task, and what was kept of the base's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_replay.errors import DataError

#: Kinds of benchmarks in an evaluation's JSON, and the key of their score, a share from 0 to 1.
KINDS = {"sql": "accuracy", "choices": "accuracy", "lm_eval": "score"}


def value_at(evaluation: Mapping[str, Any], path: str | Sequence[str]) -> Any:
    """``value_at(m, "general.perplexity")``; None where it was not measured."""
    value: Any = evaluation
    for key in path.split(".") if isinstance(path, str) else path:
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def domain_scores(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Score by task of the domain, in per cent."""
    return _scores(evaluation, general=False)


def general_scores(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Score by general benchmark, in per cent."""
    return _scores(evaluation, general=True)


def _scores(evaluation: Mapping[str, Any], *, general: bool) -> dict[str, float]:
    return {
        name: 100 * result[score]
        for kind, score in KINDS.items()
        for name, result in evaluation.get(kind, {}).items()
        if bool(result.get("general")) is general
    }


def domain_mean(evaluation: Mapping[str, Any]) -> tuple[float, float | None]:
    """Mean over the domain's tasks, in per cent, and its standard error, the tasks independent.

    The error is None where a task has none.
    """
    scores = domain_scores(evaluation)
    results = {name: found for kind in KINDS for name, found in evaluation.get(kind, {}).items()}
    errors = [results[name].get("standard_error") for name in scores]
    mean = sum(scores.values()) / len(scores)
    if any(error is None for error in errors):
        return mean, None
    return mean, 100 * math.hypot(*errors) / len(errors)


def retention(scores: Mapping[str, float], base: Mapping[str, float]) -> dict[str, float]:
    """``100 · score / base score`` of every general benchmark, in per cent.

    Raises:
        DataError: the base scores 0 in one: there is nothing to keep.
    """
    for name, score in base.items():
        if score == 0:
            raise DataError(
                "the base scores 0, so retention is undefined",
                where=f"general benchmark {name}",
                fix="Leave it out, or measure it as one of the domain",
            )
    return {name: 100 * score / base[name] for name, score in scores.items()}


def standard_error(correct: int, total: int) -> float:
    """``√(p(1-p)/n)`` of ``correct / total``, with p shrunk as Agresti and Coull (1998) do.

    ``p = (correct + 2)/(total + 4)``, n = total + 4: the plain formula claims an error of zero for
    0 of n.
    """
    n = total + 4
    p = (correct + 2) / n
    return math.sqrt(p * (1 - p) / n)
