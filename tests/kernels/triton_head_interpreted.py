"""The head's Triton kernels against float64, in Triton's interpreter on a CPU.

Run by test_triton_interpreter.py. Shapes: N positions, V rows of the weight, H channels, P pairs.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from megatron_replay.functional import restricted_cross_entropy
from megatron_replay.kernels.triton import head as kernels
from megatron_replay.loss.backends import Softmax
from tests.loss.references import HeadCase, error, head_case

SIZES = [3, 0, 1, 201, 8, 0]


def ragged(sizes: list[int], limit: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sets of these sizes, ascending and distinct below ``limit``: int32 ids and offsets."""
    generator = torch.Generator().manual_seed(seed)
    sets = [torch.randperm(limit, generator=generator)[:size].sort().values for size in sizes]
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return torch.cat([*sets, torch.zeros(0, dtype=torch.int64)]).int(), offsets.int()


def owners(offsets: Tensor) -> Tensor:
    return torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def apart(tensor: Tensor, *, around: float = math.nan) -> Tensor:
    """Its numbers in rows that lie apart, with other numbers between and around them."""
    rows, columns = tensor.shape
    memory = torch.full((2 * rows + 1, columns + 3), around, dtype=tensor.dtype)
    return memory[1::2, 2:-1].copy_(tensor)


def check_dots(hidden_NH: Tensor, weight_VH: Tensor, ids: Tensor, offsets: Tensor) -> None:
    z = kernels.gather_dot(hidden_NH, weight_VH, ids, offsets)
    assert z.dtype is torch.float32
    h_PH, w_PH = hidden_NH.double()[owners(offsets)], weight_VH.double()[ids.long()]
    assert ((z - (h_PH * w_PH).sum(1)).abs() <= 3e-7 * h_PH.norm(dim=1) * w_PH.norm(dim=1)).all()


def check_axpys(
    out_RH: Tensor, source_MH: Tensor, indices: Tensor, offsets: Tensor, rows: Tensor | None
) -> None:
    coefficients = normal(len(indices), seed=9)
    segment_P = owners(offsets)
    row_P = segment_P if rows is None else rows.long()[segment_P]
    terms_PH = coefficients.double()[:, None] * source_MH.double()[indices.long()]
    expected_RH = out_RH.double().index_add(0, row_P, terms_PH)
    sizes_RH = out_RH.double().abs().index_add(0, row_P, terms_PH.abs())
    found = kernels.segment_axpy_(out_RH, source_MH, indices, coefficients, offsets, rows=rows)
    assert found is out_RH
    assert ((out_RH - expected_RH).abs() <= 1e-6 * sizes_RH).all()


@pytest.mark.parametrize("H", [1, 7, 8, 64, 100, 257])
def test_products_are_those_of_float64(H: int) -> None:
    ids, offsets = ragged(SIZES, 230, seed=H)
    check_dots(normal(6, H, seed=1), normal(230, H, seed=2), ids, offsets)


@pytest.mark.parametrize("H", [1, 7, 8, 64, 100, 513])
def test_sums_are_those_of_float64(H: int) -> None:
    indices, offsets = ragged(SIZES, 230, seed=H)
    source_MH = normal(230, H, seed=1)
    check_axpys(normal(6, H, seed=2), source_MH, indices, offsets, None)
    rows = torch.tensor([5, 0, 7, 2, 8, 3], dtype=torch.int32)
    check_axpys(normal(9, H, seed=3), source_MH, indices, offsets, rows)


def test_long_rows() -> None:
    ids, offsets = ragged([2, 0, 9], 12, seed=0)
    check_dots(normal(3, 8192, seed=1), normal(12, 8192, seed=2), ids, offsets)
    check_axpys(normal(3, 8192, seed=3), normal(12, 8192, seed=4), ids, offsets, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_operands_of_16_bits_lose_nothing_more(dtype: torch.dtype) -> None:
    ids, offsets = ragged([20, 0, 9], 40, seed=0)
    hidden_NH, weight_VH = normal(3, 100, seed=1, dtype=dtype), normal(40, 100, seed=2, dtype=dtype)
    check_dots(hidden_NH, weight_VH, ids, offsets)
    check_axpys(normal(3, 100, seed=3), weight_VH, ids, offsets, None)


def test_any_strides() -> None:
    ids, offsets = ragged([20, 0, 9], 40, seed=0)
    hidden_NH, weight_VH = normal(30, 3, seed=1).T, apart(normal(40, 30, seed=2))
    check_dots(hidden_NH, weight_VH, ids, offsets)
    check_dots(apart(normal(3, 30, seed=3)), normal(30, 40, seed=4).T, ids, offsets)
    check_axpys(apart(normal(3, 30, seed=5)), weight_VH, ids, offsets, None)
    check_axpys(normal(30, 3, seed=6).T, normal(30, 40, seed=7).T, ids, offsets, None)


def test_what_is_not_named_is_neither_read_nor_written() -> None:
    ids, offsets = torch.tensor([3, 5, 5], dtype=torch.int32), torch.tensor([0, 0, 2, 3]).int()
    hidden_NH, weight_VH = normal(3, 30, seed=1), torch.full((7, 30), math.nan)
    hidden_NH[0], weight_VH[[3, 5]] = math.nan, normal(2, 30, seed=2)
    check_dots(hidden_NH, weight_VH, ids, offsets)
    out_RH = apart(torch.full((5, 30), -0.0), around=-0.0)
    memory = torch.empty(0).set_(out_RH.untyped_storage())
    rows = torch.tensor([4, 1, 2], dtype=torch.int32)
    kernels.segment_axpy_(out_RH, weight_VH, ids, torch.ones(3), offsets, rows=rows)
    assert out_RH[1].equal(weight_VH[3] + weight_VH[5])
    assert out_RH[2].equal(weight_VH[5])
    assert (memory.view(torch.int32) != -(2**31)).sum() == 2 * 30


def test_memory_longer_than_32_bits() -> None:
    """Two rows 2^31 elements apart; what lies between is never touched, so never there."""
    weight_VH = torch.empty(2**31 + 8, dtype=torch.bfloat16).as_strided((3, 8), (2**30, 1))
    weight_VH[0], weight_VH[2] = 1.0, normal(8, seed=0)
    ids, offsets = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, 2]).int()
    check_dots(normal(1, 8, seed=1), weight_VH, ids, offsets)
    check_axpys(normal(1, 8, seed=2), weight_VH, ids, offsets, None)


@pytest.mark.parametrize("sizes", [[], [0, 0]])
def test_nothing_to_do(sizes: list[int]) -> None:
    ids, offsets = ragged(sizes, 5, seed=0)
    hidden_NH, weight_VH = normal(len(sizes), 4, seed=1), normal(5, 4, seed=2)
    assert kernels.gather_dot(hidden_NH, weight_VH, ids, offsets).shape == (0,)
    before_NH = hidden_NH.clone()
    kernels.segment_axpy_(hidden_NH, weight_VH, ids, torch.zeros(0), offsets)
    assert hidden_NH.equal(before_NH)


def loss_and_gradients(
    case: HeadCase, *, dtype: torch.dtype = torch.float32, ghost: bool = False
) -> list[Tensor]:
    """Loss, dH, and dW less the 1 that was there, by the whole head."""
    hidden_NH = case.hidden_TH.to(dtype).clone().requires_grad_()
    weight_VH = apart(case.weight_VH.to(dtype)).requires_grad_()
    weight_grad_VH = apart(torch.ones_like(case.weight_VH))
    loss_N = restricted_cross_entropy(
        hidden_NH,
        weight_VH,
        case.ids,
        case.offsets,
        case.labels_T,
        backend=kernels.BACKEND,
        group_offsets=case.group_offsets,
        tail_logit_T=case.upstream_T * 2 if ghost else None,
        weight_grad_out=weight_grad_VH,
    )
    (hidden_grad_NH,) = torch.autograd.grad((loss_N * case.upstream_T).sum(), hidden_NH)
    return [loss_N.detach(), hidden_grad_NH, weight_grad_VH - 1]


@pytest.mark.parametrize("groups", [0, 4])
@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_is_that_of_float64(groups: int, ghost: bool, dtype: torch.dtype) -> None:
    case = head_case(T=25, V=70, H=24, seed=groups, groups=groups, scale=0.3)
    case.hidden_TH = case.hidden_TH.to(dtype).float()
    case.weight_VH = case.weight_VH.to(dtype).float()
    loss_N, hidden_grad_NH, weight_grad_VH = loss_and_gradients(case, dtype=dtype, ghost=ghost)
    dense = case.dense(case.upstream_T * 2 if ghost else None)
    assert error(loss_N, dense[0]) < 1e-6
    assert error(hidden_grad_NH, dense[1]) < (1e-6 if dtype is torch.float32 else 4e-3)
    assert error(weight_grad_VH, dense[2]) < 1e-6


def test_a_shard_has_candidates_of_some_positions_only() -> None:
    case = head_case(T=20, V=60, H=8, seed=3, share=0.05)
    shard = slice(20, 45)
    weight_VH, mask_NV = case.weight_VH[shard], case.mask_GV[:, shard]
    assert not mask_NV.any(1).all()
    head = kernels.BACKEND.bind(case.sets(20, 45))
    max_N, sum_N, label_N = head.forward(case.hidden_TH, weight_VH, hidden_grad=True)
    z_NV = (case.hidden_TH.double() @ weight_VH.double().T).masked_fill(~mask_NV, -math.inf)
    label_NV = torch.nn.functional.one_hot(case.labels_T, 60)[:, shard]
    torch.testing.assert_close(max_N.double(), z_NV.amax(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(max_N + sum_N.log(), z_NV.logsumexp(1).float())
    torch.testing.assert_close(label_N, z_NV.masked_fill(label_NV == 0, -math.inf).amax(1).float())

    softmax = Softmax(torch.full((20,), 2.0), torch.full((20,), 3.0))
    weight_grad_VH = torch.zeros_like(weight_VH)
    hidden_grad_NH = head.backward(
        case.hidden_TH,
        weight_VH,
        softmax,
        case.upstream_T,
        hidden_grad=True,
        weight_grad_out=weight_grad_VH,
    )
    slope_NV = ((z_NV - 2).exp() / 3 - label_NV) * case.upstream_T.double()[:, None]
    assert hidden_grad_NH is not None
    assert error(hidden_grad_NH, slope_NV @ weight_VH.double()) < 1e-6
    assert error(weight_grad_VH, slope_NV.T @ case.hidden_TH.double()) < 1e-6


def test_the_order_of_programs_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = head_case(T=25, V=30, H=600, seed=5, scale=0.1)
    forwards = loss_and_gradients(case)
    order = []

    def set_grid_idx(builder, *place: int) -> None:
        last = (int(size) - 1 for size in builder.grid_dim)
        builder.grid_idx = tuple(end - at for end, at in zip(last, place, strict=True))
        order.append(builder.grid_idx)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", set_grid_idx)
    for found, expected in zip(loss_and_gradients(case), forwards, strict=True):
        assert torch.equal(found, expected)
    assert order[0] > order[1]
