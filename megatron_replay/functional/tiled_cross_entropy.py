"""Cross-entropy over blocks of logits: what the restricted and the full loss have in common.

Shapes: N positions, V rows of this rank's output-layer shard, H hidden channels; a tile has n
positions and U rows.

A tile's logits are computed, folded into each position's running maximum and sum, and dropped.
Backward computes them once more: a fourth product beside the three that a linear layer needs, for
a memory that does not grow with the number of candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

_LOWEST = torch.finfo(torch.float32).min


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

    def logits(self, hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        """fp32 [n, U]; -inf at places that do not count."""
        logits_nU = hidden_NH[self.positions].float() @ weight_VH[self.rows].float().T
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


class TiledCrossEntropy(torch.autograd.Function):
    """L = log(sum over its tiles of exp z, + exp(tail)) - z[x], for each of N positions.

    ``apply(hidden_NH, weight_VH, tiles, labels_N, tail_logit_N, tp_group, reduce_hidden_grad)``
    with ``labels_N`` counted from the shard's first row. Every rank of ``tp_group`` gives tiles of
    its own rows. A label that no tile has gives a loss of +inf. fp32, also under autocast; tiles
    are taken in order and a row occurs once in a tile, so results are bitwise repeatable.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        tiles: Sequence[Tile],
        labels_N: Tensor,
        tail_logit_N: Tensor | None,
        tp_group: dist.ProcessGroup | None,
        reduce_hidden_grad: bool,
    ) -> Tensor:
        """Loss fp32 [N]. All-reduce MAX [N, 2] and SUM [N]."""
        N = hidden_NH.shape[0]
        max_N, gold_N = hidden_NH.new_full((2, N), -math.inf, dtype=torch.float32)
        sum_N = hidden_NH.new_zeros(N, dtype=torch.float32)
        with _without_autocast(hidden_NH):
            for tile in tiles:
                at = tile.positions
                logits_nU = tile.logits(hidden_NH, weight_VH)
                column_n, found_n = tile.labels(labels_N)
                label_logit_n = logits_nU.gather(1, column_n[:, None]).squeeze(1)
                gold_N[at] = torch.where(found_n, label_logit_n, gold_N[at])
                new_max_n = torch.maximum(max_N[at], logits_nU.amax(1))
                sum_N[at] *= _ratio(max_N[at], new_max_n)
                sum_N[at] += logits_nU.sub_(_finite(new_max_n)[:, None]).exp_().sum(1)
                max_N[at] = new_max_n

        top_N = max_N
        if _is_shared(tp_group, N):
            # The label's logit travels by MAX: exact, and a label of no shard stays at -inf.
            facts_2N = torch.stack([max_N, gold_N])
            dist.all_reduce(facts_2N, op=dist.ReduceOp.MAX, group=tp_group)
            top_N, gold_N = facts_2N
        if tail_logit_N is not None:
            top_N = torch.maximum(top_N, tail_logit_N)
        sum_N *= _ratio(max_N, top_N)
        if _is_shared(tp_group, N):
            dist.all_reduce(sum_N, group=tp_group)
        if tail_logit_N is not None:  # of no shard: added once, after the sum over shards
            sum_N += _ratio(tail_logit_N, top_N)

        # Maximum and sum, not their log: exp(z - max) / sum keeps the bits that z - lse rounds off.
        ctx.save_for_backward(hidden_NH, weight_VH, labels_N, top_N, sum_N)
        ctx.tiles, ctx.tp_group, ctx.reduce_hidden_grad = tiles, tp_group, reduce_hidden_grad
        return (top_N - gold_N) + sum_N.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        """dz = (exp z / sum - [label]) * dL; dH = dz W, dW = dz^T H. All-reduce SUM [N, H]."""
        hidden_NH, weight_VH, labels_N, top_N, sum_N = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.zeros_like(hidden_NH, dtype=torch.float32) if wants_hidden else None
        weight_grad = torch.zeros_like(weight_VH, dtype=torch.float32) if wants_weight else None
        with _without_autocast(hidden_NH):
            for tile in ctx.tiles:
                at = tile.positions
                slope_nU = tile.logits(hidden_NH, weight_VH).sub_(top_N[at, None]).exp_()
                slope_nU.div_(sum_N[at, None])
                column_n, found_n = tile.labels(labels_N)
                slope_nU[torch.arange(len(column_n), device=column_n.device), column_n] -= (
                    found_n.float()
                )
                slope_nU *= grad_N[at, None]
                if hidden_grad is not None:
                    hidden_grad[at] += slope_nU @ weight_VH[tile.rows].float()
                if weight_grad is not None:
                    weight_grad[tile.rows] += slope_nU.T @ hidden_NH[at].float()
        if hidden_grad is not None:
            if ctx.reduce_hidden_grad and _is_shared(ctx.tp_group, len(hidden_grad)):
                dist.all_reduce(hidden_grad, group=ctx.tp_group)  # before it is rounded
            hidden_grad = hidden_grad.to(hidden_NH.dtype)
        if weight_grad is not None:
            weight_grad = weight_grad.to(weight_VH.dtype)
        return hidden_grad, weight_grad, None, None, None, None, None


def _finite(max_n: Tensor) -> Tensor:
    """``max_n`` to subtract: where nothing counted yet it is -inf, and -inf - -inf is no number."""
    return max_n.clamp(min=_LOWEST)


def _ratio(old_n: Tensor, new_n: Tensor) -> Tensor:
    """exp(old - new); 0 where nothing counted before."""
    return torch.exp(old_n - _finite(new_n))


def _is_shared(tp_group: dist.ProcessGroup | None, num_positions: int) -> bool:
    """Whether there is anything to exchange, and anyone to exchange it with."""
    return tp_group is not None and num_positions > 0 and dist.get_world_size(tp_group) > 1


def _without_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)
