"""Selects hidden states and looks up embeddings without copying whole tensors.

Shapes: T rows of a micro-batch, H hidden channels, N selected rows, V rows of a shard; with
sequence parallelism a rank holds T/TP rows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from torch import Tensor

from megatron_replay.kernels.packed_attention import Documents, RowSegment, row_segments_of


@dataclass(frozen=True, eq=False)
class SelectedRows:
    """The rows of a micro-batch that a head uses, padded to R, a multiple of TP.

    The loader builds it on the host, so nothing is read back from the device.

    Attributes:
        rows_N: int64, ascending.
        rows_R: int64, the same, padded by row 0.
        segments: attention segments of the first N; the padding attends to nothing.
        counts: with sequence parallelism, how many of the R each TP rank's hidden states hold.
        tp_group, sequence_parallel: as in the layout.
    """

    rows_N: Tensor
    rows_R: Tensor
    segments: list[RowSegment]
    counts: list[int] | None
    tp_group: dist.ProcessGroup
    sequence_parallel: bool

    @staticmethod
    def of(
        rows_N: Tensor,
        documents: Documents,
        length: int,
        tp_group: dist.ProcessGroup,
        *,
        sequence_parallel: bool,
    ) -> SelectedRows:
        """Built from rows on the host, of a micro-batch of ``length`` rows."""
        ranks = dist.get_world_size(tp_group)
        padding = -len(rows_N) % ranks if len(rows_N) else ranks
        rows_R = torch.nn.functional.pad(rows_N, (0, padding))
        counts = None
        if sequence_parallel:
            counts = torch.bincount(rows_R // (length // ranks), minlength=ranks).tolist()
        return SelectedRows(
            rows_N=rows_N,
            rows_R=rows_R,
            segments=row_segments_of(documents, rows_N),
            counts=counts,
            tp_group=tp_group,
            sequence_parallel=sequence_parallel,
        )

    def to(self, device: torch.device) -> SelectedRows:
        """The same rows on ``device``."""
        if device.type == "cpu":
            return self
        segments = [
            segment._replace(mask=segment.mask.to(device, non_blocking=True))
            for segment in self.segments
        ]
        return dataclasses.replace(
            self,
            segments=segments,
            rows_N=self.rows_N.to(device, non_blocking=True),
            rows_R=self.rows_R.to(device, non_blocking=True),
        )

    def of_residual(self, hidden_T1H: Tensor) -> Tensor:
        """[M, H]: with sequence parallelism this rank's share of the rows, else all R.

        Communication, with sequence parallelism: an all-gather of [max(counts), H] from each rank,
        and in backward a reduce-scatter of as much.
        """
        if not self.sequence_parallel:
            return hidden_T1H[:, 0][self.rows_R]
        length = len(hidden_T1H)
        rows_RH = _GatherRows.apply(  # type: ignore[no-untyped-call]
            hidden_T1H[:, 0],
            self.rows_R % length,
            self.rows_R // length,
            self.tp_group,
            self.counts,
        )
        share = len(rows_RH) // dist.get_world_size(self.tp_group)
        return rows_RH[dist.get_rank(self.tp_group) * share :][:share]

    def whole(self, hidden_M1H: Tensor) -> Tensor:
        """[N, H] on every TP rank; in backward, gradients are summed over TP.

        Communication: in backward an all-reduce SUM of [N, H]; with sequence parallelism an
        all-gather of [M, H] from each rank, and in backward a reduce-scatter of as much.
        """
        hidden_MH, count = hidden_M1H[:, 0], len(self.rows_N)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden_MH, group=self.tp_group)[:count]
        return copy_to_tensor_model_parallel_region(hidden_MH[:count], group=self.tp_group)


class HiddenStates:
    """The last hidden states, which a head indexes by row, whole on every TP rank.

    Args:
        hidden_T1H: [T, 1, H] of all rows, or with ``sequence_parallel`` [T/TP, 1, H] of this
            rank's; [M, 1, H] of the ``selected`` rows where they are given.
        tp_group: the gradients of rows are summed over it.
        selected: the only rows that were computed; None: all were.
    """

    def __init__(
        self,
        hidden_T1H: Tensor,
        tp_group: dist.ProcessGroup,
        *,
        sequence_parallel: bool,
        selected: SelectedRows | None = None,
    ) -> None:
        self._hidden_T1H, self._tp_group = hidden_T1H, tp_group
        self._sequence_parallel, self._selected = sequence_parallel, selected

    def __getitem__(self, rows_N: Tensor) -> Tensor:
        """Hidden states [N, H] of ``rows_N``: int64, distinct; those of ``selected``, if given.

        Communication: in backward an all-reduce SUM of [N, H]; with sequence parallelism an
        all-gather of [M, H] from each rank, M the largest number on a rank, and in backward a
        reduce-scatter of as much.
        """
        if self._selected is not None:
            assert rows_N is self._selected.rows_N, "only selected rows were computed"
            return self._selected.whole(self._hidden_T1H)
        hidden_TH = self._hidden_T1H[:, 0]
        if self._sequence_parallel:
            length = len(hidden_TH)
            return _GatherRows.apply(  # type: ignore[no-untyped-call]
                hidden_TH, rows_N % length, rows_N // length, self._tp_group, None
            )
        # The rows alone, which are contiguous: megatron-core all-reduces a contiguous copy of the
        # gradient, so the sum for another layout would be lost.
        return copy_to_tensor_model_parallel_region(hidden_TH[rows_N])

    def all(self) -> Tensor:
        """The hidden states of every row, [T, H]."""
        assert self._selected is None, "only selected rows were computed"
        length = len(self._hidden_T1H)
        if self._sequence_parallel:
            length *= dist.get_world_size(self._tp_group)
        return self[torch.arange(length, device=self._hidden_T1H.device)]


class _GatherRows(torch.autograd.Function):
    """Gathers rows from all ranks to all; backward sums their gradients on their own rank.

    ``apply(local_TH, local_N, rank_N, group, counts)``: row n is row ``local_N[n]`` of
    ``rank_N[n]``; ``counts``, rows per rank, are read from the device where they are None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        local_TH: Tensor,
        local_N: Tensor,
        rank_N: Tensor,
        group: dist.ProcessGroup,
        counts: list[int] | None,
    ) -> Tensor:
        if counts is None:
            ranks = torch.arange(dist.get_world_size(group), device=rank_N.device)
            counts = (rank_N == ranks[:, None]).sum(1).tolist()
        # Rows ordered by rank. Keys are fp32, since NPUs sort integers on a scalar processor.
        order = rank_N.float().argsort(stable=True)
        start, most = sum(counts[: dist.get_rank(group)]), max(counts)
        own = order[start : start + counts[dist.get_rank(group)]]
        # Ranks have different numbers of rows, and a collective needs equal ones.
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
            # Added: row 0 may be selected, and is the padding of rows too, with a gradient of zero.
            grad_TH.index_add_(0, own_rows, summed_MH[: len(own_rows)])
        return grad_TH, None, None, None, None


class WordEmbeddings(VocabParallelEmbedding):
    """The input embeddings; rows of their gradient are added to ``main_grad`` where there is one.

    Autograd's gradient would be a dense [V, H], as large as the weight, for a few thousand rows. A
    row's terms are added in the order of the tokens, so results are repeatable bit for bit.
    """

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embeddings [S, B, H] or [B, S, H] of ids [B, S], as in megatron-core."""
        rows = input_ids - self.vocab_start_index
        inside = (rows >= 0) & (rows < self.num_embeddings_per_partition)
        rows = rows.clamp(0, self.num_embeddings_per_partition - 1)
        main_grad = getattr(self.weight, "main_grad", None)
        embedded = _LookUp.apply(self.weight, rows, main_grad)  # type: ignore[no-untyped-call]
        if self.tp_group.size() > 1:  # a product, since boolean assignment is slow on NPUs
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
