"""Which positions are drawn: numbers, buckets, order, and that only (seed, document) matters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.errors import ConfigError, DataError
from megatron_replay.functional import select_positions


def draw(strategy: str, eligible: Any, **options: Any) -> list[int]:
    options = {"seed": 1, "document_id": 2, **options}
    return select_positions(strategy, eligible=np.asarray(eligible, np.int32), **options).tolist()


cases = st.tuples(
    st.integers(0, 70), st.floats(0.01, 1.0), st.integers(1, 9), st.integers(0, 2**40)
)


@given(case=cases, strategy=st.sampled_from(["random", "bucket"]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_number_order_and_purity(case: tuple[int, float, int, int], strategy: str) -> None:
    size, fraction, num_buckets, document = case
    rng = np.random.default_rng(size)
    eligible = np.sort(rng.choice(500, size, replace=False)).astype(np.int32)
    options = {
        "confidence": rng.integers(0, 4, size).astype(np.float32),  # many ties
        "fraction": fraction,
        "num_buckets": num_buckets,
        "document_id": document,
    }
    chosen = draw(strategy, eligible, **options)
    assert len(chosen) == (max(1, int(np.floor(fraction * size + 0.5))) if size else 0)
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(eligible.tolist())
    assert chosen == draw(strategy, eligible, **options)


def bucket_counts(fraction: float, document: int) -> np.ndarray:
    """Positions from each of five buckets of 20 confidences."""
    confidence = np.random.default_rng(0).permutation(100).astype(np.float32)
    options = {"confidence": confidence, "fraction": fraction, "document_id": document}
    chosen = draw("bucket", range(100), **options)
    return np.bincount((confidence[chosen] // 20).astype(int), minlength=5)


def test_every_bucket_gives_the_same_number_and_a_remainder_comes_by_chance() -> None:
    extra = np.zeros(5, int)
    for document in range(300):
        assert bucket_counts(0.25, document).tolist() == [5] * 5
        counts = bucket_counts(0.22, document)
        assert sorted(counts.tolist()) == [4, 4, 4, 5, 5]
        extra += counts - 4
    assert (abs(extra - 120) < 40).all()  # 5 standard deviations of a binomial(300, 0.4)


def test_small_buckets_are_filled_up_from_the_others() -> None:
    confidence = np.arange(7, dtype=np.float32)
    assert draw("bucket", range(7), confidence=confidence, fraction=1.0) == list(range(7))
    assert len(draw("bucket", [3, 9], confidence=confidence[:2], fraction=0.5)) == 1


def test_ties_in_confidence_are_cut_by_position() -> None:
    """Two buckets of one all-equal document are its first and its second half."""
    options = {"confidence": np.zeros(10, np.float32), "fraction": 0.2, "num_buckets": 2}
    for document in range(30):
        first, second = draw("bucket", range(10), **options, document_id=document)
        assert first < 5 <= second


def test_random_is_uniform() -> None:
    counts = np.zeros(20)
    for document in range(1000):
        counts[draw("random", range(20), fraction=0.25, document_id=document)] += 1
    assert (abs(counts - 250) < 70).all()  # 5 standard deviations of a binomial(1000, 0.25)


def test_seed_and_document_both_matter() -> None:
    draws = {
        tuple(draw("random", range(64), seed=seed, document_id=document))
        for seed in range(8)
        for document in range(8)
    }
    assert len(draws) == 64


def test_draws_are_the_same_on_every_machine_and_release() -> None:
    """Stores made elsewhere must be reproducible: these lists may never change."""
    confidence = np.arange(12, dtype=np.float32) % 5
    assert draw("random", range(12)) == [0, 1, 3, 4, 7, 8]
    assert draw("bucket", range(12), confidence=confidence) == [0, 1, 2, 3, 4, 7]


def test_all_and_last_token() -> None:
    assert draw("all", [2, 5, 9]) == [2, 5, 9]
    assert draw("last-token", [2, 5, 9]) == [9]
    assert draw("last-token", [2, 5, 9], last_n=2) == [5, 9]
    assert draw("last-token", [2, 5, 9], last_n=7) == [2, 5, 9]


CONFIDENCE = "document 2: the bucket strategy needs the confidence"


@pytest.mark.parametrize(
    ("error", "strategy", "options", "message"),
    [
        (ConfigError, "buckets", {}, r"position_strategy: .*expected bucket, .*found 'buckets'"),
        (ConfigError, "random", {"fraction": 0.0}, "fraction: out of range"),
        (ConfigError, "random", {"fraction": 1.5}, "fraction: out of range"),
        (ConfigError, "bucket", {"num_buckets": 0}, "num_buckets: out of range"),
        (ConfigError, "last-token", {"last_n": 0}, "last_n: out of range"),
        (ConfigError, "random", {"seed": -1}, "seed: out of range"),
        (DataError, "bucket", {"confidence": None}, CONFIDENCE),
        (DataError, "bucket", {"confidence": np.zeros(2)}, CONFIDENCE),
        (DataError, "bucket", {"confidence": np.array([0.0, np.nan, 1.0])}, CONFIDENCE),
    ],
)
def test_what_is_refused(
    error: type[Exception], strategy: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(error, match=message):
        draw(strategy, [1, 2, 3], **options)
