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

#: Long enough for a thread that may go on to do so.
A_WHILE = 0.05
depths = pytest.mark.parametrize("depth", [1, 2, 5])


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


@depths
def test_every_step_in_order_and_then_the_end(depth):
    with Loader(lambda step: step * step, range(3, 40), depth=depth) as loader:
        assert len(loaders()) == 1
        assert list(loader) == [step * step for step in range(3, 40)]
        with pytest.raises(StopIteration):  # and again, without waiting for anything
            next(loader)


class Batch:
    """Its life can be watched."""


@depths
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


@depths
def test_an_error_comes_up_at_its_own_step_and_is_dropped_before_it(depth):
    def make(step):
        return [0, 1, 2, 3][step]

    with Loader(make, range(9), depth=depth) as loader:
        for step in range(4):
            assert next(loader) == step
            time.sleep(A_WHILE / 5)  # the thread has met the error by now
        for _ in range(2):
            with pytest.raises(IndexError):
                next(loader)
    with Loader(make, range(3, 9), depth=depth) as loader:
        assert next(loader) == 3
        time.sleep(A_WHILE / 5)


def test_leaving_by_an_exception_waits_for_the_batch_in_progress_alone():
    made, begun = [], threading.Event()

    def make(k):
        begun.set()
        time.sleep(A_WHILE)
        made.append(k)

    def interrupted():
        with Loader(make, range(99), depth=5):
            begun.wait()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert made == [0]


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
