"""Cross-entropy of a vocabulary sharded over tensor-parallel ranks: autograd and communication.

The restricted loss, the full softmax block by block, and the mass outside the sets. Each rank's
backend reduces its candidates to partial sums; two small all-reduces over TP combine them into the
softmax. The equation is in ``definition``.

Shapes: N positions, V rows of this rank's shard of the output layer, H hidden channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from megatron_replay.errors import ConfigError, DataError
from megatron_replay.loss.backends import (
    HeadBackend,
    Partials,
    ShardHead,
    Softmax,
    rescale,
    zeros,
)
from megatron_replay.loss.blocks import UNION, TiledHead, slices, vocabulary_tile
from megatron_replay.loss.candidate_sets import CandidateSets

#: Rows of the output layer multiplied at one time.
BLOCK_ROWS = 1 << 14


def cross_entropy_of_sets(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    sets: CandidateSets,
    *,
    backend: HeadBackend,
    tail_logit_N: Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    reduce_hidden_grad: bool = True,
    weight_grad_out: Tensor | None = None,
) -> Tensor:
    """Loss of each position over its candidate set, without ever forming [N, V]: fp32 [N].

    The arguments are those of ``functional.restricted_cross_entropy``, which checks them, but for
    ``sets``, which are cut to this rank's rows and on the device of the operands.

    Communication over ``tp_group``: all-reduce MAX fp32 [N], SUM fp32 [2, N]; in backward SUM fp32
    [N, H] if ``reduce_hidden_grad``. Memory: that of the backend.
    """
    assert len(weight_VH) == sets.num_rows
    return ShardedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_NH,
        weight_VH,
        backend.bind(sets),
        sets.labels_N.long(),
        sets.vocab_start,
        None if tail_logit_N is None else tail_logit_N.detach().float(),
        tp_group,
        reduce_hidden_grad,
        weight_grad_out,
    )


def vocab_parallel_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    *,
    vocab_start: int = 0,
    tp_group: dist.ProcessGroup | None = None,
    weight_grad_out: Tensor | None = None,
    reduce_hidden_grad: bool = True,
    chunk_rows: int = 1024,
) -> Tensor:
    """L = -z[x] + log sum_j exp z[j] over the whole vocabulary, with logits and softmax in fp32.

    ``blocks`` says which products are of bf16.

    Args:
        hidden_NH: [N, H], whole on every rank of ``tp_group``.
        weight_VH: [V, H], this rank's rows: row r is that of id ``vocab_start + r``.
            Shards ascend with the rank.
        labels_N: int64 [N], ids of the whole vocabulary; one outside it gives a loss of +inf.
        weight_grad_out, reduce_hidden_grad: as in ``functional.restricted_cross_entropy``.
        chunk_rows: positions whose logits exist at one time.

    Returns:
        fp32 [N], differentiable in ``hidden_NH`` and ``weight_VH``.

    Raises:
        ConfigError: ``chunk_rows`` is not positive.
        DataError: the shapes do not fit.

    Communication over ``tp_group``: all-reduce MAX fp32 [N], SUM fp32 [2, N]; in backward SUM fp32
    [N, H] if ``reduce_hidden_grad``. Memory beyond operands and gradients: logits fp32 [chunk_rows,
    16384], 64 MiB, computed again in backward. With bf16 operands, either the slopes in bf16 as
    well, or, where products are of fp32, 16384 rows of the weight in fp32.
    """
    if chunk_rows < 1:
        raise ConfigError(
            "out of range", where="chunk_rows", expected="1 or more", found=chunk_rows
        )
    require_shapes(hidden_NH, weight_VH, labels_N, weight_grad_out=weight_grad_out)
    tiles = [
        vocabulary_tile(positions, rows, labels_N - vocab_start)
        for rows in slices(0, weight_VH.shape[0], BLOCK_ROWS)
        for positions in slices(0, hidden_NH.shape[0], chunk_rows)
    ]
    return ShardedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_NH,
        weight_VH,
        TiledHead(tiles),
        labels_N.long(),
        vocab_start,
        None,
        tp_group,
        reduce_hidden_grad,
        weight_grad_out,
    )


@torch.no_grad()
def outside_mass(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    sets: CandidateSets,
    *,
    tp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Probability outside S under the current weights, and the full-softmax loss: fp32 [N] each.

    1 - rho = sum_S exp z / sum_V exp z, so with both losses of one label x (z[x] cancels)
    rho = 1 - exp(restricted - full). The difference carries the rounding of the two losses: rho is
    good to about 1e-6, and a smaller one may read 0.

    Args:
        sets: those of this rank's rows, on the device of the operands.

    Communication: that of ``cross_entropy_of_sets`` and of ``vocab_parallel_cross_entropy``.
    """
    full_N = vocab_parallel_cross_entropy(
        hidden_NH, weight_VH, sets.labels_N, vocab_start=sets.vocab_start, tp_group=tp_group
    )
    restricted_N = cross_entropy_of_sets(
        hidden_NH, weight_VH, sets, backend=UNION, tp_group=tp_group
    )
    outside_N = -torch.expm1(restricted_N - full_N)
    return outside_N.clamp_(0.0, 1.0), full_N


class ShardedCrossEntropy(torch.autograd.Function):
    """The loss, fp32 [N]: call ``apply`` with the arguments of ``forward``.

    Args:
        head: this rank's backend, bound to the batch.
        labels_N: int64, ids of the whole vocabulary. One that no rank's head finds gives +inf.
        tail_logit_N: a constant, or None.

    The others, and the communication, are those of ``cross_entropy_of_sets``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        head: ShardHead,
        labels_N: Tensor,
        vocab_start: int,
        tail_logit_N: Tensor | None,
        tp_group: dist.ProcessGroup | None,
        reduce_hidden_grad: bool,
        weight_grad_out: Tensor | None,
    ) -> Tensor:
        """L = log(sum over all shards of exp z + exp tail) - z[label]."""
        with without_autocast(hidden_NH):
            partials = head.forward(hidden_NH, weight_VH)
        # The first or last rank counts a label that no shard has as its own, and does not find it.
        is_elsewhere = torch.zeros_like(labels_N, dtype=torch.bool)
        if tp_group is not None:
            rank, size = dist.get_rank(tp_group), dist.get_world_size(tp_group)
            if rank > 0:
                is_elsewhere |= labels_N < vocab_start
            if rank < size - 1:
                is_elsewhere |= labels_N >= vocab_start + len(weight_VH)
        label_logit_N, softmax = _over_ranks(partials, is_elsewhere, tail_logit_N, tp_group)
        ctx.save_for_backward(hidden_NH, weight_VH, *softmax)
        ctx.head, ctx.weight_grad_out = head, weight_grad_out
        ctx.summing_group = tp_group if reduce_hidden_grad else None
        return (softmax.top_N - label_logit_N) + softmax.total_N.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        """dH in the dtype of the hidden states; dW likewise, or added to ``weight_grad_out``."""
        hidden_NH, weight_VH, top_N, total_N = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        weight_grad = None
        weight_grad_out = ctx.weight_grad_out if wants_weight else None
        if wants_weight and weight_grad_out is None:
            weight_grad = weight_grad_out = zeros(weight_VH)
        # A caller can name the region of forward in a trace, but not that of backward.
        with record_function("head"), without_autocast(hidden_NH):
            hidden_grad = ctx.head.backward(
                hidden_NH,
                weight_VH,
                Softmax(top_N, total_N),
                grad_N.contiguous(),
                hidden_grad=wants_hidden,
                weight_grad_out=weight_grad_out,
            )
        if hidden_grad is not None:
            if is_shared(ctx.summing_group, len(hidden_grad)):
                dist.all_reduce(hidden_grad, group=ctx.summing_group)  # before it is rounded
            hidden_grad = hidden_grad.to(hidden_NH.dtype)
        if weight_grad is not None:
            weight_grad = weight_grad.to(weight_VH.dtype)
        return hidden_grad, weight_grad, None, None, None, None, None, None, None


def _over_ranks(
    partials: Partials,
    is_elsewhere_N: Tensor,
    tail_logit_N: Tensor | None,
    tp_group: dist.ProcessGroup | None,
) -> tuple[Tensor, Softmax]:
    """The label's logit, and the softmax over all ranks' candidates and the tail."""
    max_N, sum_N, label_logit_N = partials
    shared = is_shared(tp_group, len(max_N))
    top_N = max_N
    if shared:
        top_N = max_N.clone()
        dist.all_reduce(top_N, op=dist.ReduceOp.MAX, group=tp_group)
    if tail_logit_N is not None:
        top_N = torch.maximum(top_N, tail_logit_N)
    sum_N = sum_N * rescale(max_N, top_N)
    if shared:
        # The one rank that has the label adds its logit, the others 0: exact.
        label_logit_N = torch.where(is_elsewhere_N, 0.0, label_logit_N)
        packed_2N = torch.stack([sum_N, label_logit_N])
        dist.all_reduce(packed_2N, group=tp_group)
        sum_N, label_logit_N = packed_2N
    if tail_logit_N is not None:  # belongs to no shard: added once, after the sum over shards
        sum_N = sum_N + rescale(tail_logit_N, top_N)
    return label_logit_N, Softmax(top_N, sum_N)


def is_shared(tp_group: dist.ProcessGroup | None, num_positions: int) -> bool:
    """Whether ``tp_group`` has another rank, and there are positions to exchange."""
    return tp_group is not None and num_positions > 0 and dist.get_world_size(tp_group) > 1


def without_autocast(tensor: Tensor) -> torch.autocast:
    """The head chooses the dtype of its products, whatever the caller's autocast."""
    return torch.autocast(tensor.device.type, enabled=False)


def require_shapes(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    tail_logit_T: Tensor | None = None,
    weight_grad_out: Tensor | None = None,
) -> None:
    """Raise DataError unless hidden [T, H], weight [V, H], labels [T] and the rest fit."""
    T = hidden_TH.shape[:1]
    fits = hidden_TH.dim() == weight_VH.dim() == 2 and hidden_TH.shape[1] == weight_VH.shape[1]
    fits &= tail_logit_T is None or tail_logit_T.shape == T
    fits &= weight_grad_out is None or weight_grad_out.shape == weight_VH.shape
    if not (fits and labels_T.shape == T):
        operands = (hidden_TH, weight_VH, labels_T, tail_logit_T, weight_grad_out)
        raise DataError(
            "shapes do not fit",
            where="cross-entropy",
            expected="hidden [T, H], weight [V, H], labels [T], tail logit [T], gradient [V, H]",
            found=", ".join(str(list(tensor.shape)) for tensor in operands if tensor is not None),
        )
    if weight_grad_out is not None and weight_grad_out.dtype is not torch.float32:
        raise DataError(
            "the weight's gradient is summed in fp32",
            where="weight_grad_out",
            found=weight_grad_out.dtype,
        )
