"""Cross-entropy of a vocabulary sharded over tensor-parallel ranks: autograd and communication.

Each rank's backend reduces its candidates to partial sums; two small all-reduces over TP combine
them into the softmax. The equation is in ``definition``.

Shapes: T or N positions, V rows of this rank's shard of the output layer, H hidden channels, G
candidate sets.
"""

from __future__ import annotations

import math
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
from megatron_replay.loss.blocks import UNION
from megatron_replay.loss.candidate_sets import CandidateSets, require_sets


def restricted_cross_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    candidate_ids: Tensor,
    candidate_offsets: Tensor,
    labels_T: Tensor,
    *,
    vocab_start: int = 0,
    tp_group: dist.ProcessGroup | None = None,
    backend: HeadBackend = UNION,
    group_offsets: Tensor | None = None,
    tail_logit_T: Tensor | None = None,
    weight_grad_out: Tensor | None = None,
    reduce_hidden_grad: bool = True,
    validate: bool = True,
) -> Tensor:
    """Loss of each position over its candidate set, without ever forming [T, V].

    The gradient in the logits is p~ - y inside S and exactly 0 outside. Computed in fp32 whatever
    the operands' dtype; bitwise the same on every run.

    Args:
        hidden_TH: [T, H], whole on every rank of ``tp_group``.
        weight_VH: [V, H], this rank's rows: row r is that of id ``vocab_start + r``. Shards ascend
            with the rank.
        candidate_ids: int32 [nnz], ids of the whole vocabulary, ascending in each set.
        candidate_offsets: int64 [G + 1] into ``candidate_ids``.
        labels_T: int64 [T], each in its position's set.
        backend: computes a rank's part; ``kernels.HEAD.choose("auto", weight_VH)`` returns a
            compiled one.
        group_offsets: None: position t has set t (G = T). Otherwise int64 [G + 1]: positions
            ``group_offsets[g]`` to ``group_offsets[g + 1]`` share set g.
        tail_logit_T: logit of one more term of the denominator, a constant; -inf for none.
        weight_grad_out: fp32 [V, H] (Megatron's ``main_grad``), to which the candidates' rows of
            the weight's gradient are added in backward; autograd then has none, and nothing of
            the size of the weight is made. None: a dense gradient, through autograd.
        reduce_hidden_grad: sum the gradient of ``hidden_TH`` over ``tp_group``; False where the
            caller's region does so (Megatron's copy_to or gather_from).
        validate: check sets and labels, at the cost of a pass over the ids. If False, the caller
            guarantees them; a label that is not a candidate gives a loss of +inf.

    Returns:
        fp32 [T], nats, differentiable in ``hidden_TH`` and ``weight_VH``.

    Raises:
        DataError: shapes or dtypes do not fit, or sets or labels are invalid.
        ConfigError: ``backend`` is not a HeadBackend.

    Communication over ``tp_group``: all-reduce MAX fp32 [T], SUM fp32 [2, T]; in backward SUM fp32
    [T, H] if ``reduce_hidden_grad``; MAX of one number if ``validate``. Sets and labels on a device
    are copied to the host, where they are cut. Memory: that of the backend.
    """
    require_shapes(hidden_TH, weight_VH, labels_T, tail_logit_T, weight_grad_out)
    _require_types(candidate_ids, candidate_offsets, labels_T, backend)
    ids, offsets, labels = (
        tensor.cpu().numpy() for tensor in (candidate_ids, candidate_offsets, labels_T)
    )
    groups = None if group_offsets is None else group_offsets.cpu().numpy()
    device, num_rows = weight_VH.device, weight_VH.shape[0]
    if validate:
        vocab_size = _vocab_size(vocab_start + num_rows, device, tp_group)
        require_sets(ids, offsets, labels, groups, vocab_size)
        _require_tail(tail_logit_T)
    vocab_size = vocab_start + num_rows
    sets = CandidateSets.of(ids, offsets, labels, groups, vocab_size=vocab_size)
    sets = sets.shard(vocab_start, num_rows)
    if backend.reads_transpose:
        sets = sets.with_transpose()
    return cross_entropy_of_sets(
        hidden_TH,
        weight_VH,
        sets.moved(lambda tensor: tensor.to(device)),
        backend=backend,
        tail_logit_N=tail_logit_T,
        tp_group=tp_group,
        reduce_hidden_grad=reduce_hidden_grad,
        weight_grad_out=weight_grad_out,
    )


def cross_entropy_of_sets(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    sets: CandidateSets,
    *,
    backend: HeadBackend,
    tail_logit_N: Tensor | None,
    tp_group: dist.ProcessGroup | None,
    reduce_hidden_grad: bool,
    weight_grad_out: Tensor | None,
) -> Tensor:
    """``restricted_cross_entropy`` over sets already cut to this rank's rows, without checks."""
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


class ShardedCrossEntropy(torch.autograd.Function):
    """The loss, fp32 [N]: call ``apply`` with the arguments of ``forward``.

    Args:
        head: this rank's backend, bound to the batch.
        labels_N: int64, ids of the whole vocabulary. One that no rank's head finds gives +inf.
        vocab_start: id of the weight's first row. Shards ascend with the rank.
        tail_logit_N: a constant, or None.
        reduce_hidden_grad: sum dH over ``tp_group``.
        weight_grad_out: fp32 [V, H] to which dW is added instead of autograd's; None: a dense dW
            through autograd.

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
        vocab_start: int,
        tail_logit_N: Tensor | None,
        tp_group: dist.ProcessGroup | None,
        reduce_hidden_grad: bool,
        weight_grad_out: Tensor | None,
    ) -> Tensor:
        """L = log(sum over all shards of exp z + exp tail) - z[label]."""
        with _without_autocast(hidden_NH):
            partials = head.forward(hidden_NH, weight_VH, hidden_grad=ctx.needs_input_grad[0])
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


def _without_autocast(tensor: Tensor) -> torch.autocast:
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


def _require_types(
    candidate_ids: Tensor, candidate_offsets: Tensor, labels_T: Tensor, backend: HeadBackend
) -> None:
    for name, tensor, dtype in (
        ("candidate_ids", candidate_ids, torch.int32),
        ("candidate_offsets", candidate_offsets, torch.int64),
        ("labels_T", labels_T, torch.int64),
    ):
        if tensor.dtype is not dtype:
            raise DataError("unexpected dtype", where=name, expected=dtype, found=tensor.dtype)
    if not isinstance(backend, HeadBackend):
        raise ConfigError(
            "not a backend of the restricted head",
            where="backend",
            expected="what kernels.HEAD.choose returns",
            found=repr(backend),
        )


def _require_tail(tail_logit_T: Tensor | None) -> None:
    if tail_logit_T is not None and not (tail_logit_T < math.inf).all():  # NaN compares false
        raise DataError("a tail logit is NaN or +infinity", where="tail_logit_T")


def _vocab_size(stop: int, device: torch.device, tp_group: dist.ProcessGroup | None) -> int:
    """One past the last id of all shards, given ``stop`` of this one."""
    last = torch.tensor(stop, device=device)
    if tp_group is not None:
        dist.all_reduce(last, op=dist.ReduceOp.MAX, group=tp_group)
    return int(last)
