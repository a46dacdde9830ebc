"""Torque-aware momentum (Malviya et al., 2024), in the variant of the paper (Sec. 3.5).

    p moves by max(c, 0) times AdamW's step

with c the cosine between momentum and gradient, and m and v as AdamW's: a misaligned gradient
counts for less, and one that points against the momentum moves nothing but the decay.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_replay.optim.adamw import coefficients_of
from megatron_replay.optim.angle import Angle
from megatron_replay.optim.base import UpdateRule
from megatron_replay.optim.batch import Batch, Scalars
from megatron_replay.optim.momentum_step import Coefficients


def damped(adamw: Coefficients, cos: Tensor) -> Coefficients:
    """The step times max(cos, 0); momentum and decay as they were."""
    return adamw._replace(move=adamw.move * cos.clamp(min=0.0))


class TAM(UpdateRule):
    """AdamW with torque-aware momentum.

    Args:
        angle_scope: one angle for the whole "model", or one for each "tensor".
        Others: as in UpdateRule.
    """

    looks_at_angle: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        angle_scope: str = "model",
        **settings: Any,
    ) -> None:
        self._require(
            "angle_scope", angle_scope in ("model", "tensor"), "model, tensor", angle_scope
        )
        super().__init__(params, lr, betas, eps, weight_decay, **settings)
        self.angle_scope = angle_scope

    def _prepare(self, scalars: Scalars) -> None:
        dot, momentum_sq, grad_sq = scalars.sums.unbind(-1)
        ones = torch.ones_like(dot)
        self.last_angle = Angle(dot, momentum_sq, grad_sq, ones, torch.zeros_like(ones))

    def _move(self, batch: Batch, scalars: Scalars) -> Tensor:
        assert self.last_angle is not None
        cos = batch.rows(self.last_angle.cosine)
        coefficients = damped(coefficients_of(batch, scalars), cos)
        return batch.take_step(coefficients, bounded=False) * cos.clamp(min=0.0) ** 2
