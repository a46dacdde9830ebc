"""Work done by a given number of threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


def in_threads(count: int, work: Callable[[], Result]) -> Result:
    """``work()`` by ``count`` threads, of a thread whose team ends with it: others keep one."""

    def run() -> Result:
        torch.set_num_threads(count)
        return work()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()
