"""The end of a run: model copies that end at different times, and what they cost together."""

from __future__ import annotations

import time

import pytest

from megatron_replay.collection.report import Cost
from megatron_replay.collection.run import _wait_for_all


class Shards:
    """What each look at the store finds missing; the last look is for ever."""

    def __init__(self, *looks: list[int]) -> None:
        self.looks = list(looks)

    def missing_shards(self) -> list[int]:
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]


def test_the_last_copy_is_waited_for_as_long_as_shards_come():
    looks = [[1, 2], [1, 2], [2], [2], [2], []]
    shards = Shards(*looks)
    _wait_for_all(shards, range(3), minutes=10)
    assert shards.looks == [[]]


def test_a_copy_of_which_nothing_comes_is_given_up():
    start = time.monotonic()
    _wait_for_all(Shards([1, 2], [1]), range(3), minutes=0.1 / 60)
    assert time.monotonic() - start >= 0.1


def test_only_the_chosen_shards_are_waited_for():
    _wait_for_all(Shards([0, 5]), range(1, 3), minutes=10)


def test_costs_of_copies_side_by_side():
    facts = {"shards": 2, "documents": 30, "positions": 1000}
    fast = Cost(**facts, seconds=10.0, replica_seconds=10.0, waited=1.0)
    slow = Cost(**facts, seconds=20.0, replica_seconds=20.0, waited=0.5)
    rates = (fast + slow).rates()
    assert (rates["replicas"], rates["shards"], rates["positions"]) == (2, 4, 2000)
    assert rates["seconds"] == 20
    assert rates["positions_per_second"] == pytest.approx(100)
    assert rates["share_waiting_for_disk"] == pytest.approx(0.05)
