"""What was kept: scores on general benchmarks as percentages of the base's."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_replay.errors import DataError


def general_scores(result: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Score of every general benchmark of a model's result, by its name."""
    choices, tasks = result.get("choices", {}), result.get("lm_eval", {})
    return {name: found["accuracy"] for name, found in choices.items() if found.get("general")} | {
        name: found["score"] for name, found in tasks.items() if found.get("general")
    }


def retention(scores: Mapping[str, float], base: Mapping[str, float]) -> dict[str, float]:
    """``100 · score / base score`` of every benchmark, in percent.

    Raises:
        DataError: the base scores 0 in one: nothing is there to be kept.
    """
    for name, score in base.items():
        if score == 0:
            raise DataError(
                "the base scores 0, so what is kept of it is no number",
                where=f"general benchmark {name}",
                fix="Leave it out, or measure it as one of the domain",
            )
    return {name: 100 * score / base[name] for name, score in scores.items()}
