"""The head's two operators on tiles of 64 segments, whose dense products go to the matrix units.

Shapes: N positions, V rows of the shard, P pairs, S segments (positions, or ids for dW), M rows of
a source, R rows of an output, H channels; ``tile_map`` tells of tiles, members and blocks.

Segments share indices: the union of a tile's is fewer rows than its pairs, and is read once. Of the
[64, 64] products of a block and a tile only the pairs' are kept, in the place that
``head.gather_dot`` gives them.

bf16 operands, whose products and sums are exact to fp32: a coefficient is taken as the sum of three
bf16 numbers. Others go to ``head``'s operators, for the matrix units would cut their bits. A row
that is not finite spoils its whole tile. No atomics: equal input gives equal bits.

Compiled for sm_90 and run in Triton's interpreter on a CPU; not run on a GPU yet, so not timed and
not the default.
"""

# What Triton compiles is Python in form only: it has no types that mypy knows.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_replay.functional.pair_head import PairHead
from megatron_replay.functional.shard_head import ShardHead, ShardSets
from megatron_replay.functional.tiled_head import union_head
from megatron_replay.kernels.triton import head as pairwise
from megatron_replay.kernels.triton.head import launch
from megatron_replay.kernels.triton.tile_map import (
    BLOCK,
    TILE,
    TileMap,
    overlap_order,
    tile_map,
)

DOT = {"TILE": TILE, "BLOCK": BLOCK, "CHANNELS": 64, "num_warps": 4}
AXPY = {"TILE": TILE, "BLOCK": BLOCK, "CHANNELS": 128, "num_warps": 4}


class TileOperators:
    """``functional.pair_head.PairOperators``; indices must ascend in each segment."""

    def __init__(self) -> None:
        self._mapped: tuple[Tensor, TileMap] | None = None

    def gather_dot(
        self, hidden_NH: Tensor, weight_VH: Tensor, ids: Tensor, offsets: Tensor, /
    ) -> Tensor:
        """As ``head.gather_dot``."""
        H = hidden_NH.shape[1]
        if not (len(ids) and _are_bf16(hidden_NH, weight_VH)):
            return pairwise.gather_dot(hidden_NH, weight_VH, ids, offsets)
        tiles = self._tiles(ids, offsets, len(weight_VH))
        z = torch.empty(len(ids), dtype=torch.float32, device=ids.device)
        strides = (*hidden_NH.stride(), *weight_VH.stride())
        operands = (hidden_NH, weight_VH, z, *tiles, len(tiles.segments))
        launch(_tile_dots, (len(tiles.tile_of_B),), *operands, H, *strides, **DOT)
        return z

    def segment_axpy_(
        self,
        out_RH: Tensor,
        source_MH: Tensor,
        indices: Tensor,
        coefficients: Tensor,
        offsets: Tensor,
        /,
        *,
        rows: Tensor | None = None,
    ) -> Tensor:
        """As ``head.segment_axpy_``, but 0 is added to the row of a segment without pairs.

        In the order of the blocks; in the matrix units' order inside a block.
        """
        H = out_RH.shape[1]
        if not (len(indices) and _are_bf16(source_MH)):
            pairs = (indices, coefficients, offsets)
            return pairwise.segment_axpy_(out_RH, source_MH, *pairs, rows=rows)
        tiles = self._tiles(indices, offsets, len(source_MH))
        strides = (*out_RH.stride(), *source_MH.stride())
        operands = (out_RH, source_MH, coefficients, rows, *tiles)
        grid = (len(tiles.segments), triton.cdiv(H, AXPY["CHANNELS"]))
        launch(_tile_axpys, grid, *operands, grid[0], H, *strides, **AXPY)
        return out_RH

    def _tiles(self, indices: Tensor, offsets: Tensor, bound: int) -> TileMap:
        """Those of the last call are kept: z and dH have the same."""
        if self._mapped is None or self._mapped[0] is not indices:
            order_S = overlap_order(indices, offsets)
            self._mapped = indices, tile_map(indices, offsets, bound, order_S)
        return self._mapped[1]


def head(sets: ShardSets) -> ShardHead:
    """``functional.shard_head.HeadForm``."""
    if sets.group_offsets is not None:
        return union_head(sets)
    return PairHead(sets, TileOperators())


head.reads_by_id = True  # type: ignore[attr-defined]


def _are_bf16(*tensors: Tensor) -> bool:
    return all(tensor.dtype is torch.bfloat16 for tensor in tensors)


@triton.jit
def _block(
    members,
    member_offsets,
    block_offsets,
    words,
    first_pairs,
    tile,
    block,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block's members and which are there; which a place has, as which pair: [TILE, BLOCK]."""
    first = tl.load(member_offsets + tile) + (block - tl.load(block_offsets + tile)) * BLOCK
    number = first + tl.arange(0, BLOCK)
    inside = number < tl.load(member_offsets + tile + 1)
    member = tl.load(members + number, mask=inside, other=0).to(tl.int64)
    place = tl.cast(block, tl.int64) * TILE + tl.arange(0, TILE)
    word = tl.load(words + place).to(tl.uint64)[:, None]
    bit = tl.arange(0, BLOCK).to(tl.uint64)[None, :]
    has = ((word >> bit) & 1) != 0
    below = word & ((tl.full([1, BLOCK], 1, tl.uint64) << bit) - 1)
    return member, inside, has, tl.load(first_pairs + place)[:, None] + _ones(below).to(tl.int32)


@triton.jit
def _ones(word):
    """Bits of a 64-bit word that are set; the compiler takes it for the one instruction it is."""
    word = word - ((word >> 1) & 0x5555555555555555)
    word = (word & 0x3333333333333333) + ((word >> 2) & 0x3333333333333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (word * 0x0101010101010101) >> 56


@triton.jit
def _tile_dots(
    hidden,
    weight,
    z,
    segments,
    members,
    member_offsets,
    block_offsets,
    tile_of_block,
    words,
    first_pairs,
    tiles,
    channels,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One block of a tile: all its logits, of which the pairs' are kept."""
    block = tl.program_id(0)
    tile = tl.load(tile_of_block + block)
    if tile == tiles:
        return
    member, inside, has, pair = _block(
        members, member_offsets, block_offsets, words, first_pairs, tile, block, TILE, BLOCK
    )
    segment = tl.load(segments + tile * TILE + tl.arange(0, TILE)).to(tl.int64)
    h_at = hidden + (segment * hidden_row)[:, None]
    w_at = weight + (member * weight_row)[None, :]
    logits = tl.zeros([TILE, BLOCK], tl.float32)
    for begin in range(0, channels, CHANNELS):
        channel = begin + tl.arange(0, CHANNELS)
        real = channel < channels
        channel = channel.to(tl.int64)
        h = tl.load(
            h_at + (channel * hidden_column)[None, :],
            mask=(segment >= 0)[:, None] & real[None, :],
            other=0.0,
        )
        w = tl.load(
            w_at + (channel * weight_column)[:, None],
            mask=inside[None, :] & real[:, None],
            other=0.0,
        )
        logits = tl.dot(h, w, logits)
    tl.store(z + pair, logits, mask=has)


@triton.jit
def _tile_axpys(
    out,
    source,
    coefficients,
    rows,
    segments,
    members,
    member_offsets,
    block_offsets,
    tile_of_block,
    words,
    first_pairs,
    tiles,
    channels,
    out_row,
    out_column,
    source_row,
    source_column,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One tile and a block of channels: coefficients [TILE, BLOCK] times members' rows."""
    tile = tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    real = channel < channels
    channel = channel.to(tl.int64)
    total = tl.zeros([TILE, CHANNELS], tl.float32)
    for block in range(tl.load(block_offsets + tile), tl.load(block_offsets + tile + 1)):
        member, inside, has, pair = _block(
            members, member_offsets, block_offsets, words, first_pairs, tile, block, TILE, BLOCK
        )
        factor = tl.load(coefficients + pair, mask=has, other=0.0)
        x = tl.load(
            source + (member * source_row)[:, None] + (channel * source_column)[None, :],
            mask=inside[:, None] & real[None, :],
            other=0.0,
        )
        # Eight bits at a time: the three together have the 24 of the coefficient.
        for _ in tl.static_range(3):
            part = factor.to(tl.bfloat16)
            total = tl.dot(part, x, total)
            factor -= part.to(tl.float32)
    segment = tl.load(segments + tile * TILE + tl.arange(0, TILE))
    row = segment
    if rows is not None:
        row = tl.load(rows + segment, mask=segment >= 0, other=0)
    at = out + (row.to(tl.int64) * out_row)[:, None] + (channel * out_column)[None, :]
    written = (segment >= 0)[:, None] & real[None, :]
    tl.store(at, tl.load(at, mask=written, other=0.0) + total, mask=written)
