"""Forgetting at equal gain: sweeps over learning rates, compared as curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_replay.evaluation import scores
from megatron_replay.evaluation.comparison import (
    Measure,
    Spread,
    common_range,
    curve_difference,
    point_difference,
    shared_seeds,
    spread,
)
from megatron_replay.evaluation.paper_tables import sweeps
from megatron_replay.evaluation.rows import Row
from megatron_replay.evaluation.tables import (
    Group,
    by_method,
    groups_of,
    in_table,
    reference_of,
    reference_rows,
)

#: Where two curves are compared, as shares of the range of scores that both reach.
_SHARES = (0.25, 0.5, 0.75)
_forgetting = scores.FORGETTING.measure


@dataclass(frozen=True, kw_only=True)
class CurveComparison:
    """ΔPPL of a method's sweep less that of the reference's, at one domain score.

    Attributes:
        at: the score in per cent; None where there is none to compare at.
        own_score: whether ``at`` is the mean score of a method with one learning rate only, each
            seed of which, of those that the reference has too, is held against the reference's
            curve at its own score.
        difference: over seeds; None where it cannot be told without extrapolating.
        why_not: then, why.
    """

    base: str
    size: str
    method: str
    reference: str
    at: float | None
    own_score: bool = False
    difference: Spread | None
    why_not: str | None


def compare_curves(
    rows: Sequence[Row], *, reference: str | None = None, at_scores: Sequence[float] = ()
) -> list[CurveComparison]:
    """Every method's sweep against the reference's, for each base and size.

    Compared at ``at_scores``, else at a quarter, half and three quarters of the range of domain
    scores that both reach with every seed and that are above the base's: without a gain there is
    no price of one.
    """
    domain = scores.domain_mean(rows)
    return [
        comparison
        for group in groups_of(rows)
        for comparison in _compare_group(rows, domain, group, reference, at_scores)
    ]


def _compare_group(
    rows: Sequence[Row],
    domain: Measure,
    group: Group,
    asked: str | None,
    at_scores: Sequence[float],
) -> list[CurveComparison]:
    own = [row for row in in_table(rows, "sweep", group) if not row.is_base]
    reference = reference_of(own, asked)
    if reference is None:
        return []
    bases = [row for row in rows if row.is_base and (row.base, row.size) == group]
    floor = domain(bases[-1]) if bases else None
    found = []
    for method, its in sweeps(rows, group).items():
        against = reference_rows(own, its, reference)
        if _rates(against) < 2:
            continue
        for at, own_score, difference, why_not in _compare(its, against, domain, floor, at_scores):
            found.append(
                CurveComparison(
                    base=group[0],
                    size=group[1],
                    method=method,
                    reference=by_method(against[0])[0],
                    at=at,
                    own_score=own_score,
                    difference=difference,
                    why_not=why_not,
                )
            )
    return found


def _rates(rows: Sequence[Row]) -> int:
    return len({row.lr for row in rows})


Compared = tuple[float | None, bool, Spread | None, str | None]


def _compare(
    its: Sequence[Row],
    against: Sequence[Row],
    domain: Measure,
    floor: float | None,
    at_scores: Sequence[float],
) -> list[Compared]:
    least = -math.inf if floor is None else floor
    shared = shared_seeds(its, against)
    if not shared:
        return [(None, False, None, "no seed in common")]
    if _rates(its) == 1:
        mean = spread([domain(row) for row in its if row.seed in shared])
        if mean and mean.mean <= least:
            return [(mean.mean, True, None, "no gain over the base")]
        difference = point_difference(its, against, x=domain, y=_forgetting)
        why_not = None if difference else "the reference does not reach its score with every seed"
        return [(mean.mean if mean else None, True, difference, why_not)]
    if not at_scores:
        common = common_range(its, against, x=domain, y=_forgetting)
        if common is None:
            return [(None, False, None, "no score that both reach with every seed")]
        low, high = max(common[0], least), common[1]
        if high <= least:
            return [(None, False, None, "no gain over the base that both reach with every seed")]
        at_scores = [low + share * (high - low) for share in _SHARES]
    found: list[Compared] = []
    for at in at_scores:
        difference = curve_difference(its, against, at=at, x=domain, y=_forgetting)
        found.append((at, False, difference, None if difference else "not reached by every seed"))
    return found
