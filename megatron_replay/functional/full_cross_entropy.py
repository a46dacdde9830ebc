"""Full softmax beside the restricted loss: at selected positions only, a chunk of them at a time.

Shapes: N positions, n of a chunk, V rows of this rank's output-layer shard, H hidden channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay.functional.restricted_cross_entropy import restricted_cross_entropy

#: Positions whose logits exist at one time.
_CHUNK_POSITIONS = 1024


def vocab_parallel_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    *,
    vocab_start: int = 0,
    tp_group: dist.ProcessGroup | None = None,
    reduce_hidden_grad: bool = True,
) -> Tensor:
    """L = -z[x] + log sum_j exp z[j] over the whole vocabulary, in fp32.

    Logits of ``_CHUNK_POSITIONS`` positions exist at a time; backward computes them again rather
    than keep [N, V].

    Args:
        hidden_NH: [N, H], whole on every rank of ``tp_group``.
        weight_VH: [V, H], this rank's rows, of ids ``vocab_start`` to ``vocab_start + V``.
        labels_N: int64 [N], ids of the whole vocabulary.
        reduce_hidden_grad: sum the gradient of ``hidden_NH`` over ``tp_group``; False where the
            caller's region does.

    Returns:
        fp32 [N], differentiable in ``hidden_NH`` and ``weight_VH``.

    Communication over ``tp_group``: all-reduce MAX [N], SUM [N, 2]; in backward SUM [N, H].
    """
    return _FullCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_NH, weight_VH, labels_N, vocab_start, tp_group, reduce_hidden_grad
    )


class _FullCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        labels_N: Tensor,
        vocab_start: int,
        tp_group: dist.ProcessGroup | None,
        reduce_hidden_grad: bool,
    ) -> Tensor:
        N = hidden_NH.shape[0]
        max_N = hidden_NH.new_empty(N, dtype=torch.float32)
        sums_N2 = hidden_NH.new_zeros((N, 2), dtype=torch.float32)  # sum of exp; label's logit
        for chunk in _chunks(N):
            logits_nV = hidden_NH[chunk].float() @ weight_VH.float().T
            max_N[chunk] = logits_nV.amax(1)
            sums_N2[chunk, 1] = _owned(logits_nV, labels_N[chunk] - vocab_start)
            sums_N2[chunk, 0] = logits_nV.sub_(max_N[chunk, None]).exp_().sum(1)
        if tp_group is not None:
            local_max_N = max_N.clone()
            dist.all_reduce(max_N, op=dist.ReduceOp.MAX, group=tp_group)
            sums_N2[:, 0] *= torch.exp(local_max_N - max_N)
            dist.all_reduce(sums_N2, group=tp_group)
        lse_N = max_N + sums_N2[:, 0].log()
        ctx.save_for_backward(hidden_NH, weight_VH, labels_N, lse_N)
        ctx.vocab_start, ctx.tp_group, ctx.reduce = vocab_start, tp_group, reduce_hidden_grad
        return lse_N - sums_N2[:, 1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_N,) = grads
        hidden_NH, weight_VH, labels_N, lse_N = ctx.saved_tensors
        hidden_grad = torch.zeros_like(hidden_NH, dtype=torch.float32)
        weight_grad = torch.zeros_like(weight_VH, dtype=torch.float32)
        weight = weight_VH.float()
        for chunk in _chunks(len(labels_N)):
            hidden = hidden_NH[chunk].float()
            slope_nV = (hidden @ weight.T).sub_(lse_N[chunk, None]).exp_()
            local = labels_N[chunk] - ctx.vocab_start
            row = ((local >= 0) & (local < weight.shape[0])).nonzero().squeeze(1)
            slope_nV[row, local[row]] -= 1.0
            slope_nV *= grad_N[chunk, None]
            hidden_grad[chunk] = slope_nV @ weight
            weight_grad.addmm_(slope_nV.T, hidden)
        hidden_grad = hidden_grad.to(hidden_NH.dtype)
        if ctx.tp_group is not None and ctx.reduce:
            dist.all_reduce(hidden_grad, group=ctx.tp_group)
        return hidden_grad, weight_grad.to(weight_VH.dtype), None, None, None, None


@torch.no_grad()
def outside_mass(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    candidate_ids: Tensor,
    candidate_offsets: Tensor,
    labels_N: Tensor,
    *,
    vocab_start: int = 0,
    tp_group: dist.ProcessGroup | None = None,
    group_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Probability outside S, and the full-softmax loss: fp32 [N] each.

    1 - rho = sum_S exp z / sum_V exp z, so with both losses of one label x (z[x] cancels)
    rho = 1 - exp(restricted - full).
    """
    full_N = vocab_parallel_cross_entropy(
        hidden_NH, weight_VH, labels_N, vocab_start=vocab_start, tp_group=tp_group
    )
    restricted_N = restricted_cross_entropy(
        hidden_NH,
        weight_VH,
        candidate_ids,
        candidate_offsets,
        labels_N,
        vocab_start=vocab_start,
        tp_group=tp_group,
        group_offsets=group_offsets,
        validate=False,
    )
    outside_N = -torch.expm1(restricted_N - full_N)
    return outside_N.clamp_(0.0, 1.0), full_N


def _chunks(length: int) -> list[slice]:
    return [slice(i, i + _CHUNK_POSITIONS) for i in range(0, length, _CHUNK_POSITIONS)]


def _owned(logits_nV: Tensor, local_n: Tensor) -> Tensor:
    """The logit of each local id; 0 where another shard owns it."""
    inside = (local_n >= 0) & (local_n < logits_nV.shape[1])
    gathered = logits_nV.gather(1, local_n.clamp(0, logits_nV.shape[1] - 1)[:, None]).squeeze(1)
    return torch.where(inside, gathered, 0.0)
