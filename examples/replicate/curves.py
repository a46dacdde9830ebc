"""Forgetting at equal gain: learning-rate sweeps, compared as curves.

A method that forgets less and learns less may only have had a lower learning rate. So at one domain
score, each seed's forgetting is interpolated between the neighbouring learning rates of that seed,
and the differences from the reference's are averaged over seeds. Nothing is extrapolated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import pandas as pd

from examples.replicate.tables import GROUP, in_table, interval, reference_of

#: Where two curves are compared, as shares of the range of scores that both reach.
SHARES = (0.25, 0.5, 0.75)
Point = tuple[float, float]


def curve(rows: pd.DataFrame, seed: int) -> list[Point]:
    """(domain mean, forgetting) of one seed's runs, by learning rate."""
    own = rows[rows.seed == seed].sort_values("lr")
    points = zip(own.domain_mean, own.forgetting, strict=True)
    return [(x, y) for x, y in points if not math.isnan(x)]


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


def differences(
    ours: Sequence[Sequence[Point]], reference: Sequence[Sequence[Point]], at: Sequence[float]
) -> list[float] | None:
    """Our forgetting less the reference's at the score ``at`` of each seed.

    None where any seed's curve does not reach it: leaving such seeds out would compare lucky ones.
    """
    found = []
    for a, b, x in zip(ours, reference, at, strict=True):
        # A single run is compared at its own score.
        y_a = a[0][1] if len(a) == 1 and a[0][0] == x else interpolate(a, x)
        y_b = interpolate(b, x)
        if y_a is None or y_b is None:
            return None
        found.append(y_a - y_b)
    return found


def compare(
    own: pd.DataFrame, reference: pd.DataFrame, floor: float
) -> Iterator[tuple[float | None, list[float] | str]]:
    """(score, differences over seeds, or the reason why there are none).

    The scores are at `SHARES` of the range that both curves reach with every seed they share and
    that is above ``floor``, the base's score. A method with one learning rate is compared at each
    seed's own score, and its mean is given.
    """
    seeds = sorted(set(own.seed) & set(reference.seed))
    ours, theirs = ([curve(rows, seed) for seed in seeds] for rows in (own, reference))
    if not seeds or not all(ours):
        yield None, "no seed in common"
    elif own.lr.nunique() == 1:
        scores = [points[0][0] for points in ours]
        at = math.fsum(scores) / len(scores)
        if at <= floor:
            yield at, "no gain over the base"
        else:
            yield at, differences(ours, theirs, scores) or "the reference does not reach it"
    else:
        reached = common_range([*ours, *theirs])
        if reached is None:
            yield None, "no score that both reach with every seed"
        elif reached[1] <= floor:
            yield None, "no gain over the base that both reach with every seed"
        else:
            low = max(reached[0], floor)
            for share in SHARES:
                at = low + share * (reached[1] - low)
                yield at, differences(ours, theirs, [at] * len(seeds)) or "not reached"


def equal_gain(rows: pd.DataFrame) -> pd.DataFrame:
    """Every method's sweep against the reference's, for each base and size."""
    found = []
    for group, of_group in rows.groupby(GROUP, sort=False):
        own = in_table(of_group, "sweep")
        floor = of_group[of_group.method == "Base"].domain_mean.iloc[-1]
        own = own[own.method != "Base"]
        name = reference_of(own)
        reference = own[own.method == name]
        if reference.lr.nunique() < 2:
            continue
        for method, its in own[own.method != name].groupby("method", observed=True):
            for at, result in compare(its, reference, -math.inf if math.isnan(floor) else floor):
                found.append({
                    **dict(zip(GROUP, group, strict=True)),
                    "method": method,
                    "against": name,
                    "domain mean, %": "–" if at is None else f"{at:.1f}",
                    "ΔPPL difference": result
                    if isinstance(result, str)
                    else interval(result, "+.2f"),
                    "n": "–" if isinstance(result, str) else str(len(result)),
                })  # fmt: skip
    return pd.DataFrame(found)
