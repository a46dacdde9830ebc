"""The levels of the processor that csrc/cpu is compiled for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from megatron_replay.kernels import _cpu

LEVELS = ("base", "avx2", "avx512")


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
