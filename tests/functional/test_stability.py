"""Stability metrics against numpy's own fits and numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.errors import DataError
from megatron_replay.functional import (
    gradient_norm_cv,
    loss_std,
    loss_variance,
    spikes,
)

numbers = st.lists(st.floats(-10, 10), min_size=5, max_size=60)


@given(values=numbers)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_loss_variance_is_that_of_the_residuals_of_polyfit(values: list[float]) -> None:
    half = np.array(values[len(values) // 2 :])
    steps = np.arange(len(half))
    residual = half - np.polyval(np.polyfit(steps, half, 1), steps)
    assert loss_variance(values) == pytest.approx(np.mean(residual**2), rel=1e-6, abs=1e-9)
    assert loss_std(values) == math.sqrt(loss_variance(values))


@given(values=numbers, slope=st.floats(-3, 3), level=st.floats(-3, 3))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_a_trend_is_not_noise(values: list[float], slope: float, level: float) -> None:
    tilted = [v + level + slope * i for i, v in enumerate(values)]
    assert loss_std(tilted) == pytest.approx(loss_std(values), abs=1e-6)


def test_the_first_half_does_not_count_and_two_points_have_no_noise() -> None:
    assert loss_variance([9, -9, 9, 1, -1, 1]) == loss_variance([0, 0, 0, 1, -1, 1]) > 0
    assert loss_variance([5.0]) == loss_variance([1.0, 7.0, 3.0, 8.0]) == 0.0


def test_gradient_norm_cv_leaves_warm_up_out() -> None:
    assert gradient_norm_cv([100, 100, 1, 3], warmup_steps=2) == pytest.approx(0.5)
    assert gradient_norm_cv([4.0]) == 0.0
    with pytest.raises(DataError, match="no step is left after warm-up"):
        gradient_norm_cv([1, 2], warmup_steps=2)
    with pytest.raises(DataError, match="mean is 0"):
        gradient_norm_cv([0.0, 0.0])


def test_spikes_by_hand() -> None:
    values = np.tile([1.0, -1.0], 150)  # every window: mean 0, sigma 1
    values[[140, 141, 142]] = 50.0, 1000.0, 10000.0  # one excursion
    values[299] = 1000.0  # above 6 sigma of a window that still holds nothing of the first
    found = spikes(values)
    assert found.indices == (140, 299)
    assert (found.count, found.judged, found.rate) == (2, 172, 2 / 172)


def test_six_sigma_is_the_line_and_sigma_is_of_the_values_before() -> None:
    window = [1.0, -1.0] * 64
    assert spikes([*window, 6.0]).count == 0
    assert spikes([*window, 6.001]).count == 1
    assert spikes([*window, -1000.0]).count == 0  # a dip is none
    assert spikes([6.0, -6.0], window=1).count == 0


def test_a_constant_series_has_no_spike_by_rounding() -> None:
    for value in (0.1, 0.3, 0.7, 1.1, 2.3):  # a mean of 100 of them is not always the value
        assert spikes([value] * 300, window=100).count == 0
    assert spikes([0.1] * 500 + [0.2]).count == 1


def test_a_short_series_is_not_judged() -> None:
    found = spikes([0.0] * 127 + [1e9])
    assert (found.count, found.judged, found.rate) == (0, 0, 0.0)


@pytest.mark.parametrize("metric", [loss_std, gradient_norm_cv, spikes])
def test_a_value_that_is_not_finite_is_refused_by_place(metric: object) -> None:
    with pytest.raises(DataError, match=r"\[1\]: a value is not finite \(found nan\)"):
        metric([1.0, math.nan, 2.0])  # type: ignore[operator]
    with pytest.raises(DataError, match="expected a series"):
        metric([])  # type: ignore[operator]
