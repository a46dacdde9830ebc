"""Which positions of a document Stage 0 records: all, random, the last ones, or by confidence.

Draws are a pure function of (seed, document): independent of layout, order and packing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_replay.errors import ConfigError

STRATEGIES = ("bucket", "random", "last-token", "all")


def select_positions(
    strategy: str,
    *,
    eligible: npt.NDArray[np.int32],
    document_id: int,
    seed: int,
    confidence: npt.NDArray[np.float32] | None = None,
    fraction: float = 0.5,
    num_buckets: int = 5,
    last_n: int = 1,
) -> npt.NDArray[np.int32]:
    """Choose from a document's eligible positions. Ascending; empty only when ``eligible`` is.

    random, bucket: n = max(1, round half up of fraction * len(eligible)) positions.
    bucket: sort by confidence (ties by position), cut into ``num_buckets`` runs of as equal size as
    can be, draw the same number from each; what does not divide goes to buckets drawn at random,
    and what a small bucket cannot give is taken from the others in turn.

    Args:
        strategy: one of ``STRATEGIES``.
        eligible: int32 [E], positions whose label carries loss, ascending.
        confidence: fp32 [E], for bucket.
        last_n: for last-token, how many from the end.

    Raises:
        ConfigError: no such strategy, or bucket without confidence.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(
            "no such strategy",
            where="--position-strategy",
            expected=", ".join(STRATEGIES),
            found=repr(strategy),
        )
    if strategy == "all" or len(eligible) == 0:
        return eligible
    if strategy == "last-token":
        return eligible[-last_n:]
    count = max(1, int(np.floor(fraction * len(eligible) + 0.5)))
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, document_id])))
    if strategy == "random":
        return np.sort(generator.choice(eligible, count, replace=False))
    if confidence is None:
        raise ConfigError("the bucket strategy needs confidence", where="--position-strategy")
    order = np.argsort(confidence, kind="stable")
    buckets = [bucket for bucket in np.array_split(order, num_buckets) if len(bucket)]
    picks = [
        generator.choice(bucket, share, replace=False)
        for bucket, share in zip(buckets, _shares(buckets, count, generator), strict=True)
    ]
    return eligible[np.sort(np.concatenate(picks))]


def _shares(
    buckets: list[npt.NDArray[np.int64]], count: int, generator: np.random.Generator
) -> list[int]:
    """How many to draw from each bucket: in turn, one from every bucket that has any left."""
    room = np.array([len(bucket) for bucket in buckets])
    shares = np.zeros(len(buckets), np.int64)
    while (left := count - int(shares.sum())) > 0:
        open_buckets = np.flatnonzero(shares < room)
        if left < len(open_buckets):
            open_buckets = generator.choice(open_buckets, left, replace=False)
        shares[open_buckets] += 1
    return [int(share) for share in shares]
