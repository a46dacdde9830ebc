"""The head's tiled Triton kernels against float64, in Triton's interpreter on a CPU.

Run by test_triton_interpreter.py. Shapes: N positions, V rows of the weight, H channels.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from megatron_replay.functional import restricted_cross_entropy
from megatron_replay.kernels.triton import head as pairwise
from megatron_replay.kernels.triton import head_tiles as kernels
from megatron_replay.kernels.triton.tile_map import BLOCK, TILE, overlap_order, tile_map
from tests.functional.references import error, head_case
from tests.kernels.triton_head_interpreted import apart, normal, owners, ragged

BF16 = torch.bfloat16
#: Two tiles, of unions of several blocks.
SIZES = [3, 0, 1, 201, 8, *range(60), 64, 65, 63, 0]


@pytest.fixture(autouse=True)
def bf16_is_multiplied(monkeypatch):
    """As its numbers; the interpreter of triton 3.7 multiplies its bits."""
    plain = interpreter.InterpreterBuilder.create_dot

    def widened(operand):
        assert operand.dtype.scalar is kernels.tl.bfloat16
        numbers = (operand.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(numbers, kernels.tl.float32)

    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda builder, a, b, *others: plain(builder, widened(a), widened(b), *others),
    )


@pytest.fixture
def only_tiles(monkeypatch):
    """No falling back on what other tests check."""
    monkeypatch.setattr(pairwise, "gather_dot", None)
    monkeypatch.setattr(pairwise, "segment_axpy_", None)


def check_dots(hidden_NH: Tensor, weight_VH: Tensor, ids: Tensor, offsets: Tensor) -> None:
    z = kernels.TileOperators().gather_dot(hidden_NH, weight_VH, ids, offsets)
    h_PH, w_PH = hidden_NH.double()[owners(offsets)], weight_VH.double()[ids.long()]
    assert ((z - (h_PH * w_PH).sum(1)).abs() <= 3e-7 * h_PH.norm(dim=1) * w_PH.norm(dim=1)).all()


def check_axpys(
    out_RH: Tensor, source_MH: Tensor, indices: Tensor, offsets: Tensor, rows: Tensor | None
) -> None:
    # Some coefficients are small: what a tile's others do not need, they do.
    coefficients = normal(len(indices), seed=9) * 10.0 ** -torch.arange(len(indices)).fmod(7)
    segment_P = owners(offsets)
    row_P = segment_P if rows is None else rows.long()[segment_P]
    terms_PH = coefficients.double()[:, None] * source_MH.double()[indices.long()]
    expected_RH = out_RH.double().index_add(0, row_P, terms_PH)
    sizes_RH = out_RH.double().abs().index_add(0, row_P, terms_PH.abs())
    operands = (out_RH, source_MH, indices, coefficients, offsets)
    assert kernels.TileOperators().segment_axpy_(*operands, rows=rows) is out_RH
    assert ((out_RH - expected_RH).abs() <= 1e-6 * sizes_RH).all()


@pytest.mark.usefixtures("only_tiles")
@pytest.mark.parametrize("H", [1, 7, 8, 64, 100, 129])
def test_products_and_sums_are_those_of_float64(H: int) -> None:
    ids, offsets = ragged(SIZES, 230, seed=H)
    N = len(SIZES)
    weight_VH = normal(230, H, seed=2, dtype=BF16)
    check_dots(normal(N, H, seed=1, dtype=BF16), weight_VH, ids, offsets)
    check_axpys(normal(N, H, seed=3), weight_VH, ids, offsets, None)
    rows = torch.randperm(2 * N)[:N].int()
    check_axpys(normal(2 * N, H, seed=4), weight_VH, ids, offsets, rows)


@pytest.mark.usefixtures("only_tiles")
def test_long_rows_in_any_strides() -> None:
    ids, offsets = ragged([2, 0, 9], 12, seed=0)
    hidden_NH, weight_VH = normal(8192, 3, seed=1, dtype=BF16).T, normal(12, 8192, seed=2).to(BF16)
    check_dots(hidden_NH, apart(weight_VH), ids, offsets)
    check_axpys(apart(normal(3, 8192, seed=3)), apart(weight_VH), ids, offsets, None)
    check_axpys(normal(64, 3, seed=4).T, normal(64, 12, seed=5, dtype=BF16).T, ids, offsets, None)


@pytest.mark.usefixtures("only_tiles")
def test_memory_longer_than_32_bits() -> None:
    """Two rows 2^31 elements apart; what lies between is never touched, so never there."""
    weight_VH = torch.empty(2**31 + 8, dtype=BF16).as_strided((3, 8), (2**30, 1))
    weight_VH[0], weight_VH[2] = 1.0, normal(8, seed=0)
    ids, offsets = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, 2]).int()
    check_dots(normal(1, 8, seed=1, dtype=BF16), weight_VH, ids, offsets)
    check_axpys(normal(1, 8, seed=2), weight_VH, ids, offsets, None)


def test_what_is_not_of_bf16_is_left_to_the_pairwise_operators() -> None:
    ids, offsets = ragged([20, 0, 9], 40, seed=0)
    check_dots(normal(3, 30, seed=1), normal(40, 30, seed=2), ids, offsets)
    check_axpys(normal(3, 30, seed=3), normal(40, 30, seed=4), ids, offsets, None)
    nothing, offsets = ragged([0, 0], 5, seed=0)
    operands = normal(2, 4, seed=1, dtype=BF16), normal(5, 4, seed=2, dtype=BF16)
    assert kernels.TileOperators().gather_dot(*operands, nothing, offsets).shape == (0,)


def test_the_map_tells_each_pair_once() -> None:
    ids, offsets = ragged(SIZES, 230, seed=1)
    order = torch.randperm(len(SIZES))
    tiles = tile_map(ids, offsets, 230, order)
    told = []
    for block, tile in enumerate(tiles.tile_of_B.tolist()):
        if tile == len(tiles.block_offsets) - 1:
            continue
        start = int(tiles.member_offsets[tile])
        start += BLOCK * (block - int(tiles.block_offsets[tile]))
        for place in range(TILE):
            word = int(tiles.words[block, place]) & (2**64 - 1)
            members = [start + bit for bit in range(BLOCK) if word >> bit & 1]
            for pair, member in enumerate(members, int(tiles.first_pairs[block, place])):
                assert member < tiles.member_offsets[tile + 1]
                segment = int(tiles.segments[tile, place])
                told.append((pair, segment, int(tiles.members[member])))
    pairs = zip(range(len(ids)), owners(offsets).tolist(), ids.tolist(), strict=True)
    assert sorted(told) == list(pairs)
    assert tiles.segments.flatten()[: len(SIZES)].equal(order.int())


def test_sets_that_share_ids_become_neighbours() -> None:
    """Two kinds of sets in turns, each with an id of its own for each set; and larger ones."""
    kinds = torch.tensor([[0, 1, 2, 3, 4, 5], [10, 11, 12, 13, 14, 15]]).repeat(20, 1)
    sets = [*torch.cat([kinds, 100 + torch.arange(40)[:, None]], 1)]
    sets[30:30] = [torch.arange(8)] * 2
    sizes = torch.tensor([0, *map(len, sets)])
    order = overlap_order(torch.cat(sets).int(), sizes.cumsum(0))
    assert order.sort().values.equal(torch.arange(42))
    assert order[:2].tolist() == [30, 31]
    together = (order[3:] % 2 == order[2:-1] % 2).sum()
    assert together >= 30  # 0 in turns; an id of its own is the least of 7 once in 7


@pytest.mark.usefixtures("only_tiles")
@pytest.mark.parametrize("ghost", [False, True])
def test_the_head_is_that_of_float64(ghost: bool) -> None:
    case = head_case(T=130, V=90, H=24, seed=0, scale=0.3)
    case.hidden_TH, case.weight_VH = case.hidden_TH.to(BF16), case.weight_VH.to(BF16)
    hidden_NH, weight_VH = case.hidden_TH.clone().requires_grad_(), apart(case.weight_VH)
    weight_grad_VH = apart(torch.ones(90, 24))
    tail_logit_N = case.upstream_T * 2 if ghost else None
    loss_N = restricted_cross_entropy(
        hidden_NH,
        weight_VH.requires_grad_(),
        case.ids,
        case.offsets,
        case.labels_T,
        form=kernels.head,
        tail_logit_T=tail_logit_N,
        weight_grad_out=weight_grad_VH,
    )
    (hidden_grad_NH,) = torch.autograd.grad((loss_N * case.upstream_T).sum(), hidden_NH)
    dense = case.dense(tail_logit_N)
    assert error(loss_N, dense[0]) < 1e-6
    assert error(hidden_grad_NH, dense[1]) < 4e-3
    assert error(weight_grad_VH - 1, dense[2]) < 1e-6
