"""The divergence from a stored distribution, added to a cross-entropy (``--kl-weight``).

With q a distribution over a position's own set S, and p~ = exp(z) / Z the softmax of a loss
L = log Z - z[x] over S or more,

    L + beta KL(q || p~) = (1 + beta) L + beta sum_{j in S} (c[j] z[j] + q[j] log q[j]),
    c[j] = [j = x] - q[j].

L comes from any backend. The added term is linear in z: <h, sum_j c[j] w[j]> at each position, a
sum over shards, computed in dense products over unions of neighbours' sets.

Shapes: N positions, V rows of this rank's shard of the output layer, H hidden channels, P pairs of
a position and a candidate of this shard; a block has n positions and U distinct candidates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from megatron_replay.loss.backends import zeros
from megatron_replay.loss.blocks import Blocks, Span
from megatron_replay.loss.candidate_sets import CandidateSets
from megatron_replay.loss.sharded import is_shared, without_autocast


@dataclass(frozen=True, eq=False)
class SoftTargets:
    """The base model's distributions q, cut to one shard.

    Attributes:
        blocks: dense blocks of the sets.
        coefficients: fp32 [P], c.
        negentropy_N: fp32, sum of q log q over the whole of each set.
    """

    blocks: Blocks
    coefficients: Tensor
    negentropy_N: Tensor

    @staticmethod
    def of(sets: CandidateSets, vocab_start: int, num_rows: int) -> SoftTargets:
        """q = softmax of ``sets.values``, stored logits over each position's own set; on the host.

        Args:
            sets: of the whole vocabulary, each with its label.
            vocab_start, num_rows: the shard.
        """
        assert sets.values is not None
        starts, sizes = sets.host.offsets[:-1], np.diff(sets.host.offsets)
        z = sets.values.numpy().astype(np.float64)
        z -= np.repeat(np.maximum.reduceat(z, starts), sizes)
        z -= np.repeat(np.log(np.add.reduceat(np.exp(z), starts)), sizes)
        q = np.exp(z)
        coefficients = (sets.host.ids == np.repeat(sets.labels_N.numpy(), sizes)) - q
        negentropy_N = np.add.reduceat(q * z, starts).astype(np.float32)
        with_c = dataclasses.replace(sets, values=torch.from_numpy(coefficients.astype(np.float32)))
        cut = with_c.shard(vocab_start, num_rows)
        assert cut.values is not None
        return SoftTargets(Blocks.of(cut), cut.values, torch.from_numpy(negentropy_N))

    def moved(self, move: Callable[[Tensor], Tensor]) -> SoftTargets:
        """The same targets, with ``move`` applied to each tensor."""
        coefficients, negentropy_N = move(self.coefficients), move(self.negentropy_N)
        return SoftTargets(self.blocks.moved(move), coefficients, negentropy_N)

    def block(self, span: Span) -> Tensor:
        """fp32 [n, U], the coefficients of a span."""
        num_rows = span.rows.stop - span.rows.start
        num_positions = span.positions.stop - span.positions.start
        block = self.coefficients.new_zeros(num_positions * num_rows)
        block[self.blocks.places[span.pairs]] = self.coefficients[span.pairs]
        return block.view(-1, num_rows)


class Divergence(NamedTuple):
    """A term of a loss: ``weight`` times KL(q || p~), with q of ``targets``."""

    targets: SoftTargets
    weight: float


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
    """L + beta KL(q || p~): fp32 [N], from L and the operands it was computed from.

    Args:
        cross_entropy_N: L, whose softmax must span the targets' sets.
        targets: those of this rank's rows of the weight.
        kl_weight: beta.
        reduce_hidden_grad, weight_grad_out: as in ``restricted_cross_entropy``.

    Communication over ``tp_group``: all-reduce SUM fp32 [N]; in backward SUM fp32 [N, H] if
    ``reduce_hidden_grad``. Memory: fp32 [N, H] between forward and backward; fp32 [U, H] and [n, U]
    temporarily.
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
        """Computes sum_j c[j] w[j] for each position, which backward needs as well."""
        shared = is_shared(tp_group, len(hidden_NH))
        direction_NH = zeros(hidden_NH)
        with without_autocast(hidden_NH):
            for span in targets.blocks.spans:
                weight_UH = weight_VH[targets.blocks.rows[span.rows]].float()
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
            with record_function("head"), without_autocast(hidden_NH):
                for span in ctx.targets.blocks.spans:
                    slope_nU = ctx.targets.block(span) * grad_N[span.positions, None]
                    rows = ctx.targets.blocks.rows[span.rows]
                    out_VH[rows] += slope_nU.T @ hidden_NH[span.positions].float()
        if weight_grad is not None:
            weight_grad = weight_grad.to(weight_VH.dtype)
        return hidden_grad, weight_grad, None, None, None, None
