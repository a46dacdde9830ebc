"""What only the Triton backend of the optimizer's passes promises, in Triton's interpreter.

Run by test_triton_interpreter.py, beside test_momentum_step.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from megatron_replay.errors import ConfigError
from megatron_replay.kernels import triton_optimizer
from tests.kernels.reference import check_step, problem, ulps
from tests.kernels.test_momentum_step import MIXED, STILL, USUAL, exactly, pack

# The interpreter is numpy, which warns of the 0 / 0 that atan2(0, 0) begins with.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def interpreted(monkeypatch: pytest.MonkeyPatch, *, small: bool) -> Iterator[Any]:
    """The passes, rounding to even as cvt.rn does on a GPU: triton 3.7's interpreter cuts bits off.

    ``small``: programs of one block, two slots a tensor: 5000 elements need two programs of three.
    """

    def rounded(builder, source, dtype):
        assert dtype.scalar is tl.bfloat16
        bits = torch.from_numpy(source.data).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(bits, dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_trunc", rounded)
    if small:
        monkeypatch.setattr(triton_optimizer, "STEPS", 1)
        monkeypatch.setattr(triton_optimizer, "SLOTS", 2)
    triton_optimizer._tasks.cache_clear()
    yield triton_optimizer
    triton_optimizer._tasks.cache_clear()


@pytest.fixture
def kernels(monkeypatch):
    yield from interpreted(monkeypatch, small=False)


def test_the_arctangent_is_within_two_ulp(kernels):
    rng = np.random.default_rng(6)
    size = 1 << 16
    sign = rng.choice([-1.0, 1.0], size)
    # Every ratio from 1e-12 to 1e12, in three sizes; and many near the diagonal.
    for middle, width in ((1.0, 1e6), (1e-12, 1e6), (1e12, 1e6), (1.0, 1.01)):
        y, x = (middle * width ** rng.uniform(-1, 1, size) for _ in range(2))
        m, v = np.float32(sign * y), np.float32(x * x)
        one = problem([size])
        one.params[0], one.grads[0] = torch.zeros(size), torch.zeros(size)
        one.exp_avgs[0], one.exp_avg_sqs[0] = torch.from_numpy(m), torch.from_numpy(v)
        one.step_with(kernels, pack(STILL), bounded=True)
        # numpy's fp32 root is rounded correctly, as the kernel's; torch's is not.
        expected = np.arctan2(m.astype(np.float64), np.sqrt(v).astype(np.float64))
        assert ulps(one.params[0].numpy(), expected).max() < 1.8


def test_two_infinities_have_an_angle(kernels):
    one = problem([1])
    one.params[0], one.grads[0] = torch.zeros(1), torch.zeros(1)
    one.exp_avgs[0], one.exp_avg_sqs[0] = torch.tensor([-torch.inf]), torch.tensor([torch.inf])
    one.step_with(kernels, pack(STILL), bounded=True)
    assert one.params[0].item() == pytest.approx(-np.pi / 4)


def test_other_gradients_next_time(kernels):
    """Tensors may move between steps: the tables go with addresses, never with a position."""
    after = problem([1025, 7], seed=8)
    for seed in (9, 10):
        before = after.clone()
        before.grads = after.grads = problem([1025, 7], seed=seed).grads
        after.step_with(kernels, pack(USUAL), bounded=True)
        check_step(before, after, [exactly(USUAL)] * 2, bounded=True)


def test_only_what_is_aligned_is_taken_as_aligned(kernels):
    """On a GPU a 16-byte access to any other address ends the process."""
    memory = torch.zeros(4096)
    start = -memory.data_ptr() // 4 % 4  # the first element at a multiple of 16

    def aligned(first: int, size: int) -> bool:
        rows = kernels._rows([memory[start : start + size]], [memory[first : first + size]])
        return kernels._table(rows, memory.device, None)[1]

    assert aligned(start + 32, 64)
    assert not aligned(start + 33, 64)
    assert not aligned(start + 34, 64)
    assert not aligned(start + 32, 65)


def test_the_host_reads_nothing(kernels, monkeypatch):
    given = problem(MIXED, seed=11)
    for read in "item tolist cpu __bool__ __int__ __float__ __index__".split():
        monkeypatch.setattr(torch.Tensor, read, lambda *_: pytest.fail("the host waited"))
    kernels.dot_products(given.exp_avgs, given.grads)
    kernels.square_sums(given.grads)
    given.step_with(kernels, pack(USUAL), bounded=True)


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(7, dtype=torch.float64), torch.zeros(14)[::2], torch.zeros(8)],
    ids=["precision", "strides", "size"],
)
def test_a_tensor_of_another_kind_is_refused(kernels, wrong):
    good = [torch.zeros(7)]
    with pytest.raises(ConfigError, match="unusable tensor"):
        kernels.dot_products(good, [wrong])
    with pytest.raises(ConfigError, match="unusable tensor"):
        kernels.momentum_step(good, good, good, [wrong], pack(USUAL), bounded=True)
    with pytest.raises(ConfigError, match="bfloat16"):
        kernels.momentum_step(good, good, good, good, pack(USUAL), bounded=True, copies=good)
