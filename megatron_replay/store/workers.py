"""Work on the shards of a store in several threads at once.

Threads suffice: decoding, crc32 and reading files run outside Python's global lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def each_shard(
    work: Callable[[int], T], shards: Sequence[int], *, workers: int
) -> Iterator[tuple[int, T]]:
    """``(shard, work(shard))`` of every shard as each is done, in no fixed order.

    Raises:
        Exception: what ``work`` raises, once the shards in progress are done; no other is started.
    """
    waiting = iter(shards)
    running: dict[Future[T], int] = {}
    with ThreadPoolExecutor(workers) as pool:
        while True:
            # Few are submitted ahead, so that an error or Ctrl-C has few to wait for.
            for shard in islice(waiting, workers + 1 - len(running)):
                running[pool.submit(work, shard)] = shard
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result()
