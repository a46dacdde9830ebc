"""A backend of two operators over pairs of a position and a candidate, for sets of one position.

A device has the two operators, with fp32 results and equal bits for equal input; the softmax
between them is torch's:

    gather_dot(hidden_NH, weight_VH, ids, offsets) -> z
        z[p] = <hidden[n], weight[ids[p]]> for offsets[n] <= p < offsets[n + 1]: fp32 [P]
    segment_axpy_(out_RH, source_MH, indices, coefficients, offsets, *, rows=None) -> out_RH
        out[rows[s]] += sum of coefficients[p] * source[indices[p]] over offsets[s] <= p <
        offsets[s + 1], in place and in the order of the pairs; a segment without pairs leaves its
        row untouched

``ids`` and ``indices`` are int32 [P], ``offsets`` int32 from 0 to P, ``coefficients`` and
``out_RH`` fp32, ``rows`` int32 [S] without duplicates, or None for 0 to S - 1. The values of ids
and offsets are not checked, because that would wait for the device.

Shapes: N positions, V rows of the shard, H hidden channels, P pairs, K candidates of the largest
set, S segments, R rows of an output, M rows of a source.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_replay.loss.backends import (
    HeadBackend,
    Partials,
    ShardHead,
    Softmax,
    finite,
    no_partials,
    zeros,
)
from megatron_replay.loss.blocks import union_head
from megatron_replay.loss.candidate_sets import CandidateSets

Operator = Callable[..., Tensor]


class PairHead:
    """A ``ShardHead`` of two operators; keeps 4 bytes a pair between forward and backward."""

    def __init__(self, sets: CandidateSets, gather_dot: Operator, segment_axpy_: Operator) -> None:
        assert sets.group_offsets is None
        self._sets, self._gather_dot, self._segment_axpy_ = sets, gather_dot, segment_axpy_
        self._offsets = sets.offsets.int()
        sizes_N = sets.offsets.diff()
        # Pairs by position, padded to the largest set; padding points to the place after all pairs.
        within_K = torch.arange(sets.largest, device=sizes_N.device)
        self._pair_NK = torch.where(
            within_K < sizes_N[:, None], sets.offsets[:-1, None] + within_K, len(sets.ids)
        )
        ids = torch.nn.functional.pad(sets.ids, (0, 1), value=-1)
        self._is_label_NK = ids[self._pair_NK] == sets.label_rows_N[:, None]
        self._is_label_NK &= self._pair_NK < len(sets.ids)
        self._logits_NK = sizes_N.new_zeros(0, dtype=torch.float32)

    def forward(self, hidden_NH: Tensor, weight_VH: Tensor) -> Partials:
        """As in ``ShardHead``."""
        if not len(self._sets.ids):
            return no_partials(hidden_NH)
        z_P = self._gather_dot(hidden_NH, weight_VH, self._sets.ids, self._offsets)
        z_NK = torch.nn.functional.pad(z_P, (0, 1), value=-math.inf)[self._pair_NK]
        self._logits_NK = z_NK
        max_N = z_NK.amax(1)
        return Partials(
            max_N,
            sum_N=torch.exp(z_NK - finite(max_N)[:, None]).sum(1),
            label_logit_N=z_NK.masked_fill(~self._is_label_NK, -math.inf).amax(1),
        )

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
        ids, set_P = self._sets.ids, self._sets.set_P
        if not len(ids):
            return dH_NH
        slope_NK = torch.exp(self._logits_NK - softmax.top_N[:, None]) / softmax.total_N[:, None]
        slope_NK = (slope_NK - self._is_label_NK.float()) * grad_N[:, None]
        place_P = torch.arange(len(ids), device=ids.device) - self._sets.offsets[set_P]
        slope_P = slope_NK[set_P, place_P]
        if dH_NH is not None:
            self._segment_axpy_(dH_NH, weight_VH, ids, slope_P, self._offsets)
        if weight_grad_out is not None:
            assert self._sets.transpose is not None
            order, positions, rows, starts = self._sets.transpose
            self._segment_axpy_(
                weight_grad_out,
                hidden_NH,
                positions.int(),
                slope_P[order],
                starts.int(),
                rows=rows,
            )
        return dH_NH


def pair_backend(gather_dot: Operator, segment_axpy_: Operator) -> HeadBackend:
    """Uses the two operators for own sets, and dense products for sets that positions share."""

    def bind(sets: CandidateSets) -> ShardHead:
        if sets.group_offsets is None:
            return PairHead(sets, gather_dot, segment_axpy_)
        return union_head(sets)

    return HeadBackend(bind, reads_transpose=True)
