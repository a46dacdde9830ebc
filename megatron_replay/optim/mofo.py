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
from torch import Tensor

from megatron_replay.optim.adamw import adamw_of
from megatron_replay.optim.batch import Batch, Scalars
from megatron_replay.optim.kth_largest import kth_largest_magnitudes
from megatron_replay.optim.momentum_step import Coefficients, Scalar
from megatron_replay.optim.rule import UpdateRule


def filtered_update(
    exp_avg: Tensor, exp_avg_sq: Tensor, threshold: Tensor, *, scale_v: Scalar, eps: Scalar
) -> Tensor:
    """[|m| >= threshold] m / (scale_v sqrt(v) + eps), elementwise."""
    update = exp_avg / exp_avg_sq.sqrt().mul_(scale_v).add_(eps)
    return update.mul_(exp_avg.abs() >= threshold)


class MoFO(UpdateRule):
    """AdamW over the ``fraction`` of each matrix with the largest momentum.

    A step adds to UpdateRule's communication the three all-reduces of ``kth_largest_magnitudes``,
    over the processes that share a parameter.

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
        parts = [batch.take_step(adamw_of(batch, scalars)) for batch in vectors]
        # Moments and decay now; the update once every matrix's threshold is known.
        for batch in matrices:
            batch.take_step(adamw_of(batch, scalars)._replace(move=0.0), copy=False)
        thresholds = self._thresholds(matrices, scalars.grad_sq.device)
        for batch in matrices:
            parts += self._filtered(batch, scalars, thresholds)
            batch.write_copies()
        return parts

    def _filtered(self, batch: Batch, scalars: Scalars, thresholds: Tensor) -> list[Tensor]:
        """Update the matrices of a batch; the sums of squares of what counts."""
        parts = []
        for item in batch.items:
            c = Coefficients(*adamw_of(batch, scalars).pack(item.param).unbind())
            for piece in item.place.pieces:
                tensors = (item.param, item.state["exp_avg"], item.state["exp_avg_sq"])
                for p, m, v in zip(*(piece.views(tensor) for tensor in tensors), strict=True):
                    threshold = thresholds[piece.index]
                    u = filtered_update(m, v, threshold, scale_v=c.scale_v, eps=c.eps)
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
