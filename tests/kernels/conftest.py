"""The backends of the optimizer's passes as fixtures.

"cpu-base" and the like are one backend, compiled for several levels of the processor.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_replay.optim.momentum_step import OPTIMIZER, OptimizerKernels
from tests.kernels.levels import LEVELS, at_level

CPU_BACKENDS = tuple(f"cpu-{level}" for level in LEVELS)
BACKENDS = ("torch", *CPU_BACKENDS)


def optimizer_backend(backend: str) -> Iterator[OptimizerKernels]:
    name, _, level = backend.partition("-")
    with at_level(level):
        yield OPTIMIZER.choose(name, torch.zeros(1))


@pytest.fixture(params=BACKENDS)
def kernels(request: pytest.FixtureRequest) -> Iterator[OptimizerKernels]:
    yield from optimizer_backend(request.param)


@pytest.fixture(params=CPU_BACKENDS)
def compiled(request: pytest.FixtureRequest) -> Iterator[OptimizerKernels]:
    yield from optimizer_backend(request.param)
