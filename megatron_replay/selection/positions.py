"""Selects the positions of a document that Stage 0 records: all, random, the last, by confidence.

Draws are a pure function of (seed, document): independent of layout, order and packing. They use
only what numpy keeps stable between releases: SeedSequence, Philox and its raw 64-bit numbers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_replay.errors import ConfigError, DataError

STRATEGIES = ("bucket", "random", "last-token", "all")
_Numbers = npt.NDArray[np.uint64]
_Places = npt.NDArray[np.int64]


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

    random, bucket: n = max(1, round half up of fraction * len(eligible)) positions. Each eligible
    position gets a random number, and the smallest are taken.
    bucket: sort by confidence (ties by position), cut into ``num_buckets`` runs whose sizes
    differ by at most one (the longer ones first), take the same number from each. A remainder is
    taken one each from buckets drawn at random; what a bucket lacks is taken from the others.

    Args:
        strategy: one of ``STRATEGIES``.
        eligible: int32 [E], positions whose label carries loss, ascending.
        document_id, seed: the draw depends on these only; not negative.
        confidence: fp32 [E], for bucket; log-probabilities serve as well, since only order matters.
        fraction: of the eligible positions, in (0, 1]; for random and bucket.
        num_buckets: B, 1 or more.
        last_n: for last-token, how many from the end, 1 or more.

    Raises:
        ConfigError: no such strategy, or an option is out of range.
        DataError: bucket without a confidence for each eligible position, or one that is NaN.
    """
    _check_options(strategy, seed, fraction, num_buckets, last_n)
    if strategy == "all" or len(eligible) == 0:
        return eligible
    if strategy == "last-token":
        return eligible[-last_n:]
    count = max(1, int(np.floor(fraction * len(eligible) + 0.5)))
    bits = np.random.Philox(np.random.SeedSequence([seed, document_id]))
    numbers = bits.random_raw(len(eligible))
    if strategy == "random":
        return eligible[np.sort(_smallest(numbers, count))]
    if confidence is None or confidence.shape != eligible.shape or np.isnan(confidence).any():
        raise DataError(
            "the bucket strategy needs the confidence of every eligible position",
            where=f"document {document_id}",
            expected=f"{len(eligible)} numbers",
            found=None if confidence is None else f"shape {confidence.shape}, or NaN",
        )
    buckets = np.array_split(np.argsort(confidence, kind="stable"), num_buckets)
    shares = _shares([len(bucket) for bucket in buckets], count, bits.random_raw(num_buckets))
    picks = [
        bucket[_smallest(numbers[bucket], share)]
        for bucket, share in zip(buckets, shares, strict=True)
    ]
    return eligible[np.sort(np.concatenate(picks))]


def _smallest(numbers: _Numbers, count: int) -> _Places:
    return np.argsort(numbers, kind="stable")[:count]


def _shares(sizes: list[int], count: int, numbers: _Numbers) -> list[int]:
    """How many to take from each bucket: repeatedly one from every bucket that has any left."""
    shares = np.zeros(len(sizes), np.int64)
    while (left := count - int(shares.sum())) > 0:
        open_buckets = np.flatnonzero(shares < sizes)
        shares[open_buckets[_smallest(numbers[open_buckets], left)]] += 1
    return [int(share) for share in shares]


def _check_options(
    strategy: str, seed: int, fraction: float, num_buckets: int, last_n: int
) -> None:
    if strategy not in STRATEGIES:
        raise ConfigError(
            "no such strategy",
            where="position_strategy",
            expected=", ".join(STRATEGIES),
            found=repr(strategy),
        )
    for name, expected, value, fits in (
        ("seed", "0 or more", seed, seed >= 0),
        ("fraction", "above 0, at most 1", fraction, 0 < fraction <= 1),
        ("num_buckets", "1 or more", num_buckets, num_buckets >= 1),
        ("last_n", "1 or more", last_n, last_n >= 1),
    ):
        if not fits:
            raise ConfigError("out of range", where=name, expected=expected, found=value)
