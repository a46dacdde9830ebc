"""A backend of two operators over pairs, with torch's softmax between them.

It is for sets that positions do not share.

Shapes: N positions, V rows of the shard, H hidden channels, P pairs of a position and a candidate,
K candidates of the largest set.
"""

from __future__ import annotations

import math
from typing import Protocol

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


class PairOperators(Protocol):
    """The two operators that a device must have; fp32 results, equal bits for equal input."""

    def gather_dot(
        self, hidden_NH: Tensor, weight_VH: Tensor, ids: Tensor, offsets: Tensor, /
    ) -> Tensor:
        """z[p] = <hidden[n], weight[ids[p]]> for offsets[n] <= p < offsets[n + 1]: fp32 [P].

        ``ids`` is int32 [P], ``offsets`` int32 [N + 1].
        """
        ...

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
        """out[rows[s]] += sum of coefficients[p] * source[indices[p]] over segment s, in place.

        ``indices`` is int32 [P], ``coefficients`` fp32 [P], ``offsets`` int32 [S + 1]; ``rows`` is
        int32 [S] without duplicates, None for 0 to S - 1. Sums in the order of the pairs.
        """
        ...


class PairHead:
    """A ``ShardHead`` of two operators; keeps 4 bytes a pair between forward and backward."""

    def __init__(self, sets: CandidateSets, operators: PairOperators) -> None:
        assert sets.group_offsets is None
        self._sets, self._operators = sets, operators
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

    def forward(self, hidden_NH: Tensor, weight_VH: Tensor, *, hidden_grad: bool) -> Partials:
        """As in ``ShardHead``."""
        if not len(self._sets.ids):
            return no_partials(hidden_NH)
        z_P = self._operators.gather_dot(hidden_NH, weight_VH, self._sets.ids, self._offsets)
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
        if not len(self._sets.ids):
            return dH_NH
        slope_NK = torch.exp(self._logits_NK - softmax.top_N[:, None]) / softmax.total_N[:, None]
        slope_NK = (slope_NK - self._is_label_NK.float()) * grad_N[:, None]
        slope_P = slope_NK[self._sets.position_P, self._column_P()]
        if dH_NH is not None:
            ids, offsets = self._sets.ids, self._offsets
            self._operators.segment_axpy_(dH_NH, weight_VH, ids, slope_P, offsets)
        if weight_grad_out is not None:
            assert self._sets.transpose is not None
            order, positions, rows, starts = self._sets.transpose
            self._operators.segment_axpy_(
                weight_grad_out,
                hidden_NH,
                positions.int(),
                slope_P[order],
                starts.int(),
                rows=rows,
            )
        return dH_NH

    def _column_P(self) -> Tensor:
        """Place of each pair in its set."""
        places = torch.arange(len(self._sets.ids), device=self._sets.ids.device)
        return places - self._sets.offsets[self._sets.position_P]


def pair_backend(operators: PairOperators) -> HeadBackend:
    """Uses the two operators for own sets, and dense products for sets that positions share."""

    def bind(sets: CandidateSets) -> ShardHead:
        if sets.group_offsets is None:
            return PairHead(sets, operators)
        return union_head(sets)

    return HeadBackend(bind, reads_transpose=True)
