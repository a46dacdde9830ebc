"""Every backend of the optimizer's passes against float64 numpy.

Run as it is for torch and the CPU's levels; test_triton_interpreter.py runs it for Triton.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from megatron_replay.optim.momentum_step import OPTIMIZER, Coefficients, OptimizerKernels
from tests.kernels.levels import LEVELS, at_level
from tests.kernels.reference import Problem, bits, check_step, problem, update

IN_TRITON = os.environ.get("TRITON_INTERPRET") == "1"
CPU_BACKENDS = ("torch", *(f"cpu-{level}" for level in LEVELS))
#: MoClip's and AdamW's at step 10, with every term in play, and magnitudes that show.
USUAL = Coefficients(
    proceed=1.0, keep_m=0.93, take_g=0.07, clip=0.8, keep_v=0.95, take_v=0.05,
    scale_v=1.3, eps=1e-3, decay=0.99, move=0.1,
)  # fmt: skip
#: p moves by u alone, from where m and v are.
STILL = Coefficients(1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, -1.0)
#: The interpreter is slow; its small programs take three blocks of 1024 for the first.
MIXED = [5000, 0, 1, 1025, 7] if IN_TRITON else [4097, 0, 1, 70_001, 7, 32_768]
# The interpreter is numpy, which warns of the 0 / 0 that atan2(0, 0) begins with.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(params=("triton", "triton-small") if IN_TRITON else CPU_BACKENDS)
def kernels(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[OptimizerKernels]:
    name, _, level = request.param.partition("-")
    if IN_TRITON:
        from tests.kernels.triton_interpreted import interpreted

        yield from interpreted(monkeypatch, small=level == "small")
    else:
        with at_level(level):
            yield OPTIMIZER.choose(name, torch.zeros(1))


def exactly(c: Coefficients) -> Coefficients:
    """The numbers as fp32 holds them."""
    return Coefficients(*(float(np.float32(x)) for x in c))


def pack(*rows: Coefficients) -> torch.Tensor:
    return torch.tensor(rows if len(rows) > 1 else rows[0], dtype=torch.float32)


def shifted(given: Problem) -> Problem:
    """Each part of each tensor at another distance from the start of its memory, as in a shard."""
    ours = given.clone()
    for k, part in enumerate(ours.lists(), 1):
        for i, tensor in enumerate(part):
            around = torch.full((len(tensor) + k + 9,), 0.5, dtype=tensor.dtype)
            part[i] = around[k:-9].copy_(tensor)
    return ours


def check_sums(sums, after, rows, *, bounded):
    assert sums.dtype is (torch.float32 if IN_TRITON else torch.float64)
    for i, c in enumerate(rows):
        m, v = after.exp_avgs[i].double().numpy(), after.exp_avg_sqs[i].double().numpy()
        expected = (update(m, v, c, bounded=bounded) ** 2).sum()
        assert sums[i].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("place", [Problem.clone, shifted])
@pytest.mark.parametrize("sizes", [[0, 0], [1], [7], MIXED])
@pytest.mark.parametrize("eps", [USUAL.eps, 0.0])  # without, 0 / 0 beyond the end of a block
def test_a_step_is_the_equations(kernels, sizes, place, bounded, eps):
    before = place(problem(sizes))
    after = place(before)
    usual = USUAL._replace(eps=eps)
    sums = after.step_with(kernels, usual.pack(torch.zeros(1)), bounded=bounded)
    rows = [exactly(usual)] * len(sizes)
    check_step(before, after, rows, bounded=bounded)
    check_sums(sums, after, rows, bounded=bounded)
    for k, part in enumerate(after.lists(), 1) if place is shifted else ():
        for tensor in part:  # what lies around it belongs to another
            memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
            assert (memory[:k] == 0.5).all()
            assert (memory[k + len(tensor) :] == 0.5).all()


@pytest.mark.parametrize("bounded", [True, False])
def test_each_tensor_can_have_its_own_coefficients(kernels, bounded):
    before = problem(MIXED, seed=1)
    after = before.clone()
    rows = [
        exactly(USUAL._replace(keep_m=0.5 + i / 20, move=i / 10, scale_v=1.0 + i, decay=1 - i / 50))
        for i in range(len(MIXED))
    ]
    sums = after.step_with(kernels, pack(*rows), bounded=bounded)
    check_step(before, after, rows, bounded=bounded)
    check_sums(sums, after, rows, bounded=bounded)


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_does_not_proceed_changes_no_bit_and_the_others_move(kernels, bounded, poison):
    before = problem([4097, 7, 100], seed=4)
    before.grads[0][::3], before.grads[1][:] = poison, -poison
    after = before.clone()
    rest = USUAL._replace(proceed=0.0, keep_m=torch.nan, decay=torch.nan)
    sums = after.step_with(kernels, pack(rest, rest, USUAL), bounded=bounded)
    for old, new in zip(before.lists(), after.lists(), strict=True):
        assert torch.equal(bits(old[0]), bits(new[0]))
        assert torch.equal(bits(old[1]), bits(new[1]))
    assert sums[:2].tolist() == [0.0, 0.0]
    assert sums[2] > 0
    assert not torch.equal(before.params[2], after.params[2])
    assert after.clone().step_with(kernels, pack(rest), bounded=bounded).tolist() == [0.0] * 3


def test_without_copies_none_are_written(kernels):
    with_copies = problem([1025], seed=3)
    without = with_copies.clone()
    with_copies.step_with(kernels, pack(USUAL), bounded=True)
    without.step_with(kernels, pack(USUAL), bounded=True, copies=False)
    assert torch.equal(with_copies.params[0], without.params[0])
    assert not torch.equal(with_copies.copies[0], without.copies[0])


@pytest.mark.cpu_backend
def test_copies_round_to_even_as_torch_does(kernels):
    """Ties, denormals, overflow to infinity, infinities and NaN, which torch writes in two ways."""
    ties = torch.cat([torch.arange(0x3F80, 0x3F90) << 16 | low for low in (0x7FFF, 0x8000, 0x8001)])
    full_nan = torch.tensor([0x7FFF_FFFF, -1])  # would round to zero, as the integers they are
    special = [0.0, -0.0, 1e-45, -1e-40, 3.4e38, -3.4028e38, torch.inf, -torch.inf, torch.nan]
    patterns = torch.cat([ties, full_nan]).to(torch.int32).view(torch.float32)
    values = torch.cat([patterns, torch.tensor(special)])
    still = problem([len(values)])
    still.params[0] = values.clone()
    still.step_with(kernels, pack(USUAL._replace(decay=1.0, move=0.0)), bounded=True)
    torch.testing.assert_close(
        still.copies[0], still.params[0].bfloat16(), rtol=0, atol=0, equal_nan=True
    )


def test_zeros_denormals_infinities_and_nan(kernels):
    """atan2(0, 0) = 0; the tiny keep their ratio; below an infinite v nothing moves."""
    inf, nan = torch.inf, torch.nan
    m = [0.0, -0.0, 1e-45, 1e-42, -1e-42, 1.0, 1.0, -1.0, 3e38, inf, nan, 1.0]
    v = [0.0, 0.0, 0.0, 0.0, 1e-44, 0.0, inf, inf, 1e38, 1.0, 1.0, nan]
    one = problem([len(m)])
    one.params[0], one.grads[0] = torch.zeros(len(m)), torch.zeros(len(m))
    one.exp_avgs[0], one.exp_avg_sqs[0] = torch.tensor(m), torch.tensor(v)
    one.step_with(kernels, pack(STILL), bounded=True)
    expected = np.arctan2(np.float32(m).astype(float), np.sqrt(np.float32(v).astype(float)))
    np.testing.assert_allclose(one.params[0], expected, rtol=3e-7, atol=0)
    np.testing.assert_array_equal(one.exp_avgs[0].numpy(), np.float32(m))
    np.testing.assert_array_equal(one.exp_avg_sqs[0].numpy(), np.float32(v))


def test_what_is_not_finite_stays_visible(kernels):
    one = problem([5])
    one.grads[0][:] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, 1.0])
    one.exp_avgs[0][3] = torch.nan
    one.step_with(kernels, pack(USUAL), bounded=True)
    assert one.exp_avgs[0].isfinite().tolist() == [False, False, False, False, True]
    assert one.exp_avg_sqs[0].isfinite().tolist() == [False, False, False, True, True]
    assert one.params[0][[0, 3]].isnan().all()


@pytest.mark.parametrize("place", [Problem.clone, shifted])
def test_products_keep_their_precision(kernels, place):
    """Of many terms the last would be lost in one fp32 sum."""
    sizes = [1 << 19 if IN_TRITON else 1 << 21, *MIXED]
    given = place(problem(sizes, seed=6))
    found = kernels.dot_products(given.exp_avgs, given.grads)
    assert found.dtype is (torch.float32 if IN_TRITON else torch.float64)
    assert found.shape == (len(sizes), 3)
    for i in range(len(sizes)):
        m, g = given.exp_avgs[i].double().numpy(), given.grads[i].double().numpy()
        lengths = np.linalg.norm(m) * np.linalg.norm(g)
        assert found[i, 0].item() == pytest.approx(m @ g, abs=3e-7 * lengths)
        assert found[i, 1].item() == pytest.approx(m @ m, rel=1e-6)
        assert found[i, 2].item() == pytest.approx(g @ g, rel=1e-6)
    torch.testing.assert_close(kernels.square_sums(given.grads), found[:, 2], rtol=1e-6, atol=0)


def test_products_of_many_equal_terms(kernels):
    """One BLAS call over 2^24 of them is 1e-2 off; one fp32 sum of 2^19 by 4e-3."""
    m = torch.full((1 << 19 if IN_TRITON else 1 << 24,), 0.1)
    for found in kernels.dot_products([m], [m])[0].tolist():
        assert found == pytest.approx(len(m) * float(m[0]) ** 2, rel=1e-4)


def test_products_show_what_is_not_finite(kernels):
    m, g = torch.ones(5000), torch.ones(5000)
    g[4999] = torch.nan
    assert kernels.dot_products([m], [g]).isfinite().tolist() == [[False, True, False]]
    assert not kernels.square_sums([g]).isfinite()


@pytest.mark.cpu_backend
def test_torchs_products_are_of_any_strides():
    m, g = torch.randn(6, 4, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64).T
    found = OPTIMIZER.choose("torch", m).dot_products([m], [g])
    expected = [(m * g).sum(), (m * m).sum(), (g * g).sum()]
    torch.testing.assert_close(found[0], torch.stack(expected))
