"""Orthogonalising a matrix by Newton-Schulz, whole, also where processes hold parts of it.

    X <- M / |M|,  then ``steps`` times  X <- a X + (b A + c A^2) X  with A = X X^T

drives every singular value towards 1 (K. Jordan et al., Muon, 2024). The singular values of a block
are not those of the matrix: a matrix cut over processes is brought together first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

#: The quintic's coefficients of Muon: steep at 0, so that five steps do; they land in [0.7, 1.2].
_A, _B, _C = 3.4445, -4.7750, 2.0315


def newton_schulz(matrix_RC: Tensor, *, steps: int = 5) -> Tensor:
    """U V^T, roughly, of M = U S V^T, in the matrix's precision."""
    tall = matrix_RC.shape[0] > matrix_RC.shape[1]
    x = matrix_RC.T if tall else matrix_RC
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
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

    Each matrix is brought together on one rank, in turn, and its result cut again: the work is
    shared, and every rank gets parts of one result. Communication: two all-to-alls for as many
    matrices as there are ranks.

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
