"""Scores by task, and retention of general benchmarks, from an evaluation's results."""

from __future__ import annotations

import pytest

from megatron_replay.evaluation.results import domain_mean, scores

CHOICE = {"accuracy": 0.5, "accuracy_per_byte": 0.9, "standard_error": 0.03}
TASK = {"score": 0.2, "standard_error": 0.04}
RESULT = {
    "sql": {"shop": {"accuracy": 0.25, "standard_error": 0.0}},
    "choices": {"a": CHOICE | {"general": True}, "b": CHOICE | {"general": False}},
    "lm_eval": {
        "c": TASK | {"general": True},
        "d": TASK | {"general": False},
    },
}


def test_domain_and_general_scores_are_apart_and_in_per_cent() -> None:
    assert scores(general=True, model=RESULT) == {"a": 50.0, "c": 20.0}
    assert scores(general=False, model=RESULT) == {"shop": 25.0, "b": 50.0, "d": 20.0}
    assert scores(general=True, model={}) == scores(general=False, model={}) == {}


def test_the_mean_has_the_error_of_independent_tasks() -> None:
    mean, error = domain_mean(RESULT)
    assert mean == pytest.approx(95 / 3)
    assert error == pytest.approx(5 / 3)  # (0² + 3² + 4²)^½ / 3
    without = {"choices": {"b": {"accuracy": 0.5}}}
    assert domain_mean(without) == (50.0, None)
