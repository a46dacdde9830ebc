"""Heads of dense blocks of logits: any device, through the matrix product that torch carries.

Shapes: N positions, V rows of this rank's output-layer shard, H hidden channels, G candidate sets,
P pairs; a tile has n positions and U rows.

A tile's logits are computed, folded into each position's maximum and sum, and dropped. Backward
computes them once more: a fourth product beside the three that a linear layer needs, for a memory
that does not grow with the number of candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_replay.functional.shard_head import (
    Partials,
    ShardSets,
    Softmax,
    finite,
    no_partials,
    rescale,
    zeros,
)

#: Positions with sets of their own whose union is multiplied at one time. More would share more
#: ids, and multiply more rows that are in one position's set only.
_TILE_POSITIONS = 128
#: Positions of one shared set at a time: bounds the logits of a long document.
_SHARED_TILE_POSITIONS = 1024


@dataclass(frozen=True, eq=False)
class Tile:
    """A dense block of logits [n, U]: some positions and some rows of the output layer.

    Attributes:
        positions: the n positions.
        rows: the U rows of the shard, ascending and distinct; those of a slice are not copied.
        pairs: (position, row) places in the block that count; None if all of them do.
    """

    positions: slice
    rows: slice | Tensor
    pairs: tuple[Tensor, Tensor] | None = None

    def logits(self, hidden_nH: Tensor, weight_UH: Tensor) -> Tensor:
        """fp32 [n, U] of the tile's own operands, fp32; -inf at places that do not count."""
        logits_nU = hidden_nH @ weight_UH.T
        if self.pairs is None:
            return logits_nU
        excluded_nU = torch.ones_like(logits_nU, dtype=torch.bool)
        excluded_nU[self.pairs] = False
        return logits_nU.masked_fill_(excluded_nU, -math.inf)

    def labels(self, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        """Column [n] of each position's label, and whether the tile has it, bool [n]."""
        label_n = labels_N[self.positions]
        if isinstance(self.rows, slice):
            column_n = label_n - self.rows.start
            found_n = (column_n >= 0) & (label_n < self.rows.stop)
            return column_n.where(found_n, 0), found_n
        column_n = torch.searchsorted(self.rows, label_n).clamp_(max=len(self.rows) - 1)
        return column_n, self.rows[column_n] == label_n


class TiledHead:
    """A ``ShardHead`` over tiles, taken in order; a row occurs once in a tile."""

    def __init__(self, tiles: Sequence[Tile], labels_N: Tensor) -> None:
        self._tiles, self._labels_N = tiles, labels_N

    def forward(self, hidden_NH: Tensor, weight_VH: Tensor, *, hidden_grad: bool) -> Partials:
        """As in ``ShardHead``."""
        max_N, sum_N, gold_N = no_partials(hidden_NH)
        for tile in self._tiles:
            at = tile.positions
            logits_nU = tile.logits(hidden_NH[at].float(), weight_VH[tile.rows].float())
            column_n, found_n = tile.labels(self._labels_N)
            label_logit_n = logits_nU.gather(1, column_n[:, None]).squeeze(1)
            gold_N[at] = torch.where(found_n, label_logit_n, gold_N[at])
            new_max_n = torch.maximum(max_N[at], logits_nU.amax(1))
            sum_N[at] *= rescale(max_N[at], new_max_n)
            sum_N[at] += logits_nU.sub_(finite(new_max_n)[:, None]).exp_().sum(1)
            max_N[at] = new_max_n
        return Partials(max_N, sum_N, gold_N)

    def backward(
        self,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        softmax: Softmax,
        grad_N: Tensor,
        *,
        hidden_grad: bool,
        weight_grad_out: Tensor | None,
    ) -> Tensor | None:
        """As in ``ShardHead``."""
        dH_NH = zeros(hidden_NH) if hidden_grad else None
        for tile in self._tiles:
            at = tile.positions
            hidden_nH, weight_UH = hidden_NH[at].float(), weight_VH[tile.rows].float()
            slope_nU = tile.logits(hidden_nH, weight_UH).sub_(softmax.top_N[at, None]).exp_()
            slope_nU.div_(softmax.total_N[at, None])
            column_n, found_n = tile.labels(self._labels_N)
            positions_n = torch.arange(len(column_n), device=column_n.device)
            slope_nU[positions_n, column_n] -= found_n.float()
            slope_nU *= grad_N[at, None]
            if dH_NH is not None:
                dH_NH[at] += slope_nU @ weight_UH
            if weight_grad_out is not None:
                weight_grad_out[tile.rows] += slope_nU.T @ hidden_nH
        return dH_NH


def dense_head(sets: ShardSets) -> TiledHead:
    """The definition: one tile of all positions and all rows, [N, V], with the sets marked in it.

    For checking others: its memory and work are those of the full softmax.
    """
    N = len(sets.labels_N)
    rows, set_of = sets.ids.long(), sets.position_P
    if sets.group_offsets is not None:
        starts, stops = sets.group_offsets[set_of], sets.group_offsets[set_of + 1]
        counts = stops - starts
        first = counts.cumsum(0) - counts
        place = torch.arange(int(counts.sum()), device=rows.device)
        set_of = place - (first - starts).repeat_interleave(counts)
        rows = rows.repeat_interleave(counts)
    tiles = [Tile(slice(0, N), slice(0, sets.num_rows), (set_of, rows))] if len(rows) else []
    return TiledHead(tiles, sets.labels_N)


def union_head(sets: ShardSets) -> TiledHead:
    """Neighbouring positions times the union of their sets; of a shared set, times that set."""
    if sets.group_offsets is None:
        tiles = _position_tiles(sets)
    else:
        tiles = _group_tiles(sets, sets.group_offset_list())
    return TiledHead(tiles, sets.labels_N)


def _position_tiles(sets: ShardSets) -> list[Tile]:
    """The sets of neighbours overlap: a dense product of their union is less than rows for each."""
    tiles = []
    offsets = sets.offset_list()
    num_positions = len(offsets) - 1
    for first in range(0, num_positions, _TILE_POSITIONS):
        last = min(first + _TILE_POSITIONS, num_positions)
        span = slice(offsets[first], offsets[last])
        rows, column = sets.ids[span].long().unique(return_inverse=True)
        if len(rows):
            pairs = sets.position_P[span] - first, column
            tiles.append(Tile(slice(first, last), rows, pairs))
    return tiles


def _group_tiles(sets: ShardSets, group_offsets: list[int]) -> list[Tile]:
    """Every product is used."""
    tiles = []
    offsets = sets.offset_list()
    for group in range(len(offsets) - 1):
        rows = sets.ids[offsets[group] : offsets[group + 1]].long()
        if not len(rows):
            continue
        start, stop = group_offsets[group], group_offsets[group + 1]
        for first in range(start, stop, _SHARED_TILE_POSITIONS):
            tiles.append(Tile(slice(first, min(first + _SHARED_TILE_POSITIONS, stop)), rows))
    return tiles
