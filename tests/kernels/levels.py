"""The levels of the processor that csrc/cpu is compiled for, and a given number of threads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch

from megatron_replay.kernels import _cpu

LEVELS = ("base", "avx2", "avx512")
Result = TypeVar("Result")


@contextlib.contextmanager
def at_level(level: str) -> Iterator[None]:
    """Use ``level``; skip where the processor has none such. "" for the best."""
    best = _cpu.level()
    if level:
        if LEVELS.index(level) > LEVELS.index(best):
            pytest.skip(f"this processor has no {level}")
        _cpu.use_level(level)
    try:
        yield
    finally:
        _cpu.use_level(best)


def in_threads(count: int, work: Callable[[], Result]) -> Result:
    """``work()`` by ``count`` threads, of a thread whose team ends with it: others keep one."""

    def run() -> Result:
        torch.set_num_threads(count)
        return work()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()
