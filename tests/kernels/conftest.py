"""Each form of the optimizer's kernels, by the name of its fixture's parameter.

"cpu-base" and the like are one form, compiled for several levels of the processor. Another form
joins the tests by its name in FORMS, where it can run.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_replay.kernels import OPTIMIZER, OptimizerKernels
from tests.kernels.levels import LEVELS, at_level

CPU_FORMS = tuple(f"cpu-{level}" for level in LEVELS)
FORMS = ("torch", *CPU_FORMS)


def optimizer_form(form: str) -> Iterator[OptimizerKernels]:
    name, _, level = form.partition("-")
    with at_level(level):
        yield OPTIMIZER.choose(name, torch.zeros(1))


@pytest.fixture(params=FORMS)
def kernels(request: pytest.FixtureRequest) -> Iterator[OptimizerKernels]:
    yield from optimizer_form(request.param)


@pytest.fixture(params=CPU_FORMS)
def compiled(request: pytest.FixtureRequest) -> Iterator[OptimizerKernels]:
    yield from optimizer_form(request.param)
