"""Torque-aware momentum (Malviya et al., 2024): misaligned gradients count for less.

With c the cosine between momentum and gradient, and AdamW's m, v and step otherwise:

    cosine     p moves by max(c, 0) times AdamW's step: the variant of the paper, Sec. 3.5
    smoothed   s <- 0.9 s + 0.1 c;  m <- beta1 m + (1 - beta1) (1e-8 + (1 + s) / 2) g

The original has no (1 - beta1) and no bias correction in m; with AdamW's, learning rates compare
with AdamW's, and its checkpoints go on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_replay.functional.momentum_step import Coefficients, Scalar
from megatron_replay.optim.adamw import coefficients_of
from megatron_replay.optim.angle import Angle, cosine
from megatron_replay.optim.base import UpdateRule
from megatron_replay.optim.batch import Batch, Scalars

TORQUES = ("cosine", "smoothed")
#: Decay of s, and what keeps the momentum moving at s = -1: the original's.
_SMOOTHING, _LEAST = 0.9, 1e-8


def damped(adamw: Coefficients, cos: Tensor) -> Coefficients:
    """The step times max(cos, 0); momentum and decay as they were."""
    return adamw._replace(move=adamw.move * cos.clamp(min=0.0))


def torqued(adamw: Coefficients, smoothed: Scalar) -> Coefficients:
    """The gradient enters the momentum times 1e-8 + (1 + s) / 2."""
    return adamw._replace(take_g=adamw.take_g * (_LEAST + (1 + smoothed) / 2))


class TAM(UpdateRule):
    """AdamW with torque-aware momentum.

    Args:
        torque: "cosine" or "smoothed", see above.
        angle_scope: one angle for the whole "model", or one for each "tensor".
        Others: as in UpdateRule.
    """

    looks_at_angle: ClassVar[bool] = True
    own: ClassVar[tuple[str, ...]] = (*UpdateRule.own, "torque", "_smoothed")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        torque: str = "cosine",
        angle_scope: str = "model",
        **settings: Any,
    ) -> None:
        self._require("torque", torque in TORQUES, ", ".join(TORQUES), torque)
        self._require(
            "angle_scope", angle_scope in ("model", "tensor"), "model, tensor", angle_scope
        )
        if angle_scope == "tensor":  # s is one number, kept with the groups
            self._require("torque with angle_scope='tensor'", torque == "cosine", "cosine", torque)
        self.torque, self._smoothed = torque, torch.zeros(())
        super().__init__(params, lr, betas, eps, weight_decay, **settings)
        self.angle_scope = angle_scope

    def _prepare(self, scalars: Scalars) -> None:
        dot, momentum_sq, grad_sq = scalars.sums.unbind(-1)
        ones = torch.ones_like(dot)
        self.last_angle = Angle(dot, momentum_sq, grad_sq, ones, torch.zeros_like(ones))
        if self.torque == "smoothed":
            stored = self.param_groups[0].get("torque_average", 0.0)
            cos = cosine(dot, momentum_sq, grad_sq, undefined=0.0)
            self._smoothed = _SMOOTHING * stored + (1 - _SMOOTHING) * cos

    def _move(self, batch: Batch, scalars: Scalars) -> Tensor:
        adamw = coefficients_of(batch, scalars)
        if self.torque == "smoothed":
            return batch.take_step(torqued(adamw, self._smoothed), bounded=False)
        assert self.last_angle is not None
        cos = batch.rows(self.last_angle.cosine)
        return batch.take_step(damped(adamw, cos), bounded=False) * cos.clamp(min=0.0) ** 2

    def _memory(self) -> dict[str, Tensor]:
        return {"torque_average": self._smoothed} if self.torque == "smoothed" else {}
