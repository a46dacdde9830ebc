"""The divergence from a stored distribution, as what it adds to a cross-entropy.

With q a distribution over a position's own set S, and p~ = exp(z) / Z the softmax of a loss
L = log Z - z[x] over S or more,

    L + beta KL(q || p~) = (1 + beta) L + beta sum_{j in S} (c[j] z[j] + q[j] log q[j]),
    c[j] = [j = x] - q[j].

L comes from any form of the head. What is new is linear in z: <h, sum_j c[j] w[j]> at each
position, a sum over shards.

Shapes: N positions, V rows of this rank's output-layer shard, H hidden channels, P pairs of a
position and a candidate of this shard; a tile has n positions and U distinct candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from megatron_replay.functional.shard_head import zeros


class TargetSpan(NamedTuple):
    """Neighbouring positions, the union of their sets in ``rows``, and their pairs."""

    positions: slice
    rows: slice
    pairs: slice


@dataclass(frozen=True, eq=False)
class SoftTargets:
    """Stored distributions as one shard has them.

    Attributes:
        rows: int64, for each span the distinct rows of its candidates, ascending.
        places: int64 [P], place of each pair in its span's block [n, U].
        coefficients: fp32 [P], c.
        negentropy_N: fp32, sum of q log q over the whole of each set.
        spans: all positions, piece by piece, as the host knows them.
    """

    rows: Tensor
    places: Tensor
    coefficients: Tensor
    negentropy_N: Tensor
    spans: list[TargetSpan]

    def moved(self, move: Callable[[Tensor], Tensor]) -> SoftTargets:
        """The same targets, each tensor put where ``move`` puts it."""
        return SoftTargets(
            rows=move(self.rows),
            places=move(self.places),
            coefficients=move(self.coefficients),
            negentropy_N=move(self.negentropy_N),
            spans=self.spans,
        )

    def block(self, span: TargetSpan) -> Tensor:
        """fp32 [n, U], the coefficients of a span."""
        num_rows = span.rows.stop - span.rows.start
        block = self.coefficients.new_zeros((span.positions.stop - span.positions.start) * num_rows)
        block[self.places[span.pairs]] = self.coefficients[span.pairs]
        return block.view(-1, num_rows)


def with_divergence(
    cross_entropy_N: Tensor,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets: SoftTargets,
    *,
    kl_weight: float,
    tp_group: dist.ProcessGroup | None = None,
    reduce_hidden_grad: bool = True,
    weight_grad_out: Tensor | None = None,
) -> Tensor:
    """L + beta KL(q || p~): fp32 [N], given L and the operands it came from.

    Args:
        cross_entropy_N: L, whose softmax must span the targets' sets.
        targets: those of this rank's rows of the weight.
        kl_weight: beta.
        reduce_hidden_grad, weight_grad_out: as in ``restricted_cross_entropy``.

    Communication over ``tp_group``: all-reduce SUM fp32 [N]; in backward SUM fp32 [N, H] if
    ``reduce_hidden_grad``. Memory: fp32 [N, H] between forward and backward; fp32 [U, H] and [n, U]
    while it works.
    """
    linear_N: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
        hidden_NH, weight_VH, targets, tp_group, reduce_hidden_grad, weight_grad_out
    )
    return (1 + kl_weight) * cross_entropy_N + kl_weight * (linear_N + targets.negentropy_N)


class _Linear(torch.autograd.Function):
    """sum of c[j] z[j] over all shards, fp32 [N]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        targets: SoftTargets,
        tp_group: dist.ProcessGroup | None,
        reduce_hidden_grad: bool,
        weight_grad_out: Tensor | None,
    ) -> Tensor:
        """In dense products over unions of neighbours' sets: no pair's row is copied by itself."""
        shared = tp_group is not None and len(hidden_NH) > 0 and dist.get_world_size(tp_group) > 1
        direction_NH = zeros(hidden_NH)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for span in targets.spans:
                weight_UH = weight_VH[targets.rows[span.rows]].float()
                direction_NH[span.positions] = targets.block(span) @ weight_UH
        linear_N = (hidden_NH.float() * direction_NH).sum(1)
        if shared:
            dist.all_reduce(linear_N, group=tp_group)
        ctx.save_for_backward(hidden_NH, weight_VH, direction_NH)
        ctx.targets, ctx.weight_grad_out = targets, weight_grad_out
        ctx.summing_group = tp_group if shared and reduce_hidden_grad else None
        return linear_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        """dH = grad * sum c w, of this shard or summed; dW = sum grad * c h."""
        hidden_NH, weight_VH, direction_NH = ctx.saved_tensors
        hidden_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            hidden_grad = grad_N[:, None] * direction_NH
            if ctx.summing_group is not None:
                dist.all_reduce(hidden_grad, group=ctx.summing_group)  # before it is rounded
            hidden_grad = hidden_grad.to(hidden_NH.dtype)
        if ctx.needs_input_grad[1]:
            out_VH = ctx.weight_grad_out
            if out_VH is None:
                out_VH = weight_grad = zeros(weight_VH)
            with record_function("head"), torch.autocast(hidden_NH.device.type, enabled=False):
                for span in ctx.targets.spans:
                    slope_nU = ctx.targets.block(span) * grad_N[span.positions, None]
                    rows = ctx.targets.rows[span.rows]
                    out_VH[rows] += slope_nU.T @ hidden_NH[span.positions].float()
        if weight_grad is not None:
            weight_grad = weight_grad.to(weight_VH.dtype)
        return hidden_grad, weight_grad, None, None, None, None
