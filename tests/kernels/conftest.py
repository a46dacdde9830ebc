"""The optimizer's passes compiled for several levels of the processor, as a fixture."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_replay.optim.momentum_step import OPTIMIZER, OptimizerKernels
from tests.kernels.levels import LEVELS, at_level


@pytest.fixture(params=LEVELS)
def compiled(request: pytest.FixtureRequest) -> Iterator[OptimizerKernels]:
    with at_level(request.param):
        yield OPTIMIZER.choose("cpu", torch.zeros(1))
