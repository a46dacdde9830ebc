"""The head's Triton operators against float64, in Triton's interpreter on a CPU; test_head.py tests
the head that is made of them.

Run by test_triton_interpreter.py. Shapes: N positions, V rows of the weight, H channels, P pairs.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from megatron_replay.kernels import triton_head as kernels

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


def check(sizes: list[int], candidates: int, H: int, *, dtype: torch.dtype = torch.float32) -> None:
    ids, offsets = ragged(sizes, candidates, seed=H)
    hidden_NH = normal(len(sizes), H, seed=1, dtype=dtype)
    weight_VH = normal(candidates, H, seed=2, dtype=dtype)
    check_dots(hidden_NH, weight_VH, ids, offsets)
    check_axpys(normal(len(sizes), H, seed=3), weight_VH, ids, offsets, None)
    rows = torch.randperm(len(sizes) + 3)[: len(sizes)].int()
    check_axpys(normal(len(sizes) + 3, H, seed=4), weight_VH, ids, offsets, rows)


@pytest.mark.parametrize("H", [1, 7, 8, 64, 100, 257, 513])
def test_both_are_those_of_float64(H: int) -> None:
    check(SIZES, 230, H)


def test_long_rows() -> None:
    check([2, 0, 9], 12, 8192)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_operands_of_16_bits_lose_nothing_more(dtype: torch.dtype) -> None:
    check([20, 0, 9], 40, 100, dtype=dtype)


def test_any_strides() -> None:
    ids, offsets = ragged([20, 0, 9], 40, seed=0)
    hidden_NH, weight_VH = normal(30, 3, seed=1).T, apart(normal(40, 30, seed=2))
    check_dots(hidden_NH, weight_VH, ids, offsets)
    check_dots(apart(normal(3, 30, seed=3)), normal(30, 40, seed=4).T, ids, offsets)
    check_axpys(apart(normal(3, 30, seed=5)), weight_VH, ids, offsets, None)
    check_axpys(normal(30, 3, seed=6).T, normal(30, 40, seed=7).T, ids, offsets, None)


def test_rows_outside_the_sets_are_neither_read_nor_written() -> None:
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
    """Two rows 2^31 elements apart; the pages between are never touched, so never allocated."""
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


def results(H: int) -> list[Tensor]:
    ids, offsets = ragged(SIZES, 230, seed=5)
    hidden_NH, weight_VH = normal(6, H, seed=1), normal(230, H, seed=2)
    z = kernels.gather_dot(hidden_NH, weight_VH, ids, offsets)
    return [z, kernels.segment_axpy_(hidden_NH, weight_VH, ids, z, offsets)]


def test_the_order_of_programs_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = results(600)
    order = []

    def set_grid_idx(builder, *place: int) -> None:
        last = (int(size) - 1 for size in builder.grid_dim)
        builder.grid_idx = tuple(end - at for end, at in zip(last, place, strict=True))
        order.append(builder.grid_idx)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", set_grid_idx)
    for found, expected in zip(results(600), forwards, strict=True):
        assert torch.equal(found, expected)
    assert order[0] > order[1]
