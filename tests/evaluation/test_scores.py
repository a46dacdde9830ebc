"""Scores by task, and retention of general benchmarks, from an evaluation's results."""

from __future__ import annotations

import pytest

from megatron_replay.errors import DataError
from megatron_replay.evaluation.scores import (
    domain_mean,
    domain_scores,
    general_scores,
    retention,
)

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
    assert general_scores(RESULT) == {"a": 50.0, "c": 20.0}
    assert domain_scores(RESULT) == {"shop": 25.0, "b": 50.0, "d": 20.0}
    assert general_scores({}) == domain_scores({}) == {}


def test_the_mean_has_the_error_of_independent_tasks() -> None:
    mean, error = domain_mean(RESULT)
    assert mean == pytest.approx(95 / 3)
    assert error == pytest.approx(5 / 3)  # (0² + 3² + 4²)^½ / 3
    without = {"choices": {"b": {"accuracy": 0.5}}}
    assert domain_mean(without) == (50.0, None)


def test_retention_is_a_percentage_of_the_base() -> None:
    found = retention({"a": 40, "b": 60}, {"a": 50, "b": 40})
    assert found == pytest.approx({"a": 80.0, "b": 150.0})
    with pytest.raises(DataError, match="general benchmark b: the base scores 0"):
        retention({"a": 40, "b": 60}, {"a": 50, "b": 0})
