"""Work on the shards of a store, in several processes at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import resource_tracker
from typing import Any, TypeVar

from megatron_replay.errors import StoreError

T = TypeVar("T")
_work: Callable[[int], Any]


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def each_shard(
    work: Callable[[int], T], shards: Sequence[int], *, workers: int
) -> Iterator[tuple[int, T]]:
    """``(shard, work(shard))`` of every shard as they are done, in no certain order.

    Processes start afresh, some tenths of a second each: a fork would copy the locks that other
    threads of this process hold. ``work``, its results and its errors are pickled. With one worker
    it is called here. Each side ends when the other dies.

    Raises:
        StoreError: a process was killed. What ``work`` raises: shards under way are finished first.
    """
    if workers == 1 or len(shards) < 2:
        for shard in shards:
            yield shard, work(shard)
        return
    workers = min(workers, len(shards))
    resource_tracker.ensure_running()  # started by ``submit``, it would let Ctrl-C through
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(work,)
    ) as pool:
        # Few are submitted ahead, so that an error or Ctrl-C has few to wait for.
        waiting = iter(shards)
        running: dict[Future[T], int] = {}
        try:
            while True:
                for shard in islice(waiting, workers + 1 - len(running)):
                    running[_submit(pool, shard)] = shard
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            raise StoreError(
                "a process that worked on a shard was killed", fix="Try fewer --workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, shard: int) -> Future[Any]:
    """Ctrl-C is held back while a process starts, until ``_begin``: its imports would print it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        return pool.submit(_call, shard)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(work: Callable[[int], Any]) -> None:
    global _work
    _work = work
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(shard: int) -> Any:
    return _work(shard)
