"""What AdaMuon and MuonClip share: matrices inside layers are orthogonalised, the rest is AdamW's.

    X <- M / |M|,  then five times  X <- a X + (b A + c A^2) X  with A = X X^T

(Newton-Schulz) drives every singular value of M towards 1 (K. Jordan et al., Muon, 2024).
Embeddings, the output layer and vectors take AdamW's step. A matrix is one of the model, never a
process's block of it, whose singular values are others, nor megatron-core's fusions: q, k, v, gate
and up are matrices of their own. A matrix cut over processes is gathered first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay.optim.adamw import adamw_coefficients
from megatron_replay.optim.batch import Batch, Item, Piece, Place, Scalars
from megatron_replay.optim.rule import UpdateRule

#: The quintic's coefficients of Muon: steep at 0, so that five steps do; they end in [0.7, 1.2].
_A, _B, _C = 3.4445, -4.7750, 2.0315


def newton_schulz(matrix_RC: Tensor) -> Tensor:
    """U V^T, roughly, of M = U S V^T, in the matrix's precision."""
    tall = matrix_RC.shape[0] > matrix_RC.shape[1]
    x = matrix_RC.T if tall else matrix_RC
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.T if tall else x


def on_whole_matrices(
    transform: Callable[[Tensor], Tensor],
    shards: Sequence[Tensor],
    split_dims: Sequence[int | None],
    *,
    group: dist.ProcessGroup | None,
) -> list[Tensor]:
    """This rank's shards of ``transform(M)`` for matrices M cut evenly over ``group``.

    Each matrix is gathered on one rank, in turn, and its result is cut again: the ranks share the
    work and hold parts of one result. Communication: two all-to-alls for as many matrices as there
    are ranks.

    Args:
        shards: this rank's part of each matrix, in one order on all ranks.
        split_dims: the dimension each is cut along; None: every rank holds it whole.
    """
    size = 1 if group is None else dist.get_world_size(group)
    results: list[Tensor] = []
    for first in range(0, len(shards), size):
        chunk, dims = shards[first : first + size], split_dims[first : first + size]
        if size == 1 or any(dim is None for dim in dims):
            results += [transform(shard) for shard in chunk]
        else:
            results += _in_turn(transform, chunk, [dim or 0 for dim in dims], group)
    return results


def _in_turn(
    transform: Callable[[Tensor], Tensor],
    shards: Sequence[Tensor],
    dims: Sequence[int],
    group: dist.ProcessGroup | None,
) -> list[Tensor]:
    """At most one matrix a rank: rank i gathers and transforms number i."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    sizes = [shard.numel() for shard in shards] + [0] * (size - len(shards))
    mine = sizes[rank]
    received = shards[0].new_empty(size * mine)
    sent = torch.cat([shard.reshape(-1) for shard in shards])
    dist.all_to_all_single(received, sent, [mine] * size, sizes, group=group)
    parts = received
    if mine:
        blocks = received.view(size, *shards[rank].shape).unbind()
        whole = transform(torch.cat(blocks, dims[rank]))
        parts = torch.cat([part.reshape(-1) for part in whole.chunk(size, dims[rank])])
    returned = torch.empty_like(sent)
    dist.all_to_all_single(returned, parts, sizes, [mine] * size, group=group)
    return [
        flat.view(shard.shape)
        for flat, shard in zip(returned.split(sizes[: len(shards)]), shards, strict=True)
    ]


class Matrix(NamedTuple):
    """One matrix of the model, as far as this process holds it."""

    batch: Batch
    item: Item
    piece: Piece


class MatrixRule(UpdateRule):
    """Base of the rules that orthogonalise. A subclass implements ``_matrix_updates``.

    A step adds two all-to-alls for as many matrices as there are tensor parallel ranks
    (``on_whole_matrices``). Every data parallel replica does the same work.

    ``betas`` are AdamW's, for the rest. A group with ``orthogonalize=False`` keeps its matrices
    from being orthogonalised: embeddings and output layers belong there.
    """

    #: Decay of the momentum of matrices.
    momentum = 0.95

    def _update(self, batches: Sequence[Batch], scalars: Scalars) -> list[Tensor]:
        others = [batch.only(lambda place: not place.orthogonal) for batch in batches]
        batches = [batch.only(lambda place: place.orthogonal) for batch in batches]
        parts = [batch.take_step(adamw_coefficients(batch, scalars)) for batch in others]
        for item in (item for batch in batches for item in batch.items):
            clipped = scalars.if_proceeding(item.grad) * self._clip(item.place, scalars)
            weight = scalars.if_proceeding(1 - self.momentum).to(item.grad)
            item.state["exp_avg"].lerp_(clipped, weight)
        matrices = [
            Matrix(batch, item, piece)
            for batch in batches
            for item in batch.items
            for piece in item.place.pieces
        ]
        updates = self._matrix_updates(matrices, scalars)
        for (batch, item, piece), update in zip(matrices, updates, strict=True):
            lr, decay = batch.group["lr"], batch.group["weight_decay"]
            kept = piece.gather(item.param) * (1 - scalars.if_proceeding(lr * decay))
            piece.scatter(kept - update * scalars.if_proceeding(lr), item.param)
            parts.append(update.square().sum() * item.place.counts)
        for batch in batches:
            batch.write_copies()
        return parts

    def _clip(self, place: Place, scalars: Scalars) -> Tensor:
        """The factor of the gradient."""
        return scalars.if_proceeding(scalars.clip)

    def _matrix_updates(self, matrices: Sequence[Matrix], scalars: Scalars) -> list[Tensor]:
        """What is subtracted from each matrix at a learning rate of 1."""
        raise NotImplementedError

    def _orthogonalized(
        self,
        matrices: Sequence[Matrix],
        prepare: Callable[[Tensor], Tensor] = lambda momentum: momentum,
    ) -> list[Tensor]:
        """This rank's part of U V^T of ``prepare(m)`` for each whole matrix."""
        return on_whole_matrices(
            newton_schulz,
            [prepare(piece.gather(item.state["exp_avg"])) for _, item, piece in matrices],
            [piece.split_dim for _, _, piece in matrices],
            group=self._placement.tp_group if self._placement is not None else None,
        )
