"""Every form of the optimizer's passes against float64 numpy; what a skipped step leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_replay.optim.momentum_step import Coefficients
from tests.kernels.reference import bits, check_step, problem, update

#: MoClip's and AdamW's at step 10, with every term in play, and magnitudes that show.
USUAL = Coefficients(
    proceed=1.0, keep_m=0.93, take_g=0.07, clip=0.8, keep_v=0.95, take_v=0.05,
    scale_v=1.3, eps=1e-3, decay=0.99, move=0.1,
)  # fmt: skip
MIXED = [4097, 0, 1, 70_001, 7, 32_768]


def exactly(c: Coefficients) -> Coefficients:
    """The numbers as fp32 holds them."""
    return Coefficients(*(float(np.float32(x)) for x in c))


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("sizes", [[0], [1], [7], [4097], MIXED])
def test_a_step_is_the_equations(kernels, sizes, bounded):
    before = problem(sizes)
    after = before.clone()
    sums = after.step_with(kernels, USUAL.pack(torch.zeros(1)), bounded=bounded)
    rows = [exactly(USUAL)] * len(sizes)
    check_step(before, after, rows, bounded=bounded)
    check_sums(sums, after, rows, bounded=bounded)


def check_sums(sums, after, rows, *, bounded):
    assert sums.dtype is torch.float64
    for i, c in enumerate(rows):
        m, v = after.exp_avgs[i].double().numpy(), after.exp_avg_sqs[i].double().numpy()
        expected = (update(m, v, c, bounded=bounded) ** 2).sum()
        assert sums[i].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bounded", [True, False])
def test_each_tensor_can_have_its_own_coefficients(kernels, bounded):
    before = problem(MIXED, seed=1)
    after = before.clone()
    rows = [
        exactly(USUAL._replace(keep_m=0.5 + i / 20, move=i / 10, scale_v=1.0 + i, decay=1 - i / 50))
        for i in range(len(MIXED))
    ]
    packed = torch.stack([c.pack(torch.zeros(1)) for c in rows])
    sums = after.step_with(kernels, packed, bounded=bounded)
    check_step(before, after, rows, bounded=bounded)
    check_sums(sums, after, rows, bounded=bounded)


@pytest.mark.parametrize("offset", [1, 3, 5])
def test_a_tensor_may_start_anywhere_and_ends_where_it_ends(kernels, offset):
    """A shard begins between two cache lines; what lies around it belongs to another."""
    size = 4097
    whole = problem([size + 2 * offset], seed=2)
    shard = whole.clone()
    for part in (shard.params, shard.grads, shard.exp_avgs, shard.exp_avg_sqs, shard.copies):
        part[0] = part[0][offset : offset + size]
    before = shard.clone()
    shard.step_with(kernels, USUAL.pack(torch.zeros(1)), bounded=True)
    check_step(before, shard, [exactly(USUAL)], bounded=True)
    for untouched, around in zip(whole.parts(), shard.parts(), strict=True):
        storage = torch.empty(0, dtype=around.dtype).set_(around.untyped_storage())
        assert torch.equal(storage[:offset], untouched[:offset])
        assert torch.equal(storage[offset + size :], untouched[offset + size :])


def test_without_copies_none_are_written(kernels):
    with_copies = problem([4097], seed=3)
    without = with_copies.clone()
    with_copies.step_with(kernels, USUAL.pack(torch.zeros(1)), bounded=True)
    without.step_with(kernels, USUAL.pack(torch.zeros(1)), bounded=True, copies=False)
    assert torch.equal(with_copies.params[0], without.params[0])
    assert not torch.equal(with_copies.copies[0], without.copies[0])


def test_copies_round_to_even_as_torch_does(kernels):
    """Ties, denormals, overflow to infinity, infinities and NaN, which torch writes in two ways."""
    ties = torch.cat([torch.arange(0x3F80, 0x3F90) << 16 | low for low in (0x7FFF, 0x8000, 0x8001)])
    full_nan = torch.tensor([0x7FFF_FFFF, -1])  # would round to zero, as the integers they are
    special = [0.0, -0.0, 1e-45, -1e-40, 3.4e38, -3.4028e38, torch.inf, -torch.inf, torch.nan]
    patterns = torch.cat([ties, full_nan]).to(torch.int32).view(torch.float32)
    values = torch.cat([patterns, torch.tensor(special)])
    still = problem([len(values)])
    still.params[0] = values.clone()
    rest = USUAL._replace(decay=1.0, move=0.0).pack(torch.zeros(1))
    still.step_with(kernels, rest, bounded=True)
    torch.testing.assert_close(
        still.copies[0], still.params[0].bfloat16(), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_step_that_does_not_proceed_changes_no_bit(kernels, bounded, poison):
    before = problem([4097, 7], seed=4)
    for grad in before.grads:
        grad[::3] = poison
    after = before.clone()
    coefficients = USUAL._replace(proceed=0.0, keep_m=torch.nan, decay=torch.nan)
    sums = after.step_with(kernels, pack(coefficients), bounded=bounded)
    assert sums.tolist() == [0.0, 0.0]
    for old, new in zip(before.parts(), after.parts(), strict=True):
        assert torch.equal(bits(old), bits(new))


def pack(c):
    return torch.tensor(c, dtype=torch.float32)


def test_of_several_tensors_one_can_rest(kernels):
    before = problem([100, 100], seed=5)
    after = before.clone()
    sums = after.step_with(
        kernels, torch.stack([pack(USUAL._replace(proceed=0.0)), pack(USUAL)]), bounded=True
    )
    assert torch.equal(before.params[0], after.params[0])
    assert not torch.equal(before.params[1], after.params[1])
    assert sums[0] == 0
    assert sums[1] > 0


def test_zeros_denormals_and_infinities(kernels):
    """atan2(0, 0) = 0; the tiny keep their ratio; below an infinite v nothing moves."""
    m = [0.0, -0.0, 1e-45, 1e-42, -1e-42, 1.0, 1.0, -1.0, 3e38]
    v = [0.0, 0.0, 0.0, 0.0, 1e-44, 0.0, torch.inf, torch.inf, 1e38]
    size = len(m)
    one = problem([size])
    one.params[0], one.grads[0] = torch.zeros(size), torch.zeros(size)
    one.exp_avgs[0], one.exp_avg_sqs[0] = torch.tensor(m), torch.tensor(v)
    keep = Coefficients(1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, -1.0)
    one.step_with(kernels, pack(keep), bounded=True)
    expected = np.arctan2(np.float32(m).astype(float), np.sqrt(np.float32(v).astype(float)))
    np.testing.assert_allclose(one.params[0], expected, rtol=3e-7, atol=0)
    assert np.array_equal(one.exp_avgs[0].numpy(), np.float32(m))
    assert np.array_equal(one.exp_avg_sqs[0].numpy(), np.float32(v))


def test_what_is_not_finite_stays_visible(kernels):
    one = problem([5])
    one.grads[0][:] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, 1.0])
    one.exp_avgs[0][3] = torch.nan
    one.step_with(kernels, pack(USUAL), bounded=True)
    assert one.exp_avgs[0].isfinite().tolist() == [False, False, False, False, True]
    assert one.exp_avg_sqs[0].isfinite().tolist() == [False, False, False, True, True]
    assert one.params[0][[0, 3]].isnan().all()


def test_products_keep_their_precision(kernels):
    """2^21 elements: in one fp32 sum the last terms would be lost."""
    sizes = [1 << 21, *MIXED]
    given = problem(sizes, seed=6)
    m, g = ([x.double().numpy() for x in part] for part in (given.exp_avgs, given.grads))
    found = kernels.dot_products(given.exp_avgs, given.grads)
    assert found.dtype is torch.float64
    assert found.shape == (len(sizes), 3)
    for i in range(len(sizes)):
        lengths = np.linalg.norm(m[i]) * np.linalg.norm(g[i])
        assert found[i, 0].item() == pytest.approx(m[i] @ g[i], abs=3e-7 * lengths)
        assert found[i, 1].item() == pytest.approx(m[i] @ m[i], rel=1e-6)
        assert found[i, 2].item() == pytest.approx(g[i] @ g[i], rel=1e-6)
    torch.testing.assert_close(kernels.square_sums(given.grads), found[:, 2], rtol=1e-6, atol=0)


def test_products_show_what_is_not_finite(kernels):
    m, g = torch.ones(5000), torch.ones(5000)
    g[4999] = torch.nan
    assert kernels.dot_products([m], [g]).isfinite().tolist() == [[False, True, False]]
    assert not kernels.square_sums([g]).isfinite()
