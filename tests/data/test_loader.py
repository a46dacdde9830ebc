"""The loader: order, bound, errors where they belong, and nothing left behind."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest

from megatron_replay.data import loader as data_loader
from megatron_replay.data.loader import Loader
from tests.processes import HANG_SECONDS

DEPTHS = [1, 2, 5]
#: Long enough for a thread that may go on to do so.
A_WHILE = 0.05


def loaders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def wait_until(condition) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def no_thread_left():
    yield
    assert loaders() == []


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_step_in_order_and_then_the_end(depth):
    with Loader(lambda step: step * step, range(3, 40), depth=depth) as loader:
        assert len(loaders()) == 1
        assert list(loader) == [step * step for step in range(3, 40)]
        with pytest.raises(StopIteration):  # and again, without waiting for anything
            next(loader)


class Batch:
    """Its life can be watched."""


@pytest.mark.parametrize("depth", DEPTHS)
def test_no_more_than_depth_are_made_ahead_and_live_beside_the_one_in_use(depth):
    made, alive = [], weakref.WeakSet()

    def make(step):
        made.append(step)
        batch = Batch()
        alive.add(batch)
        return batch

    with Loader(make, range(100), depth=depth) as loader:
        for taken in range(10):
            wait_until(lambda taken=taken: len(made) == taken + depth)
            time.sleep(A_WHILE / 10)
            assert len(made) == taken + depth
            batch = next(loader)
            time.sleep(A_WHILE / 10)
            assert len(alive) <= depth + 1
        del batch
    del loader
    gc.collect()
    assert len(alive) == 0


class BrokenError(Exception):
    pass


def breaks_at(step):
    def make(k):
        if k == step:
            raise BrokenError(f"step {k}")
        return k

    return make


@pytest.mark.parametrize("depth", DEPTHS)
def test_an_error_comes_up_at_its_own_step(depth):
    with Loader(breaks_at(4), range(9), depth=depth) as loader:
        for k in range(4):
            assert next(loader) == k
            time.sleep(A_WHILE / 5)  # the thread has met the error by now
        with pytest.raises(BrokenError, match="step 4"):
            next(loader)
        with pytest.raises(BrokenError, match="step 4"):
            next(loader)


def test_an_error_that_was_made_ahead_and_not_asked_for_is_dropped():
    with Loader(breaks_at(1), range(9), depth=3) as loader:
        assert next(loader) == 0
        time.sleep(A_WHILE)


@pytest.mark.parametrize("depth", [1, 4])
def test_leaving_by_an_exception_ends_the_thread(depth):
    def interrupted():
        with Loader(lambda k: k, range(99), depth=depth) as loader:
            next(loader)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()


def test_leaving_while_a_batch_is_made_waits_for_that_one_alone():
    made, begun = [], threading.Event()

    def make(k):
        begun.set()
        time.sleep(A_WHILE)
        made.append(k)

    with Loader(make, range(99), depth=5):
        begun.wait()
    assert made == [0]


def test_still():
    made = []

    def make(k):
        time.sleep(A_WHILE / 10)
        made.append(k)

    with Loader(make, range(99), depth=50) as loader:
        next(loader)
        with loader.still():
            before = len(made)
            time.sleep(A_WHILE)
            assert len(made) == before
        wait_until(lambda: len(made) > before)


class Clock:
    """Goes on only where a test says so; ``looks``: how often the test's thread looked at it."""

    def __init__(self):
        self.now, self.looks = 0.0, 0

    def perf_counter(self):
        self.looks += threading.current_thread() is threading.main_thread()
        return self.now


def test_waiting_is_measured(monkeypatch):
    clock, made = Clock(), []
    monkeypatch.setattr(data_loader, "time", clock)

    def make(k):
        if k == 1:  # takes seven seconds from when it is waited for
            wait_until(lambda: clock.looks == 3)
            clock.now += 7
        made.append(k)

    with Loader(make, range(3), depth=1) as loader:
        next(loader)
        assert loader.waited == 0
        next(loader)
        assert loader.waited == 7
        wait_until(lambda: len(made) == 3)  # made ahead
        next(loader)
        assert loader.waited == 0
