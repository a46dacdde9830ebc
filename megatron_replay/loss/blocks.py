"""Backends that multiply dense blocks of logits with torch, on any device.

Shapes: N positions, V rows of this rank's shard of the output layer, H hidden channels, G candidate
sets, P pairs; a tile has n positions and U rows.

A tile's logits are computed, reduced to each position's maximum and sum, and dropped. Backward
computes them again: a linear layer needs three products and this needs four, but its memory does
not grow with the number of candidates.

bf16 operands are multiplied as they are where the device's torch returns the fp32 sums, and in fp32
elsewhere (``product_dtype``). Products of bf16 are exact in fp32, so both give the same logits
and loss up to the order of summation. The gradients' slopes dz are rounded to bf16, so each term
of dH and dW has a relative error of at most 2^-8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_replay.loss.backends import (
    HeadBackend,
    Partials,
    Softmax,
    finite,
    no_partials,
    rescale,
    zeros,
)
from megatron_replay.loss.candidate_sets import CandidateSets, unions

#: Positions of one shared set at a time: bounds the logits of a long document.
SHARED_POSITIONS = 1024


def slices(start: int, stop: int, step: int) -> list[slice]:
    """``start`` to ``stop`` in slices of ``step``; the last may be shorter."""
    return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]


def product_dtype(*operands: Tensor) -> torch.dtype:
    """The dtype in which blocks multiply operands: bf16 where they are and torch can, else fp32.

    It can where ``torch.mm`` returns the fp32 sums of bf16 products: with CUDA from torch 2.8 on,
    and with torch_npu from 2.9.0.post6 on. Not on a CPU.
    """
    key = torch._C._dispatch_key_for_device(operands[0].device.type)
    multiplies_bf16 = "dtype" in torch.ops.aten.mm.overloads() and (
        torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm.dtype", key)
    )
    are_bf16 = all(operand.dtype is torch.bfloat16 for operand in operands)
    return torch.bfloat16 if are_bf16 and multiplies_bf16 else torch.float32


def product(left: Tensor, right: Tensor) -> Tensor:
    """fp32 left @ right, summed in fp32; ``left`` is rounded to the dtype of ``right``."""
    if right.dtype is torch.float32:
        return left @ right
    return torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)


class Span(NamedTuple):
    """Neighbouring positions, the union of their sets in ``Blocks.rows``, and their pairs."""

    positions: slice
    rows: slice
    pairs: slice


@dataclass(frozen=True, eq=False)
class Blocks:
    """Sets as dense blocks [n, U] of neighbouring positions and the union of their sets.

    Attributes:
        rows: int64, the union of each span, ascending, one span after another.
        places: int64 [P], place of each pair in its span's flat block [n * U].
        spans: positions with at least one candidate, as slices on the host.
    """

    rows: Tensor
    places: Tensor
    spans: list[Span]

    #: Positions of a block. A larger block shares more ids, but also multiplies more rows that are
    #: in the set of one position only.
    POSITIONS = 128

    @staticmethod
    def of(sets: CandidateSets) -> Blocks:
        """The blocks of sets that positions do not share; built on the host."""
        ids, offsets, group_offsets, _ = sets.host
        assert group_offsets is None
        positions = slices(0, len(offsets) - 1, Blocks.POSITIONS)
        pairs = [slice(int(offsets[p.start]), int(offsets[p.stop])) for p in positions]
        column = np.empty(ids.max(initial=-1) + 1, np.int64)
        place_of = np.repeat(np.arange(len(offsets) - 1) % Blocks.POSITIONS, np.diff(offsets))
        rows, places, spans = [np.empty(0, np.int64)], np.empty(len(ids), np.int64), []
        total = 0
        for at, pair, union in zip(
            positions, pairs, unions(ids, ((p.start, p.stop) for p in pairs)), strict=True
        ):
            if not len(union):
                continue
            column[union] = np.arange(len(union))
            places[pair] = place_of[pair] * len(union) + column[ids[pair].astype(np.intp)]
            spans.append(Span(at, slice(total, total + len(union)), pair))
            rows.append(union)
            total += len(union)
        return Blocks(torch.from_numpy(np.concatenate(rows)), torch.from_numpy(places), spans)

    def moved(self, move: Callable[[Tensor], Tensor]) -> Blocks:
        """The same blocks, with ``move`` applied to each tensor."""
        return Blocks(move(self.rows), move(self.places), self.spans)


@dataclass(frozen=True, eq=False)
class Tile:
    """A dense block of logits [n, U]: some positions and some rows of the output layer.

    Attributes:
        positions: the n positions.
        rows: the U rows of the shard, ascending and distinct; a slice is not copied.
        label_columns_n: int64, the column of each label; -1 where the tile does not have it.
        places: int64, places n * U + u of the candidates in the flat block; None: all.
    """

    positions: slice
    rows: slice | Tensor
    label_columns_n: Tensor
    places: Tensor | None = None

    def logits(self, hidden_nH: Tensor, weight_UH: Tensor) -> Tensor:
        """fp32 [n, U] from the tile's own operands; -inf at places that are not candidates."""
        logits_nU = product(hidden_nH, weight_UH.T)
        if self.places is None:
            return logits_nU
        excluded = torch.ones_like(logits_nU, dtype=torch.bool)
        excluded.view(-1)[self.places] = False
        return logits_nU.masked_fill_(excluded, -math.inf)

    def labels(self) -> tuple[Tensor, Tensor]:
        """Column [n] of each position's label, 0 if there is none; and whether there is one."""
        return self.label_columns_n.clamp(min=0), self.label_columns_n >= 0


def vocabulary_tile(
    positions: slice, rows: slice, label_rows_N: Tensor, places: Tensor | None = None
) -> Tile:
    """A tile of neighbouring rows; labels are on the device, and may be of any row or none."""
    column_n = label_rows_N[positions] - rows.start
    found_n = (column_n >= 0) & (column_n < rows.stop - rows.start)
    return Tile(positions, rows, column_n.where(found_n, -1), places)


class TiledHead:
    """A ``ShardHead`` over tiles, in order; a row occurs once in a tile."""

    def __init__(self, tiles: Sequence[Tile]) -> None:
        self._tiles = tiles

    def forward(self, hidden_NH: Tensor, weight_VH: Tensor) -> Partials:
        """As in ``ShardHead``."""
        max_N, sum_N, label_logit_N = no_partials(hidden_NH)
        dtype = product_dtype(hidden_NH, weight_VH)
        for tile in self._tiles:
            at = tile.positions
            logits_nU = tile.logits(hidden_NH[at].to(dtype), weight_VH[tile.rows].to(dtype))
            column_n, found_n = tile.labels()
            label_logit_n = logits_nU.gather(1, column_n[:, None]).squeeze(1)
            label_logit_N[at] = torch.where(found_n, label_logit_n, label_logit_N[at])
            new_max_n = torch.maximum(max_N[at], logits_nU.amax(1))
            sum_N[at] *= rescale(max_N[at], new_max_n)
            sum_N[at] += logits_nU.sub_(finite(new_max_n)[:, None]).exp_().sum(1)
            max_N[at] = new_max_n
        return Partials(max_N, sum_N, label_logit_N)

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
        dtype = product_dtype(hidden_NH, weight_VH)
        for tile in self._tiles:
            at = tile.positions
            hidden_nH, weight_UH = hidden_NH[at].to(dtype), weight_VH[tile.rows].to(dtype)
            slope_nU = tile.logits(hidden_nH, weight_UH).sub_(softmax.top_N[at, None]).exp_()
            slope_nU.div_(softmax.total_N[at, None])
            column_n, found_n = tile.labels()
            positions_n = torch.arange(len(column_n), device=column_n.device)
            slope_nU[positions_n, column_n] -= found_n.float()
            slope_nU *= grad_N[at, None]
            if dH_NH is not None:
                dH_NH[at] += product(slope_nU, weight_UH)
            if weight_grad_out is not None:
                weight_grad_out[tile.rows] += product(slope_nU.T, hidden_nH)
        return dH_NH


def dense_head(sets: CandidateSets) -> TiledHead:
    """The definition: one tile of all positions and all rows, [N, V], with the sets marked in it.

    It checks the other backends; its memory and work are those of the full softmax.
    """
    G, V = len(sets.offsets) - 1, sets.num_rows
    inside_NV = torch.zeros(G, V, dtype=torch.bool, device=sets.ids.device)
    inside_NV[sets.set_P, sets.ids.long()] = True
    if sets.group_offsets is not None:
        inside_NV = inside_NV.repeat_interleave(sets.group_offsets.diff(), 0)
    places = inside_NV.flatten().nonzero().squeeze(1)
    whole = vocabulary_tile(slice(0, len(inside_NV)), slice(0, V), sets.label_rows_N, places)
    return TiledHead([whole] if len(places) else [])


def union_head(sets: CandidateSets) -> TiledHead:
    """Multiplies neighbouring positions by the union of their sets, or by the set they share.

    Rows, places and columns come from the host, so that a step does not wait for the device.
    """
    if sets.group_offsets is not None:
        return TiledHead(_shared_tiles(sets))
    blocks = Blocks.of(sets)
    unions = ((span.positions, blocks.rows[span.rows].numpy()) for span in blocks.spans)
    column_N = _label_columns(sets, unions)
    blocks = blocks.moved(lambda tensor: tensor.to(sets.ids.device, non_blocking=True))
    return TiledHead(
        [
            Tile(
                span.positions,
                blocks.rows[span.rows],
                column_N[span.positions],
                blocks.places[span.pairs],
            )
            for span in blocks.spans
        ]
    )


def _shared_tiles(sets: CandidateSets) -> list[Tile]:
    """Tiles of a document's positions and its set; every product of such a block is used."""
    ids, offsets, group_offsets, _ = sets.host
    assert group_offsets is not None
    groups = [
        (slice(*positions), slice(*pairs))
        for positions, pairs in zip(pairwise(group_offsets), pairwise(offsets), strict=True)
        if pairs[0] < pairs[1]
    ]
    column_N = _label_columns(sets, ((positions, ids[pairs]) for positions, pairs in groups))
    tiles = []
    for positions, pairs in groups:
        rows = sets.ids[pairs].long()
        parts = slices(positions.start, positions.stop, SHARED_POSITIONS)
        tiles += [Tile(part, rows, column_N[part]) for part in parts]
    return tiles


def _label_columns(
    sets: CandidateSets, blocks: Iterable[tuple[slice, npt.NDArray[np.integer[Any]]]]
) -> Tensor:
    """int64 [N], the column of each label among the ascending rows of its block, or -1."""
    column_N = np.full(len(sets.host.label_rows_N), -1)
    for positions, rows in blocks:
        label_n = sets.host.label_rows_N[positions]
        column_n = np.searchsorted(rows, label_n).clip(max=len(rows) - 1)
        column_N[positions] = np.where(rows[column_n] == label_n, column_n, -1)
    return torch.from_numpy(column_N).to(sets.ids.device, non_blocking=True)


#: The definition, and the backend that runs anywhere.
DENSE, UNION = HeadBackend(dense_head), HeadBackend(union_head)
