"""The candidates, and an unbiased estimate of all that lies outside of them.

    Z^ = sum_{j in S} exp z[j] + V / R * sum_{j in D outside S} exp z[j],    E Z^ = sum_j exp z[j]

D: R distinct ids of the V, drawn uniformly and shared by all positions. Each id is in D with
probability R / V and counts V / R where it is no candidate (Horvitz and Thompson), so the mean over
draws is the whole partition function at every position, whatever its set. Its logarithm, the loss,
is too small in the mean, by about var(Z^) / (2 Z^2).

Shapes: N positions, G candidate sets, V rows of the shard, R drawn rows of the shard, H hidden
channels, E pairs of a set and a drawn row that is in it; a tile has n positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_replay.functional.shard_head import (
    HeadForm,
    Partials,
    ShardHead,
    ShardSets,
    Softmax,
    rescale,
)
from megatron_replay.functional.tiled_head import Tile, TiledHead


class TailSpan(NamedTuple):
    """Some positions, their sets, and the pairs of these sets."""

    positions: slice
    sets: slice
    pairs: slice


@dataclass(frozen=True, eq=False)
class TailSample:
    """The drawn ids as one shard has them.

    Attributes:
        rows_R: int64, drawn rows of the shard, ascending and distinct.
        excluded_E: int64, ``set * R + place`` of each drawn row in ``rows_R`` that is in a set,
            ascending.
        set_of_N: None: position n has set n. Otherwise int64, the set of each position.
        log_weight: log of the vocabulary's ids over those drawn, on all shards.
        spans: all positions, piece by piece, as the host knows them.
    """

    rows_R: Tensor
    excluded_E: Tensor
    set_of_N: Tensor | None
    log_weight: float
    spans: list[TailSpan]

    def moved(self, move: Callable[[Tensor], Tensor]) -> TailSample:
        """The same sample, each tensor put where ``move`` puts it."""
        set_of_N = None if self.set_of_N is None else move(self.set_of_N)
        rows_R, excluded_E = move(self.rows_R), move(self.excluded_E)
        return TailSample(rows_R, excluded_E, set_of_N, self.log_weight, self.spans)


@dataclass(frozen=True, eq=False, kw_only=True)
class _SampledTile(Tile):
    """Logits of the drawn rows, plus ``log_weight``; -inf where a row is a candidate."""

    sample: TailSample
    span: TailSpan

    def logits(self, hidden_nH: Tensor, weight_UH: Tensor) -> Tensor:
        """As in ``Tile``."""
        logits_nR = (hidden_nH @ weight_UH.T).add_(self.sample.log_weight)
        sets = self.span.sets
        R = logits_nR.shape[1]
        excluded = logits_nR.new_zeros((sets.stop - sets.start) * R, dtype=torch.bool)
        excluded[self.sample.excluded_E[self.span.pairs] - sets.start * R] = True
        excluded_GR = excluded.view(-1, R)
        if self.sample.set_of_N is not None:
            set_of_n = self.sample.set_of_N[self.span.positions] - sets.start
            excluded_GR = excluded_GR.index_select(0, set_of_n)
        return logits_nR.masked_fill_(excluded_GR, -math.inf)

    def labels(self, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        """None: a label is a candidate."""
        none_n = torch.zeros_like(labels_N[self.span.positions])
        return none_n, none_n.bool()


class SampledTailHead:
    """A ``ShardHead``: another one's candidates, and the sampled tail in dense products beside it.

    Memory: logits fp32 of a span and fp32 [R, H], computed again in backward.
    """

    def __init__(self, candidates: ShardHead, sample: TailSample, labels_N: Tensor) -> None:
        tiles = [
            _SampledTile(span.positions, sample.rows_R, sample=sample, span=span)
            for span in sample.spans
        ]
        self._candidates, self._tail = candidates, TiledHead(tiles, labels_N)

    def forward(self, hidden_NH: Tensor, weight_VH: Tensor, *, hidden_grad: bool) -> Partials:
        """As in ``ShardHead``."""
        inside, outside = (
            head.forward(hidden_NH, weight_VH, hidden_grad=hidden_grad)
            for head in (self._candidates, self._tail)
        )
        max_N = torch.maximum(inside.max_N, outside.max_N)
        sum_N = inside.sum_N * rescale(inside.max_N, max_N)
        sum_N += outside.sum_N * rescale(outside.max_N, max_N)
        return Partials(max_N, sum_N, inside.gold_N)

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
        dH_NH, tail_dH_NH = (
            head.backward(
                hidden_NH,
                weight_VH,
                softmax,
                grad_N,
                hidden_grad=hidden_grad,
                weight_grad_out=weight_grad_out,
            )
            for head in (self._candidates, self._tail)
        )
        if dH_NH is None or tail_dH_NH is None:
            return None
        return dH_NH.add_(tail_dH_NH)


def with_sampled_tail(form: HeadForm, sample: TailSample) -> HeadForm:
    """``form`` with the tail that ``sample`` estimates; the sets are those it was cut against."""

    def head(sets: ShardSets) -> ShardHead:
        return SampledTailHead(form(sets), sample, sets.labels_N)

    return head
