"""Forgetting at equal gain: learning-rate sweeps, compared as curves.

A method that forgets less and learns less may only have had a lower learning rate. So its
forgetting is interpolated between neighbouring learning rates at one domain score, and full
softmax's with AdamW at the same score is subtracted. Nothing is extrapolated.

Each replicate of the bootstrap draws the domain's questions, those of each general benchmark, and
at each rate the seeds, with replacement; the same questions for all methods. So an interval covers
the order of the data only where a rate has several seeds; it is up to √2 too narrow where two
questions ask for one thing (Spider's paraphrases, the causes). The text of the perplexity is not
drawn again.

Shapes: B replicates, the first of which counts everything once; N questions, R learning rates, C
the gain and each of `MEASURES`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from examples.replicate.results import Row

#: Where two curves are compared, as shares of the range of scores that both reach.
SHARES = (0.25, 0.5, 0.75)
REPLICATES = 1000
#: A score that either curve misses in more of the replicates has no interval.
MOST_MISSED = 0.1
Point = tuple[float, float]
Counts = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]


class Draws(NamedTuple):
    """How often each question counts in each replicate: the domain's, the general benchmarks'."""

    hits_BN: Counts
    general_BN: dict[str, Counts]


def draw(base: Row, replicates: int = REPLICATES) -> Draws:
    """As many questions as there are, with replacement, for all models of the base's domain."""
    rng = np.random.default_rng(0)

    def counts(n: int) -> Counts:
        some = rng.multinomial(n, [1 / n] * n, size=replicates)
        return np.concatenate([np.ones((1, n), dtype=some.dtype), some])

    return Draws(
        counts(len(base.hits)), {name: counts(len(of)) for name, of in base.general.items()}
    )


def gain(row: Row, draws: Draws) -> Values:
    """The domain's score in per cent, [B]."""
    return 100 * (draws.hits_BN @ row.hits) / len(row.hits)


def forgetting(row: Row, base: Row, draws: Draws) -> Values:
    """ΔPPL of general text, [B]."""
    return np.full(len(draws.hits_BN), row.perplexity - base.perplexity)


def lost(row: Row, base: Row, draws: Draws) -> Values:
    """100 less the retention, [B]: the mean over benchmarks of 100 · score / the base's score."""
    kept = [
        (counts_BN @ row.general[name]) / np.maximum(counts_BN @ base.general[name], 1)
        for name, counts_BN in draws.general_BN.items()
    ]
    return 100 - 100 * np.mean(kept, axis=0)


#: What is compared at equal gain, by title.
MEASURES = {"ΔPPL": forgetting, "retention lost, points": lost}


def curve(rows: Sequence[Row], base: Row, draws: Draws) -> Values:
    """Means over seeds at each rate, in their order, [B, R, C]."""
    rng, points = np.random.default_rng(1), []
    for rate in sorted({row.lr for row in rows}):
        seeds_SBC = np.array([
            np.stack([gain(row, draws), *(of(row, base, draws) for of in MEASURES.values())], -1)
            for row in rows if row.lr == rate
        ])  # fmt: skip
        count, replicates, _ = seeds_SBC.shape
        chosen_SB = rng.integers(count, size=(count, replicates))
        chosen_SB[:, 0] = np.arange(count)
        points.append(np.take_along_axis(seeds_SBC, chosen_SB[..., None], axis=0).mean(0))
    return np.stack(points, axis=1)


def rising(points: Sequence[Point]) -> list[tuple[Point, Point]]:
    """The stretches of a curve on which the score does not fall as the learning rate rises.

    Where it falls the rate is too high: a lower one has the same score for less forgetting.
    """
    return [(a, b) for a, b in itertools.pairwise(points) if a[0] <= b[0]]


def interpolate(points: Sequence[Point], x: float) -> float | None:
    """The least y at which a rising stretch of the line through ``points`` passes x, or None."""
    found = []
    for (x0, y0), (x1, y1) in rising(points):
        # At an end, its own y: beside a run that diverged the formula has 0 · ∞.
        found += [y for end, y in ((x0, y0), (x1, y1)) if end == x]
        if x0 < x < x1:
            found.append(y0 + (y1 - y0) * (x - x0) / (x1 - x0))
    return min(found, key=lambda y: (math.isnan(y), y), default=None)


def common_range(curves: Sequence[Sequence[Point]]) -> tuple[float, float] | None:
    """The scores that every one of the ``curves`` reaches, or None."""
    low, high = -math.inf, math.inf
    for points in curves:
        reached = [x for ends in rising(points) for x, _ in ends]
        low = max([low, min(reached, default=math.inf)])
        high = min([high, max(reached, default=-math.inf)])
    return (low, high) if -math.inf < low <= high < math.inf else None


def compare(
    own: Sequence[Row], reference: Sequence[Row], base: Row
) -> Iterator[tuple[float, dict[str, Values]]]:
    """(score, replicates [B] of the difference in each of `MEASURES`), the first the estimate.

    The scores are at `SHARES` of the range that both curves reach and that is above the base's. A
    difference is NaN in a replicate in which either curve does not reach the score.
    """
    draws = draw(base)
    pair = [curve(rows, base, draws) for rows in (own, reference)]
    reached = common_range([[(x, 0.0) for x in of_BRC[0, :, 0]] for of_BRC in pair])
    floor = gain(base, draws)[0]
    if reached is None or reached[1] <= floor:
        return
    low = max(reached[0], floor)
    for share in SHARES:
        score = low + share * (reached[1] - low)
        found = {}
        for column, name in enumerate(MEASURES, start=1):
            ours, theirs = (
                [interpolate(points[:, [0, column]].tolist(), score) for points in of_BRC]
                for of_BRC in pair
            )
            found[name] = np.array([
                math.nan if a is None or b is None else a - b
                for a, b in zip(ours, theirs, strict=True)
            ])  # fmt: skip
        yield score, found


def interval(values: Values) -> tuple[float, float] | None:
    """The 95 % percentile interval of ``values`` without NaN; None where too many are missing."""
    known = values[~np.isnan(values)]
    if len(known) < (1 - MOST_MISSED) * len(values):
        return None
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)
