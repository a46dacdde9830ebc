"""Threads that share shards: all are worked on at once, and the first error ends the work."""

from __future__ import annotations

import threading

import pytest

from megatron_replay.errors import StoreError
from megatron_replay.store.workers import each_shard


def test_every_shard_is_worked_on_and_as_many_at_once_as_there_are_workers() -> None:
    together = threading.Barrier(3, timeout=30)

    def work(shard: int) -> int:
        together.wait()  # passes only with three at once
        return shard * shard

    assert dict(each_shard(work, range(9), workers=3)) == {s: s * s for s in range(9)}
    assert dict(each_shard(lambda shard: shard, range(0), workers=3)) == {}


def test_the_first_error_ends_the_work() -> None:
    begun = []

    def work(shard: int) -> None:
        begun.append(shard)
        if shard == 5:
            raise StoreError("damaged", where="here", expected=1, found=2)

    with pytest.raises(StoreError, match=r"^here: damaged \(expected 1; found 2\)$"):
        list(each_shard(work, range(40), workers=2))
    assert max(begun) < 12
