"""What was kept of the base's general scores."""

from __future__ import annotations

import pytest

from megatron_replay.errors import DataError
from megatron_replay.evaluation.retention import general_scores, retention


def test_only_general_benchmarks_count() -> None:
    choice = {"accuracy": 0.5, "accuracy_per_byte": 0.9}
    result = {
        "choices": {"a": choice | {"general": True}, "b": choice | {"general": False}},
        "lm_eval": {
            "c": {"score": 0.2, "general": True}, "d": {"score": 0.3, "general": False}
        },
    }  # fmt: skip
    assert general_scores(result) == {"a": 0.5, "c": 0.2}
    assert general_scores({}) == {}


def test_percent_of_the_base() -> None:
    assert retention({"a": 0.4, "b": 0.6}, {"a": 0.5, "b": 0.4}) == pytest.approx(
        {"a": 80.0, "b": 150.0}
    )


def test_a_base_without_a_score_is_named() -> None:
    with pytest.raises(DataError, match="general benchmark b: the base scores 0"):
        retention({"a": 0.4, "b": 0.6}, {"a": 0.5, "b": 0.0})
