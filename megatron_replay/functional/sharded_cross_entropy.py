"""Cross-entropy of a vocabulary sharded over ranks: autograd and communication around a form.

L = log(sum over all shards of exp z, + exp(tail)) - z[x] for each of N positions.

Shapes: N positions, V rows of this rank's output-layer shard, H hidden channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from megatron_replay.functional.shard_head import (
    Partials,
    ShardHead,
    Softmax,
    VocabShard,
    rescale,
    zeros,
)


class ShardedCrossEntropy(torch.autograd.Function):
    """``apply(hidden_NH, weight_VH, head, labels_N, shard, tail_logit_N, ...)``: loss, fp32 [N].

    A label in ``labels_N``, ids of the whole vocabulary, that no rank's head finds gives a loss of
    +inf. Shards ascend with the rank. ``tail_logit_N`` is a constant or None. Then ``tp_group``;
    ``reduce_hidden_grad``: sum dH over it; ``weight_grad_out``: fp32 [V, H] to which dW is added,
    autograd getting none, or None for a dense dW through autograd.

    Communication: all-reduce MAX fp32 [N], SUM fp32 [2, N]; in backward SUM fp32 [N, H] if
    ``reduce_hidden_grad``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        head: ShardHead,
        labels_N: Tensor,
        shard: VocabShard,
        tail_logit_N: Tensor | None,
        tp_group: dist.ProcessGroup | None,
        reduce_hidden_grad: bool,
        weight_grad_out: Tensor | None,
    ) -> Tensor:
        """Each rank's partials, put together."""
        with _without_autocast(hidden_NH):
            partials = head.forward(hidden_NH, weight_VH, hidden_grad=ctx.needs_input_grad[0])
        gold_N, softmax = _put_together(partials, labels_N, shard, tail_logit_N, tp_group)
        ctx.save_for_backward(hidden_NH, weight_VH, *softmax)
        ctx.head, ctx.weight_grad_out = head, weight_grad_out
        ctx.summing_group = tp_group if reduce_hidden_grad else None
        return (softmax.top_N - gold_N) + softmax.total_N.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        """dH in the dtype of the hidden states; dW there or to ``weight_grad_out``."""
        hidden_NH, weight_VH, top_N, total_N = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        weight_grad = None
        weight_grad_out = ctx.weight_grad_out if wants_weight else None
        if wants_weight and weight_grad_out is None:
            weight_grad = weight_grad_out = zeros(weight_VH)
        # In a trace, backward is another place than the forward that a caller can name.
        with record_function("head"), _without_autocast(hidden_NH):
            hidden_grad = ctx.head.backward(
                hidden_NH,
                weight_VH,
                Softmax(top_N, total_N),
                grad_N.contiguous(),
                hidden_grad=wants_hidden,
                weight_grad_out=weight_grad_out,
            )
        if hidden_grad is not None:
            if _is_shared(ctx.summing_group, len(hidden_grad)):
                dist.all_reduce(hidden_grad, group=ctx.summing_group)  # before it is rounded
            hidden_grad = hidden_grad.to(hidden_NH.dtype)
        if weight_grad is not None:
            weight_grad = weight_grad.to(weight_VH.dtype)
        return hidden_grad, weight_grad, None, None, None, None, None, None, None


def _put_together(
    partials: Partials,
    labels_N: Tensor,
    shard: VocabShard,
    tail_logit_N: Tensor | None,
    tp_group: dist.ProcessGroup | None,
) -> tuple[Tensor, Softmax]:
    """The label's logit, and the softmax over all ranks' candidates and the tail."""
    max_N, sum_N, gold_N = partials
    shared = _is_shared(tp_group, len(max_N))
    top_N = max_N
    if shared:
        top_N = max_N.clone()
        dist.all_reduce(top_N, op=dist.ReduceOp.MAX, group=tp_group)
    if tail_logit_N is not None:
        top_N = torch.maximum(top_N, tail_logit_N)
    sum_N = sum_N * rescale(max_N, top_N)
    if shared:
        # The one rank that has the label adds its logit, the others 0: exact.
        gold_N = torch.where(_is_others(labels_N, shard, tp_group), 0.0, gold_N)
        packed_2N = torch.stack([sum_N, gold_N])
        dist.all_reduce(packed_2N, group=tp_group)
        sum_N, gold_N = packed_2N
    if tail_logit_N is not None:  # of no shard: added once, after the sum over shards
        sum_N = sum_N + rescale(tail_logit_N, top_N)
    return gold_N, Softmax(top_N, sum_N)


def _is_others(labels_N: Tensor, shard: VocabShard, tp_group: dist.ProcessGroup | None) -> Tensor:
    """bool [N]: another rank has the label's row. The first and the last rank answer for labels
    that none has.
    """
    rank, size = dist.get_rank(tp_group), dist.get_world_size(tp_group)
    below, above = labels_N < shard.start, labels_N >= shard.start + shard.num_rows
    return (below & (rank > 0)) | (above & (rank < size - 1))


def _is_shared(tp_group: dist.ProcessGroup | None, num_positions: int) -> bool:
    """Whether there is anything to exchange, and anyone to exchange it with."""
    return tp_group is not None and num_positions > 0 and dist.get_world_size(tp_group) > 1


def _without_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)
