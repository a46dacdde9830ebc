"""The full softmax at selected positions, block by block; and the mass outside the sets.

Shapes: N positions, V rows of this rank's output-layer shard, H hidden channels.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay.errors import ConfigError
from megatron_replay.loss.blocks import UNION, Tile, TiledHead
from megatron_replay.loss.candidate_sets import CandidateSets
from megatron_replay.loss.sharded import (
    ShardedCrossEntropy,
    cross_entropy_of_sets,
    require_shapes,
)

#: Rows of the output layer multiplied at one time.
BLOCK_ROWS = 1 << 14


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
    """L = -z[x] + log sum_j exp z[j] over the whole vocabulary, in fp32.

    Args:
        hidden_NH: [N, H], whole on every rank of ``tp_group``.
        weight_VH: [V, H], this rank's rows: row r is that of id ``vocab_start + r``.
            Shards ascend with the rank.
        labels_N: int64 [N], ids of the whole vocabulary; one outside it gives a loss of +inf.
        reduce_hidden_grad: sum the gradient of ``hidden_NH`` over ``tp_group``; False where the
            caller's region does so.
        weight_grad_out: fp32 [V, H] to which the weight's gradient is added in place of autograd's.
        chunk_rows: positions whose logits exist at one time.

    Returns:
        fp32 [N], differentiable in ``hidden_NH`` and ``weight_VH``.

    Raises:
        ConfigError: ``chunk_rows`` is not positive.
        DataError: the shapes do not fit together.

    Communication over ``tp_group``: all-reduce MAX fp32 [N], SUM fp32 [2, N]; in backward SUM fp32
    [N, H] if ``reduce_hidden_grad``. Memory beyond operands and gradients: logits fp32 [chunk_rows,
    16384], 64 MiB, computed again in backward, and, if the weight is not fp32, 16384 rows of it in
    fp32.
    """
    if chunk_rows < 1:
        raise ConfigError(
            "out of range", where="chunk_rows", expected="1 or more", found=chunk_rows
        )
    require_shapes(hidden_NH, weight_VH, labels_N, weight_grad_out=weight_grad_out)
    tiles = [
        Tile(positions, rows)
        for rows in _slices(weight_VH.shape[0], BLOCK_ROWS)
        for positions in _slices(hidden_NH.shape[0], chunk_rows)
    ]
    row_N = labels_N - vocab_start
    is_here_N = (row_N >= 0) & (row_N < weight_VH.shape[0])
    return ShardedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_NH,
        weight_VH,
        TiledHead(tiles, row_N.where(is_here_N, -1)),
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
        hidden_NH,
        weight_VH,
        sets,
        backend=UNION,
        tail_logit_N=None,
        tp_group=tp_group,
        reduce_hidden_grad=True,
        weight_grad_out=None,
    )
    outside_N = -torch.expm1(restricted_N - full_N)
    return outside_N.clamp_(0.0, 1.0), full_N


def _slices(length: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, length)) for first in range(0, length, step)]
