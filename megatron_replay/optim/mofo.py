"""MoFO (Chen et al., arXiv 2407.20999): AdamW that updates only where the momentum is large.

    m, v as AdamW's
    p <- (1 - lr wd) p - lr [|m| >= k-th largest |m| of its matrix] m_hat / (sqrt(v_hat) + eps)

with k = floor(fraction N) of a matrix of N elements, at least 1. Elements that tie with the k-th
are updated too. Vectors (norms) are not filtered, and everything decays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay.optim.adamw import adamw_coefficients
from megatron_replay.optim.batch import Batch, Scalars
from megatron_replay.optim.momentum_step import Coefficients
from megatron_replay.optim.rule import UpdateRule

#: Elements counted at a time: fp32 counts to 2^24. On the host 2^20 stay in the cache.
_CHUNK, _CHUNK_HOST = 1 << 24, 1 << 20
#: Number of bits below the sign, and the integer type of that width.
_PATTERNS = {torch.float32: (31, torch.int32), torch.float64: (63, torch.int64)}


class MoFO(UpdateRule):
    """AdamW over the ``fraction`` of each matrix with the largest momentum.

    A step adds to UpdateRule's communication the 31 all-reduces of ``kth_largest_magnitudes``, over
    the processes that share a parameter.

    Args:
        fraction: share of each matrix that is updated. The other arguments are UpdateRule's.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *args: Any,
        fraction: float = 0.2,
        **settings: Any,
    ) -> None:
        self._require("fraction", 0 < fraction <= 1, "a share above 0, at most 1", fraction)
        self.fraction = fraction
        super().__init__(params, lr, *args, **settings)

    def _update(self, batches: Sequence[Batch], scalars: Scalars) -> list[Tensor]:
        vectors = [batch.only(lambda place: not place.pieces) for batch in batches]
        matrices = [batch.only(lambda place: place.pieces) for batch in batches]
        parts = [batch.take_step(adamw_coefficients(batch, scalars)) for batch in vectors]
        # Moments and decay now; the update once every matrix's threshold is known.
        for batch in matrices:
            batch.take_step(adamw_coefficients(batch, scalars)._replace(move=0.0), copy=False)
        thresholds = self._thresholds(matrices, scalars.grad_sq.device)
        for batch in matrices:
            parts += self._filtered(batch, scalars, thresholds)
            batch.write_copies()
        return parts

    def _filtered(self, batch: Batch, scalars: Scalars, thresholds: Tensor) -> list[Tensor]:
        """Update the matrices of a batch; the sums of squares of what counts."""
        parts = []
        for item in batch.items:
            c = Coefficients(*adamw_coefficients(batch, scalars).pack(item.param).unbind())
            for piece in item.place.pieces:
                tensors = (item.param, item.state["exp_avg"], item.state["exp_avg_sq"])
                for p, m, v in zip(*(piece.views(tensor) for tensor in tensors), strict=True):
                    u = m / v.sqrt().mul_(c.scale_v).add_(c.eps)
                    u.mul_(m.abs() >= thresholds[piece.index])
                    parts.append(u.square().sum() * item.place.counts)
                    p.sub_(u.mul_(scalars.if_proceeding(c.move)))
        return parts

    def _thresholds(self, batches: Sequence[Batch], device: torch.device) -> Tensor:
        """The k-th largest momentum of each matrix, by ``Piece.index``."""
        parts: dict[int, list[Tensor]] = {}
        sizes: dict[int, int] = {}
        for item in (item for batch in batches for item in batch.items):
            for piece in item.place.pieces:
                parts.setdefault(piece.index, []).extend(piece.views(item.state["exp_avg"]))
                sizes[piece.index] = piece.numel
        placement = self._placement
        if placement is not None:
            sizes = dict(enumerate(placement.piece_sizes))
        count = max(sizes, default=-1) + 1
        return kth_largest_magnitudes(
            [parts.get(i, []) for i in range(count)],
            [max(1, int(self.fraction * sizes.get(i, 0))) for i in range(count)],
            group=placement.tensor_group if placement is not None else None,
            device=device,
        )


def kth_largest_magnitudes(
    parts: Sequence[Sequence[Tensor]],
    ranks: Sequence[int],
    *,
    group: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """The exact ``ranks[i]``-th largest |x| (from 1) of tensor i, for all at once: [tensors].

    Magnitudes sort as their bit patterns do, as integers. So the answer is found bit by bit from
    the top: it is the largest pattern that at least ``ranks[i]`` elements reach. This compares and
    sums only; NPUs shift integers, and scatter them into a histogram, on a scalar processor.

    Communication: one all-reduce of [tensors] int32 for each of 31 bits (fp64: 63). Memory: fp32
    and bool of 2^24 elements.

    Args:
        parts: the flat pieces of each tensor that this process holds, in one precision; every
            element is held by one process. A tensor that is elsewhere has no pieces here.
        ranks: at most the number of the whole tensor's elements.
        device: where to reduce, for a process without pieces.
    """
    pieces = [piece for tensor in parts for piece in tensor]
    device = pieces[0].device if pieces else device
    dtype = pieces[0].dtype if pieces else torch.float32
    bits, integers = _PATTERNS[dtype]
    found = torch.zeros(len(parts), dtype=integers, device=device)
    size = _CHUNK_HOST if found.is_cpu else _CHUNK
    chunks = [[c for piece in tensor for c in piece.split(size)] for tensor in parts]
    wanted = torch.tensor(list(ranks), dtype=torch.int32, device=device)
    for bit in reversed(range(bits)):
        higher = found + (1 << bit)
        bounds = higher.view(dtype)
        counts = torch.zeros(len(parts), dtype=torch.int32, device=device)
        for i, tensor in enumerate(chunks):
            for chunk in tensor:
                counts[i] += chunk.abs().ge_(bounds[i]).sum().int()
        if group is not None:
            dist.all_reduce(counts, group=group)
        found = torch.where(counts >= wanted, higher, found)
    return found.view(dtype)
