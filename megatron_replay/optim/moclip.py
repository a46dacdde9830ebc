"""MoClip (Sec. 2.1): AdamW with a cap on the angle between gradient and momentum, and atan2 steps.

    g' = a g + b m                                   a, b from the angle of m and g: angle.py
    m  <- beta1 m + (1 - beta1) g'
    v  <- beta2 v + (1 - beta2) g^2                  the raw g, not g'
    p  <- (1 - lr wd) p - lr atan2(m_hat, sqrt(v_hat))

One pass over memory takes three dot products, one pass updates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_replay.optim.angle import OBTUSE, Angle, rotation_coefficients
from megatron_replay.optim.base import UpdateRule
from megatron_replay.optim.batch import Batch, Scalars
from megatron_replay.optim.momentum_step import Coefficients, Scalar

#: With ``zero``, this many obtuse gradients in a row are dropped and the next one passes unchanged:
#: otherwise a momentum that points uphill would never change.
_PATIENCE = 3


def moclip_coefficients(
    a: Scalar,
    b: Scalar,
    *,
    step: int,
    lr: Scalar,
    beta1: float,
    beta2: float,
    weight_decay: float,
    clip: Scalar = 1.0,
    proceed: Scalar = 1.0,
) -> Coefficients:
    """The step above on ``clip`` g, with ``step`` counted from 1; u is the arctangent.

    beta1 m + (1 - beta1)(a g + b m) needs no g' of its own; and atan2 does not change when both
    sides are scaled, so that both bias corrections go to sqrt(v).
    """
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    return Coefficients(
        proceed=proceed,
        keep_m=beta1 + (1 - beta1) * b,
        take_g=(1 - beta1) * a * clip,
        clip=clip,
        keep_v=beta2,
        take_v=1 - beta2,
        scale_v=correction1 / math.sqrt(correction2),
        eps=0.0,
        decay=1 - lr * weight_decay,
        move=lr,
    )


class MoClip(UpdateRule):
    """A drop-in replacement for ``torch.optim.AdamW``; state keys and checkpoints are AdamW's.

    No element moves by more than lr pi / 2 beyond its decay (Lemma 3).

    Args:
        params, lr, betas, weight_decay: as in AdamW, also per group. There is no epsilon, so that
            what follows ``betas`` goes by name.
        max_angle: degrees between momentum and gradient beyond which the gradient is turned.
        obtuse: what becomes of a gradient beyond 90 degrees; see ``rotation_coefficients``.
        angle_scope: one angle for the whole "model", or one for each "tensor".
        clip_grad, backend: as in UpdateRule, whose attributes it has.
    """

    looks_at_angle: ClassVar[bool] = True
    own: ClassVar[tuple[str, ...]] = (
        *UpdateRule.own,
        *"max_angle obtuse _streak _fired".split(),
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        weight_decay: float = 0.0,
        max_angle: float = 45.0,
        obtuse: str = "line",
        angle_scope: str = "model",
        clip_grad: float = 0.0,
        backend: str = "auto",
    ) -> None:
        self._require("max_angle", 0 < max_angle <= 90, "degrees above 0, at most 90", max_angle)
        self._require("obtuse", obtuse in OBTUSE, ", ".join(OBTUSE), obtuse)
        self._require(
            "angle_scope", angle_scope in ("model", "tensor"), "model, tensor", angle_scope
        )
        if angle_scope == "tensor":  # the count of obtuse steps is one for the model
            self._require("obtuse with angle_scope='tensor'", obtuse != "zero", "another", obtuse)
        self.max_angle, self.obtuse = max_angle, obtuse
        self._streak = self._fired = torch.zeros(())
        # AdamW's own epsilon stays in the groups: back under AdamW, 0 would give 0 / 0.
        super().__init__(
            params, lr, betas, weight_decay=weight_decay, clip_grad=clip_grad, backend=backend
        )
        self.angle_scope = angle_scope

    def _prepare(self, scalars: Scalars) -> None:
        dot, momentum_sq, grad_sq = scalars.sums.unbind(-1)
        a, b = rotation_coefficients(
            dot, momentum_sq, grad_sq, max_angle=self.max_angle, obtuse=self.obtuse
        )
        if self.obtuse == "zero":
            # Obtuse gradients in a row; the count is saved with the groups, as ``lr`` is.
            streak = self.param_groups[0].get("obtuse_streak", 0.0) + 1.0
            self._streak = torch.where(dot < 0, streak, 0.0)
            self._fired = self._streak > _PATIENCE
            self._streak = torch.where(self._fired, 0.0, self._streak)
            a, b = torch.where(self._fired, 1.0, a), torch.where(self._fired, 0.0, b)
        self.last_angle = Angle(dot, momentum_sq, grad_sq, a, b)

    def _move(self, batch: Batch, scalars: Scalars) -> Tensor:
        assert self.last_angle is not None
        group = batch.group
        coefficients = moclip_coefficients(
            batch.rows(self.last_angle.a),
            batch.rows(self.last_angle.b),
            step=batch.step,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            clip=scalars.clip,
            proceed=scalars.proceed,
        )
        return batch.take_step(coefficients, bounded=True)

    def _memory(self) -> dict[str, Tensor]:
        return {"obtuse_streak": self._streak} if self.obtuse == "zero" else {}

    def report(self) -> dict[str, float]:
        """As in UpdateRule, with ``patience_fires`` under ``zero``: 1 where a step passed."""
        report = super().report()
        if report and self.obtuse == "zero":
            report["patience_fires"] = float(self._fired)
        return report
