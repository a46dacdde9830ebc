"""MoFO (Chen et al., 2025): AdamW that moves only where the momentum is large.

    m, v as AdamW's
    p <- (1 - lr wd) p - lr [|m| >= k-th largest |m| of its matrix] m_hat / (sqrt(v_hat) + eps)

with k = floor(fraction N) of a matrix of N elements, at least 1. Elements that tie with the k-th
move too. Vectors (norms) are not filtered, and everything decays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_replay.optim.adamw import coefficients_of
from megatron_replay.optim.base import UpdateRule
from megatron_replay.optim.batch import Batch, Scalars
from megatron_replay.optim.momentum_step import Coefficients, Scalar
from megatron_replay.optim.placement import Place
from megatron_replay.selection.kth_largest import kth_largest_magnitudes


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
        fraction: share of each matrix that moves.
        Others: as in UpdateRule.
    """

    own: ClassVar[tuple[str, ...]] = (*UpdateRule.own, "fraction")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        fraction: float = 0.2,
        **settings: Any,
    ) -> None:
        self._require("fraction", 0 < fraction <= 1, "a share above 0, at most 1", fraction)
        self.fraction = fraction
        super().__init__(params, lr, betas, eps, weight_decay, **settings)

    def _kind(self, place: Place) -> object:
        return bool(place.pieces)

    def _move(self, batch: Batch, scalars: Scalars) -> Tensor:
        coefficients = coefficients_of(batch, scalars)
        if not batch.places[0].pieces:
            return batch.take_step(coefficients, bounded=False)
        # Moments and decay now; the moves once every matrix's threshold is known.
        moments = coefficients._replace(move=0.0)
        return batch.take_step(moments, bounded=False, copy=False) * 0.0

    def _complete(self, batches: Sequence[Batch], scalars: Scalars) -> Tensor:
        filtered = [batch for batch in batches if batch.places[0].pieces]
        thresholds = self._thresholds(filtered, scalars.grad_sq.device)
        total = torch.zeros_like(scalars.grad_sq)
        for batch in filtered:
            coefficients = coefficients_of(batch, scalars).pack(batch.params[0])
            c = Coefficients(*coefficients.unbind())
            for param, state, place in zip(batch.params, batch.states, batch.places, strict=True):
                for piece in place.pieces:
                    parts = (param, state["exp_avg"], state["exp_avg_sq"])
                    for p, m, v in zip(*(piece.views(part) for part in parts), strict=True):
                        threshold = thresholds[piece.index]
                        u = filtered_update(m, v, threshold, scale_v=c.scale_v, eps=c.eps)
                        total += u.square().sum() * place.counts
                        p.sub_(u.mul_(scalars.if_proceeding(c.move)))
            batch.write_copies()
        return total

    def _thresholds(self, batches: Sequence[Batch], device: torch.device) -> Tensor:
        """The k-th largest momentum of each matrix, by ``Piece.index``."""
        parts: dict[int, list[Tensor]] = {}
        sizes: dict[int, int] = {}
        for batch in batches:
            for exp_avg, place in zip(batch.state("exp_avg"), batch.places, strict=True):
                for piece in place.pieces:
                    parts.setdefault(piece.index, []).extend(piece.views(exp_avg))
                    sizes[piece.index] = piece.numel
        placement = self._placement
        if placement is not None:
            sizes = dict(enumerate(placement.piece_sizes))
        count = max(sizes, default=-1) + 1
        ranks = [max(1, int(self.fraction * sizes.get(i, 0))) for i in range(count)]
        return kth_largest_magnitudes(
            [parts.get(i, []) for i in range(count)],
            ranks,
            group=placement.tensor_group if placement is not None else None,
            device=device,
        )
