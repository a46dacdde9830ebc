"""The end of a run: model copies that end at different times, and what they cost together."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from megatron_replay.collection.run import Cost, rates_of, wait_for


def listing(*looks: list[int]) -> Callable[[], list[int]]:
    """What each look at the store finds missing; the last one is repeated."""
    left = list(looks)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def test_the_last_copy_is_waited_for_as_long_as_shards_come():
    missing = listing([1, 2], [1, 2], [2], [2], [2], [])
    wait_for(missing, minutes=10)
    assert missing() == []


def test_a_copy_of_which_nothing_comes_is_given_up():
    start = time.monotonic()
    wait_for(listing([1, 2], [1]), minutes=0.1 / 60)
    assert time.monotonic() - start >= 0.1


def test_rates_of_copies_side_by_side():
    facts = {"shards": 2, "documents": 30, "positions": 1000}
    rates = rates_of([Cost(**facts, seconds=10, waited=1), Cost(**facts, seconds=20, waited=0.5)])
    assert (rates["replicas"], rates["shards"], rates["positions"]) == (2, 4, 2000)
    assert rates["seconds"] == 20
    assert rates["positions_per_second"] == pytest.approx(100)
    assert rates["share_waiting_for_disk"] == pytest.approx(0.05)
