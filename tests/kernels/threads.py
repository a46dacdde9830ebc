"""Work done by a given number of threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


def in_threads(count: int, work: Callable[[], Result]) -> Result:
    """``work()`` by ``count`` threads. In a thread of its own: later tests fork, and OpenMP's
    team, which would not survive in a child, belongs to the thread that started it.
    """

    def run() -> Result:
        torch.set_num_threads(count)
        return work()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result(timeout=60)
