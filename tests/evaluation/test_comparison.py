"""Means, intervals and curves against numbers found by hand."""

from __future__ import annotations

import math

import pytest

from megatron_replay.evaluation.comparison import (
    common_range,
    curve_difference,
    interpolate,
    paired_difference,
    point_difference,
    spread,
    student_t,
)
from tests.evaluation.synthetic_rows import row


def score(of: object) -> float | None:
    return of.evaluation.get("x")  # type: ignore[attr-defined]


def loss(of: object) -> float | None:
    return of.evaluation.get("y")  # type: ignore[attr-defined]


def points(seed: int, *of: tuple[float, float]) -> list:
    return [row("m", seed=seed, lr=i, evaluation={"x": x, "y": y}) for i, (x, y) in enumerate(of)]


def test_values_beyond_a_float() -> None:
    """A diverged model's perplexity may be close to the largest there is."""
    for values in ([1e308, 1e308, 1e308], [1e300, 1.0]):
        found = spread(values)
        assert found is not None
        assert (found.mean, found.std, found.n) == (math.inf, None, len(values))


def test_student_t_against_printed_tables() -> None:
    for freedom, value in ((1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622)):
        assert student_t(freedom) == pytest.approx(value, abs=5e-5)
    assert student_t(30) == pytest.approx(2.0423, abs=5e-5)
    assert student_t(4, 0.99) == pytest.approx(4.6041, abs=5e-5)


def test_spread() -> None:
    """1, 2, 6: mean 3, deviations −2, −1, 3, variance 14/2."""
    found = spread([1.0, None, 2.0, 6.0])
    assert found is not None
    assert (found.mean, found.n) == (3.0, 3)
    assert found.std == pytest.approx(math.sqrt(7))
    assert found.half_width == pytest.approx(4.30265 * math.sqrt(7 / 3), rel=1e-5)
    assert spread([None]) is None
    one = spread([5.0])
    assert one is not None
    assert (one.mean, one.std, one.half_width) == (5.0, None, None)


def test_seeds_are_paired() -> None:
    """Differences 1 and 3 of the shared seeds 1 and 2, whatever the seeds themselves do."""
    a = [row("a", seed=s, evaluation={"x": x}) for s, x in ((2, 103.0), (1, 11.0), (4, 0.0))]
    b = [row("b", seed=s, evaluation={"x": x}) for s, x in ((1, 10.0), (2, 100.0), (3, 9.0))]
    found = paired_difference(a, b, score)
    assert found is not None
    assert (found.mean, found.n, found.std) == (2.0, 2, pytest.approx(math.sqrt(2)))
    assert found.half_width == pytest.approx(12.7062, rel=1e-5)
    assert paired_difference(a[2:], b, score) is None


def test_interpolation_never_leaves_the_curve() -> None:
    turning = [(10.0, 1.0), (20.0, 3.0), (16.0, 4.0), (8.0, 6.0), (12.0, 0.0)]
    assert interpolate(turning, 12.5) == 1.5
    assert interpolate(turning, 18.0) == 2.6
    assert interpolate(turning, 20.0) == 3.0
    assert interpolate(turning, 11.0) == 1.2  # the last stretch has 1.5 there
    assert interpolate(turning, 12.0) == 0.0
    assert interpolate(turning, 9.0) == 4.5
    assert interpolate(turning, 20.01) is interpolate(turning, 7.99) is None
    assert interpolate([(20.0, 3.0), (16.0, 0.0)], 18.0) is None  # too high a rate from the start
    assert interpolate([(5.0, 2.0), (5.0, 1.0)], 5.0) == 1.0
    assert interpolate([], 1.0) is None


def test_a_curve_beside_a_run_that_diverged() -> None:
    nan, inf = math.nan, math.inf
    diverged = [(10.0, 1.0), (20.0, inf)]
    assert [interpolate(diverged, x) for x in (10.0, 15.0, 20.0)] == [1.0, inf, inf]
    assert interpolate([(10.0, 1.0), (20.0, nan)], 10.0) == 1.0
    twice = [(10.0, 1.0), (20.0, nan), (10.0, 4.0), (20.0, 6.0)]
    assert interpolate(twice, 15.0) == interpolate(twice[2:] + twice[:2], 15.0) == 5.0


def test_curves_at_one_score() -> None:
    """Seed 0 at 15: 2 against 5; seed 1: 1 against 2. Differences −3 and −1."""
    a = points(0, (10, 1), (20, 3)) + points(1, (12, 0), (18, 2))
    b = points(0, (10, 2), (20, 8)) + points(1, (14, 1), (16, 3)) + points(2, (0, 0))
    found = curve_difference(a, b, at=15, x=score, y=loss)
    assert found is not None
    assert (found.mean, found.n, found.std) == (-2.0, 2, pytest.approx(math.sqrt(2)))
    assert common_range(a, b, x=score, y=loss) == (14, 16)
    assert curve_difference(a, b, at=13, x=score, y=loss) is None  # seed 1 of b begins at 14
    assert common_range(a, points(0, (30, 1), (40, 2)), x=score, y=loss) is None
    assert common_range(a, points(7, (10, 1)), x=score, y=loss) is None


def test_a_point_against_a_curve() -> None:
    b = points(0, (10, 2), (20, 8)) + points(1, (10, 0), (20, 10))
    found = point_difference(points(0, (15, 4)) + points(1, (12, 4)), b, x=score, y=loss)
    assert found is not None
    assert (found.mean, found.n) == (0.5, 2)  # 4 − 5 and 4 − 2
    assert point_difference(points(0, (15, 4)) + points(1, (9, 4)), b, x=score, y=loss) is None
