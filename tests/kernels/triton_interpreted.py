"""The Triton kernels against float64 numpy, in Triton's interpreter on a CPU.

Run by test_triton_interpreter.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from megatron_replay.errors import ConfigError
from megatron_replay.kernels import triton_optimizer as kernels
from megatron_replay.optim.momentum_step import Coefficients
from tests.kernels.reference import Problem, check_step, problem, ulps, update

# The interpreter is numpy, which warns of the 0 / 0 that atan2(0, 0) begins with.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

USUAL = Coefficients(
    proceed=1.0, keep_m=0.93, take_g=0.07, clip=0.8, keep_v=0.95, take_v=0.05,
    scale_v=1.3, eps=1e-3, decay=0.99, move=0.1,
)  # fmt: skip
SIZES = [5000, 0, 1, 1025, 7]


@pytest.fixture(autouse=True)
def bf16_rounds_to_even(monkeypatch):
    """As cvt.rn does on a GPU; the interpreter of triton 3.7 cuts the low bits off."""

    def rounded(builder, source, dtype):
        assert dtype.scalar is tl.bfloat16
        bits = torch.from_numpy(source.data).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(bits, dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_trunc", rounded)


@pytest.fixture
def small_programs(monkeypatch):
    """Programs of one block, two slots a tensor: 5000 elements need two programs of three."""
    monkeypatch.setattr(kernels, "STEPS", 1)
    monkeypatch.setattr(kernels, "SLOTS", 2)
    kernels._tasks.cache_clear()
    yield
    kernels._tasks.cache_clear()


def exactly(c: Coefficients) -> Coefficients:
    """The numbers as fp32 holds them."""
    return Coefficients(*(float(np.float32(x)) for x in c))


def pack(*rows: Coefficients) -> torch.Tensor:
    return torch.tensor(rows if len(rows) > 1 else rows[0], dtype=torch.float32)


def shifted(given: Problem) -> Problem:
    """Each part of each tensor at another distance from the start of its memory."""
    ours = given.clone()
    for k, part in enumerate(lists(ours), 1):
        for i, tensor in enumerate(part):
            around = torch.full((len(tensor) + k + 9,), 0.5, dtype=tensor.dtype)
            part[i] = around[k:-9].copy_(tensor)
    return ours


def lists(given: Problem) -> list[list[torch.Tensor]]:
    return [given.params, given.grads, given.exp_avgs, given.exp_avg_sqs, given.copies]


def check_sums(sums, after, rows, *, bounded):
    assert sums.dtype is torch.float32
    for i, c in enumerate(rows):
        m, v = after.exp_avgs[i].double().numpy(), after.exp_avg_sqs[i].double().numpy()
        expected = (update(m, v, c, bounded=bounded) ** 2).sum()
        assert sums[i].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("place", [Problem.clone, shifted])
def test_a_step_is_the_equations(place, bounded):
    before = place(problem(SIZES))
    after = place(before)
    sums = after.step_with(kernels, pack(USUAL), bounded=bounded)
    rows = [exactly(USUAL)] * len(SIZES)
    check_step(before, after, rows, bounded=bounded)
    check_sums(sums, after, rows, bounded=bounded)


@pytest.mark.usefixtures("small_programs")
@pytest.mark.parametrize("bounded", [True, False])
def test_each_tensor_can_have_its_own_coefficients(bounded):
    before = problem(SIZES, seed=1)
    after = before.clone()
    rows = [
        exactly(USUAL._replace(keep_m=0.5 + i / 20, move=i / 10, scale_v=1.0 + i, decay=1 - i / 50))
        for i in range(len(SIZES))
    ]
    sums = after.step_with(kernels, pack(*rows), bounded=bounded)
    check_step(before, after, rows, bounded=bounded)
    check_sums(sums, after, rows, bounded=bounded)


def test_what_lies_around_a_shard_is_left_alone():
    ours = shifted(problem(SIZES, seed=2))
    ours.step_with(kernels, pack(USUAL), bounded=True)
    for k, part in enumerate(lists(ours), 1):
        for tensor in part:
            memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
            assert (memory[:k] == 0.5).all()
            assert (memory[k + len(tensor) :] == 0.5).all()


def test_without_copies_none_are_written():
    before = problem([1025], seed=3)
    after = before.clone()
    after.step_with(kernels, pack(USUAL), bounded=True, copies=False)
    assert torch.equal(before.copies[0], after.copies[0])
    assert not torch.equal(before.params[0], after.params[0])


@pytest.mark.parametrize("bounded", [True, False])
def test_a_step_that_does_not_proceed_changes_no_bit(bounded):
    before = problem([5000, 7], seed=4)
    before.grads[0][::3], before.grads[1][:] = torch.nan, torch.inf
    after = before.clone()
    at_rest = USUAL._replace(proceed=0.0, keep_m=torch.nan, decay=torch.nan)
    sums = after.step_with(kernels, pack(at_rest), bounded=bounded)
    assert sums.tolist() == [0.0, 0.0]
    for old, new in zip(before.parts(), after.parts(), strict=True):
        assert torch.equal(old.view(torch.int16), new.view(torch.int16))


def test_of_several_tensors_one_can_rest():
    before = problem([100, 100], seed=5)
    after = before.clone()
    sums = after.step_with(kernels, pack(USUAL._replace(proceed=0.0), USUAL), bounded=True)
    assert torch.equal(before.params[0], after.params[0])
    assert not torch.equal(before.params[1], after.params[1])
    assert sums[0] == 0
    assert sums[1] > 0


def arctangents(m: torch.Tensor, v: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """atan2(m, sqrt(v)): the kernel's, by a step that moves p from 0 there; and in float64."""
    one = problem([len(m)])
    one.params[0], one.grads[0], one.exp_avgs[0], one.exp_avg_sqs[0] = m * 0, m * 0, m, v
    still = Coefficients(1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, -1.0)
    one.step_with(kernels, pack(still), bounded=True)
    # numpy's fp32 root is rounded correctly, as the kernel's; torch's is not.
    root = np.sqrt(v.numpy()).astype(np.float64)
    return one.params[0].numpy(), np.arctan2(m.double().numpy(), root)


def test_the_arctangent_is_within_two_ulp():
    rng = np.random.default_rng(6)
    size = 1 << 16
    sign = rng.choice([-1.0, 1.0], size)
    # Every ratio from 1e-12 to 1e12, in three sizes; and many near the diagonal.
    for middle, width in ((1.0, 1e6), (1e-12, 1e6), (1e12, 1e6), (1.0, 1.01)):
        y, x = (middle * width ** rng.uniform(-1, 1, size) for _ in range(2))
        found, expected = arctangents(
            torch.from_numpy((sign * y).astype(np.float32)),
            torch.from_numpy((x * x).astype(np.float32)),
        )
        assert ulps(found, expected).max() < 1.8


def test_zeros_denormals_infinities_and_nan():
    inf, nan = torch.inf, torch.nan
    m = torch.tensor([0.0, -0.0, 1e-45, 1e-42, -1e-42, 1.0, 1.0, -inf, inf, 3e38, nan, 1.0])
    v = torch.tensor([0.0, 0.0, 0.0, 0.0, 1e-44, 0.0, inf, inf, 1.0, 1e38, 1.0, nan])
    np.testing.assert_allclose(*arctangents(m, v), rtol=3e-7, atol=0)


@pytest.mark.usefixtures("small_programs")
@pytest.mark.parametrize("place", [Problem.clone, shifted])
def test_products_are_those_of_float64(place):
    given = place(problem(SIZES, seed=7))
    found = kernels.dot_products(given.exp_avgs, given.grads)
    assert found.dtype is torch.float32
    assert found.shape == (len(SIZES), 3)
    for i in range(len(SIZES)):
        m, g = given.exp_avgs[i].double().numpy(), given.grads[i].double().numpy()
        lengths = np.linalg.norm(m) * np.linalg.norm(g)
        assert found[i, 0].item() == pytest.approx(m @ g, abs=3e-7 * lengths)
        assert found[i, 1].item() == pytest.approx(m @ m, rel=1e-6)
        assert found[i, 2].item() == pytest.approx(g @ g, rel=1e-6)
    assert torch.equal(kernels.square_sums(given.grads), found[:, 2])


def test_without_eps_the_end_of_a_block_adds_nothing():
    """There 0 / 0 is computed, of elements that are not."""
    one = problem([7], seed=12)
    c = exactly(USUAL._replace(eps=0.0))
    check_sums(one.step_with(kernels, pack(c), bounded=False), one, [c], bounded=False)


def test_nothing_but_empty_tensors():
    empty = problem([0, 0])
    assert kernels.square_sums(empty.grads).tolist() == [0.0, 0.0]
    assert empty.step_with(kernels, pack(USUAL), bounded=True).tolist() == [0.0, 0.0]


def test_sums_of_many_keep_their_precision():
    """2^19 equal terms: added one by one in fp32 they are 4e-3 off."""
    ones = torch.full((1 << 19,), 0.1)
    expected = (1 << 19) * float(ones[0]) ** 2
    assert kernels.square_sums([ones]).item() == pytest.approx(expected, rel=1e-6)


def test_other_gradients_next_time():
    """Tensors may move between steps: the tables go with addresses, never with a position."""
    before = problem([1025, 7], seed=8)
    after = before.clone()
    for seed in (9, 10):
        other = problem([1025, 7], seed=seed)
        before = after.clone()
        before.grads = after.grads = other.grads
        after.step_with(kernels, pack(USUAL), bounded=True)
        check_step(before, after, [exactly(USUAL)] * 2, bounded=True)


def test_only_what_is_aligned_is_taken_as_aligned():
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


def test_the_host_reads_nothing(monkeypatch):
    given = problem(SIZES, seed=11)
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
def test_a_tensor_of_another_kind_is_refused(wrong):
    good = torch.zeros(7)
    with pytest.raises(ConfigError, match="unusable tensor"):
        kernels.dot_products([good], [wrong])
    with pytest.raises(ConfigError, match="unusable tensor"):
        kernels.momentum_step([good], [good], [good], [wrong], pack(USUAL), bounded=True)
    with pytest.raises(ConfigError, match="bfloat16"):
        kernels.momentum_step(
            [good], [good], [good], [good], pack(USUAL), bounded=True, copies=[good]
        )
