"""Each form of the optimizer's kernels, by the name of its fixture's parameter.

"cpu-base" and the like are one form, compiled for several levels of the processor. Another form
joins the tests by its name in FORMS, where it can run.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_replay.kernels import OPTIMIZER, OptimizerKernels, _cpu

LEVELS = ("base", "avx2", "avx512")
CPU_FORMS = tuple(f"cpu-{level}" for level in LEVELS)
FORMS = ("torch", *CPU_FORMS)


def at_level(request: pytest.FixtureRequest, form: str) -> Iterator[OptimizerKernels]:
    name, _, level = form.partition("-")
    best = _cpu.level()
    if level:
        if LEVELS.index(level) > LEVELS.index(best):
            pytest.skip(f"this processor has no {level}")
        _cpu.use_level(level)
    yield OPTIMIZER.choose(name, torch.zeros(1))
    _cpu.use_level(best)


@pytest.fixture(params=FORMS)
def kernels(request: pytest.FixtureRequest) -> Iterator[OptimizerKernels]:
    yield from at_level(request, request.param)


@pytest.fixture(params=CPU_FORMS)
def compiled(request: pytest.FixtureRequest) -> Iterator[OptimizerKernels]:
    yield from at_level(request, request.param)
