"""The end of a run: model copies that end at different times, and what they cost together."""

from __future__ import annotations

import pytest

from megatron_replay.collection import run
from megatron_replay.collection.run import Cost, rates_of, wait_for


class Clock:
    """Goes on while somebody sleeps."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_the_last_copy_is_waited_for_as_long_as_shards_come(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(run, "time", clock)
    wait_for(lambda: list(range(int(clock.now), 300)), minutes=1)  # one each second
    assert clock.now >= 300
    clock.now = 0
    wait_for(lambda: [1], minutes=1)  # nothing comes: it is given up
    assert 60 <= clock.now < 90


def test_rates_of_copies_side_by_side():
    facts = {"shards": 2, "documents": 30, "positions": 1000, "computed": 400}
    rates = rates_of([Cost(**facts, seconds=10, waited=1), Cost(**facts, seconds=20, waited=0.5)])
    assert (rates["replicas"], rates["shards"], rates["positions"]) == (2, 4, 2000)
    assert (rates["computed"], rates["computed_share"]) == (800, 0.4)
    assert rates["seconds"] == 20
    assert rates["positions_per_second"] == pytest.approx(100)
    assert rates["share_waiting_for_disk"] == pytest.approx(0.05)
