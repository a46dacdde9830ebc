"""Means over seeds and how sure they are; methods compared seed by seed and curve by curve.

With n seeds, sample standard deviation s and Student's t of n − 1 degrees of freedom, the 95 %
confidence interval of a mean is  mean ± t₀.₉₇₅ · s / √n.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_replay.evaluation.rows import Row

#: What is measured of a row; None where it was not.
Measure = Callable[[Row], float | None]


@dataclass(frozen=True)
class Spread:
    """Values of one quantity over seeds.

    Attributes:
        mean: of the ``n`` values.
        std: the sample's (n − 1), None for one value.
        half_width: half the 95 % confidence interval of the mean, None for one value.
    """

    mean: float
    std: float | None
    half_width: float | None
    n: int


def spread(values: Sequence[float | None]) -> Spread | None:
    """Mean, sample deviation and 95 % interval of the values that are there; None for none."""
    known = [value for value in values if value is not None]
    n = len(known)
    if n == 0:
        return None
    try:
        mean = math.fsum(known) / n
        if n == 1 or not math.isfinite(mean):
            return Spread(mean, None, None, n)
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (n - 1))
    except OverflowError:  # perplexities of diverged models, whose squares no float holds
        return Spread(math.inf, None, None, n)
    return Spread(mean, std, student_t(n - 1) * std / math.sqrt(n), n)


def student_t(freedom: int, confidence: float = 0.95) -> float:
    """The t with P(|T| ≤ t) = confidence, T of ``freedom`` degrees: bisection of the exact sum."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _within(theta: float, freedom: int) -> float:
    """P(|T| ≤ √ν tan θ), a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    odd = freedom % 2
    term = math.cos(theta) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= math.cos(theta) ** 2 * (k - 1) / k
        total += term
    if odd:
        return 2 / math.pi * (theta + math.sin(theta) * total)
    return math.sin(theta) * total


def paired_difference(
    rows_a: Sequence[Row], rows_b: Sequence[Row], measure: Measure
) -> Spread | None:
    """Measure of a less that of b, over the seeds that both have; None where they share none.

    What all methods have in common with a seed (its data, its order) drops out of the difference.
    """
    values_b = {row.seed: measure(row) for row in rows_b}
    return spread(
        [
            value - other
            for row in rows_a
            if (value := measure(row)) is not None and (other := values_b.get(row.seed)) is not None
        ]
    )


Point = tuple[float, float]


def curve(rows: Sequence[Row], seed: int, x: Measure, y: Measure) -> list[Point]:
    """(x, y) of one seed's rows, in the order of their learning rates."""
    own = sorted((row for row in rows if row.seed == seed), key=lambda row: row.lr or 0.0)
    points = [(x(row), y(row)) for row in own]
    return [(u, v) for u, v in points if u is not None and v is not None]


def rising(points: Sequence[Point]) -> list[tuple[Point, Point]]:
    """The stretches of a curve on which x does not fall as the learning rate rises.

    Where it falls, the rate is too high: what is forgotten there is no price of x, which a lower
    rate, run or not, has for less.
    """
    return [(a, b) for a, b in itertools.pairwise(points) if a[0] <= b[0]]


def interpolate(points: Sequence[Point], x: float) -> float | None:
    """The least y at which a rising stretch of the line through ``points`` passes x.

    None where none does: nothing is extrapolated.
    """
    found = []
    for (u0, v0), (u1, v1) in rising(points):
        # At an end, its own y: beside a run that diverged the line's formula has 0 · ∞.
        found += [v for u, v in ((u0, v0), (u1, v1)) if u == x]
        if u0 < x < u1:
            found.append(v0 + (v1 - v0) * (x - u0) / (u1 - u0))
    return min(found, key=lambda v: (math.isnan(v), v), default=None)


def curve_difference(
    rows_a: Sequence[Row], rows_b: Sequence[Row], *, at: float, x: Measure, y: Measure
) -> Spread | None:
    """y of a's curve less that of b's where x is ``at``, paired by seed.

    None where any shared seed's curve does not reach ``at``: leaving such seeds out would compare
    the lucky ones.
    """
    differences = []
    for seed in shared_seeds(rows_a, rows_b):
        a, b = (interpolate(curve(rows, seed, x, y), at) for rows in (rows_a, rows_b))
        if a is None or b is None:
            return None
        differences.append(a - b)
    return spread(differences)


def shared_seeds(rows_a: Sequence[Row], rows_b: Sequence[Row]) -> list[int]:
    """Seeds that both have, in order."""
    return sorted({row.seed for row in rows_a} & {row.seed for row in rows_b})


def common_range(
    rows_a: Sequence[Row], rows_b: Sequence[Row], *, x: Measure, y: Measure
) -> tuple[float, float] | None:
    """The x that both curves reach with every seed they share; None where there is none."""
    low, high = -math.inf, math.inf
    for seed in shared_seeds(rows_a, rows_b):
        for rows in (rows_a, rows_b):
            reached = [point[0] for ends in rising(curve(rows, seed, x, y)) for point in ends]
            low = max([low, min(reached, default=math.inf)])
            high = min([high, max(reached, default=-math.inf)])
    return (low, high) if -math.inf < low <= high < math.inf else None


def point_difference(
    rows_a: Sequence[Row], rows_b: Sequence[Row], *, x: Measure, y: Measure
) -> Spread | None:
    """y of a's only point of each seed less that of b's curve at the same x; None as above."""
    differences = []
    for seed in shared_seeds(rows_a, rows_b):
        points = curve(rows_a, seed, x, y)
        b = interpolate(curve(rows_b, seed, x, y), points[0][0]) if len(points) == 1 else None
        if b is None:
            return None
        differences.append(points[0][1] - b)
    return spread(differences)
