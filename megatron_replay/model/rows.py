"""Rows in and out of the model without a copy of everything: selected positions, looked-up tokens.

Shapes: S positions of a pack, B packs, H hidden channels, N selected positions, V rows of a shard;
with sequence parallelism a rank holds S/TP positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from torch import Tensor

from megatron_replay.functional.shard_head import VocabShard


class HiddenStates:
    """The last hidden states, of which a head takes the positions it wants, whole on every TP rank.

    Args:
        hidden_SBH: of all positions, or with ``sequence_parallel`` of this rank's [S/TP, B, H].
        tp_group: over which what heads add to a row's gradient is summed.
    """

    def __init__(
        self, hidden_SBH: Tensor, tp_group: dist.ProcessGroup, *, sequence_parallel: bool
    ) -> None:
        self._hidden_SBH, self._tp_group = hidden_SBH, tp_group
        self._sequence_parallel = sequence_parallel

    def __getitem__(self, rows_N: Tensor) -> Tensor:
        """Hidden states [N, H] of the positions ``rows_N``, int64, ``b * S + s``, none twice.

        Communication: in backward an all-reduce SUM of [N, H]; with sequence parallelism an
        all-gather of [M, H] from each rank, M the most of any, and in backward a reduce-scatter
        of as much.
        """
        length, packs = self._hidden_SBH.shape[:2]
        flat_TH = self._hidden_SBH.flatten(0, 1)
        if self._sequence_parallel:
            full_length = length * dist.get_world_size(self._tp_group)
            pack_N, position_N = rows_N // full_length, rows_N % full_length
            local_N = (position_N % length) * packs + pack_N
            return _GatherRows.apply(  # type: ignore[no-untyped-call]
                flat_TH, local_N, position_N // length, self._tp_group
            )
        pack_N, position_N = rows_N // length, rows_N % length
        # Of the rows alone, and contiguous: megatron-core all-reduces a contiguous copy of the
        # gradient, so that of another layout would be lost.
        return copy_to_tensor_model_parallel_region(flat_TH[position_N * packs + pack_N])

    def all(self) -> Tensor:
        """Those of every position, [B * S, H]."""
        length, packs = self._hidden_SBH.shape[:2]
        if self._sequence_parallel:
            length *= dist.get_world_size(self._tp_group)
        return self[torch.arange(packs * length, device=self._hidden_SBH.device)]


class _GatherRows(torch.autograd.Function):
    """Rows that lie on different ranks, to all of them; their gradients summed, back to their rank.

    ``apply(local_TH, local_N, rank_N, group)``: row n is row ``local_N[n]`` of ``rank_N[n]``.
    """

    @staticmethod
    def forward(
        ctx: Any, local_TH: Tensor, local_N: Tensor, rank_N: Tensor, group: dist.ProcessGroup
    ) -> Tensor:
        counts = torch.bincount(rank_N, minlength=dist.get_world_size(group)).tolist()
        # The rows as they come, rank after rank. By fp32 keys: NPUs sort no integers well.
        order = rank_N.float().argsort(stable=True)
        start, most = sum(counts[: dist.get_rank(group)]), max(counts)
        own = order[start : start + counts[dist.get_rank(group)]]
        # Ranks hold different numbers, and a collective wants equal ones.
        places = [(rank * most, rank * most + count) for rank, count in enumerate(counts)]
        places_N = torch.cat([torch.arange(*place, device=order.device) for place in places])
        ctx.group, ctx.most, ctx.local_shape = group, most, local_TH.shape
        ctx.save_for_backward(order, places_N, local_N[own])
        if not len(rank_N):
            return local_TH.new_empty(0, local_TH.shape[1])
        sent_MH = local_TH.new_zeros(most, local_TH.shape[1])
        sent_MH[: len(own)] = local_TH[local_N[own]]
        received = sent_MH.new_empty(len(counts) * most, local_TH.shape[1])
        dist.all_gather_into_tensor(received, sent_MH, group=group)
        rows_NH = received.new_empty(len(rank_N), local_TH.shape[1])
        rows_NH[order] = received[places_N]
        return rows_NH

    @staticmethod
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor | None, ...]:
        order, places_N, own_rows = ctx.saved_tensors
        grad_TH = grad_NH.new_zeros(ctx.local_shape)
        if len(order):
            sent = grad_NH.new_zeros(dist.get_world_size(ctx.group) * ctx.most, grad_NH.shape[1])
            sent[places_N] = grad_NH[order]
            summed_MH = sent.new_empty(ctx.most, grad_NH.shape[1])
            dist.reduce_scatter_tensor(summed_MH, sent, group=ctx.group)
            grad_TH[own_rows] = summed_MH[: len(own_rows)]
        return grad_TH, None, None, None


class WordEmbeddings(VocabParallelEmbedding):
    """The input embeddings; rows of their gradient are added to ``main_grad`` where there is one.

    Autograd's would be a dense [V, H], as large as the weight, for a few thousand rows. A row's
    terms are added in the order of the tokens: bits repeat.

    Attributes:
        vocab_stride: 1, or with every nth id on each TP rank, n.
    """

    vocab_stride = 1

    def forward(self, input_ids: Tensor) -> Tensor:
        """[S, B, H] or [B, S, H] of ids [B, S], as megatron-core's."""
        start = self.vocab_start_index if self.vocab_stride == 1 else self.tp_group.rank()
        shard = VocabShard(start, self.vocab_stride, self.num_embeddings_per_partition)
        rows, inside = shard.rows(input_ids)
        rows = rows.clamp(0, self.num_embeddings_per_partition - 1)
        main_grad = getattr(self.weight, "main_grad", None)
        embedded = _LookUp.apply(self.weight, rows, main_grad)  # type: ignore[no-untyped-call]
        if self.tp_group.size() > 1:  # by a product: boolean assignment is slow on NPUs
            embedded = embedded * inside[..., None]
        if self.reduce_scatter_embeddings:
            embedded = embedded.transpose(0, 1).contiguous()
            return reduce_scatter_to_sequence_parallel_region(embedded, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(embedded, group=self.tp_group)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VH: Tensor, rows: Tensor, grad_out_VH: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.grad_out_VH, ctx.shape = grad_out_VH, weight_VH.shape
        return weight_VH[rows]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        if ctx.grad_out_VH is not None:
            ctx.grad_out_VH.index_put_((rows,), grad.float(), accumulate=True)
            return None, None, None
        grad_VH = grad.new_zeros(ctx.shape)
        return grad_VH.index_put_((rows,), grad, accumulate=True), None, None
