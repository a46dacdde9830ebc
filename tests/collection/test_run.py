"""The end of a run: model copies that end at different times, and what they cost together."""

from __future__ import annotations

import time

import pytest

from megatron_replay.collection.run import Cost, rates_of, wait_for


def test_the_last_copy_is_waited_for_as_long_as_shards_come():
    looks = [[1, 2], [1, 2], [2], [2], [2], []]  # what each look at the store finds missing
    wait_for(lambda: looks.pop(0), minutes=10)
    assert not looks
    start = time.monotonic()
    wait_for(lambda: [1], minutes=0.1 / 60)  # nothing comes: it is given up
    assert time.monotonic() - start >= 0.1


def test_rates_of_copies_side_by_side():
    facts = {"shards": 2, "documents": 30, "positions": 1000}
    rates = rates_of([Cost(**facts, seconds=10, waited=1), Cost(**facts, seconds=20, waited=0.5)])
    assert (rates["replicas"], rates["shards"], rates["positions"]) == (2, 4, 2000)
    assert rates["seconds"] == 20
    assert rates["positions_per_second"] == pytest.approx(100)
    assert rates["share_waiting_for_disk"] == pytest.approx(0.05)
