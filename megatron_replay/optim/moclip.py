"""MoClip (arXiv 2510.09152, Sec. 2.1): a cap on the angle between gradient and momentum, and atan2.

    g' = a g + b m                                   (a, b) = (1, 0) where phi <= max_angle
    m  <- beta1 m + (1 - beta1) g'
    v  <- beta2 v + (1 - beta2) g^2                  the raw g, not g'
    p  <- (1 - lr wd) p - lr atan2(m_hat, sqrt(v_hat))

phi is the angle between the momentum m before the step and the gradient g. Eq. 5 is a pair (a, b),
so one pass over memory computes three dot products and one pass updates. docs/method.md has the
reason why ``line`` is the default beyond 90 degrees.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_replay.optim.adamw import adamw_coefficients
from megatron_replay.optim.batch import Angle, Batch, Scalars, cosine
from megatron_replay.optim.rule import UpdateRule

#: What becomes of a gradient more than 90 degrees from the momentum: ``rotation_coefficients``.
OBTUSE = ("line", "zero")
#: With ``zero``, this many obtuse gradients in a row are dropped and the next one passes unchanged:
#: otherwise a momentum that points uphill would never change.
_PATIENCE = 3


def rotation_coefficients(
    dot: Tensor, momentum_sq: Tensor, grad_sq: Tensor, *, max_angle: float, obtuse: str = "line"
) -> tuple[Tensor, Tensor]:
    """(a, b) of g' = a g + b m, elementwise, from D = <m, g>, M^2 = |m|^2 and n^2 = |g|^2.

    Where phi > max_angle, with c = cos phi, s = sin phi and t = tan(max_angle):

    ======  ====================================================  ==============================
    obtuse  a, b                                                  property
    ======  ====================================================  ==============================
    line    a = min(1, t |c| / s),  b = D (1 - a) / M^2           |cos phi'| >= cos(max_angle);
                                                                  <g', g> > 0; Lemma 2 to 90 deg
    zero    line up to 90 degrees, then a = b = 0                 Lemma 2 always
    ======  ====================================================  ==============================

    Without momentum or gradient, (a, b) = (1, 0). Where s = 0, nothing is across m: a = 0.
    At max_angle = 90, ``line`` drops the part of g that points against m.
    """
    c = cosine(dot, momentum_sq, grad_sq)
    s = (1 - c * c).sqrt()
    # The cosine and tangent of 90 degrees are not exact in floating point.
    cos_limit, tangent = 0.0, math.inf
    if max_angle < 90:
        cos_limit, tangent = math.cos(math.radians(max_angle)), math.tan(math.radians(max_angle))
    # ``along`` |g| is what remains in the direction of m, ``across`` the share that remains of the
    # rest: at most tan(max_angle) times the part along m.
    along, across = c, (tangent * c.abs() / s).clamp(max=1.0)
    if obtuse == "zero":
        across = torch.where(c < 0, 0.0, across)
    if obtuse == "zero" or max_angle == 90:
        along = c.clamp(min=0.0)
    across = torch.where(s > 0, across, 0.0)
    clipped = c < cos_limit
    a = torch.where(clipped, across, 1.0)
    b = torch.where(clipped, (grad_sq.sqrt() / momentum_sq.sqrt()) * (along - across * c), 0.0)
    return a, b


class MoClip(UpdateRule):
    """A drop-in replacement for ``torch.optim.AdamW``; state keys and checkpoints are AdamW's.

    No element moves by more than lr pi / 2 beyond its decay (Lemma 3).

    Args:
        params, lr, betas, weight_decay: as in AdamW, also for each group. There is no epsilon, so
            arguments after ``betas`` are given by name.
        max_angle: degrees between momentum and gradient beyond which the gradient is turned.
        obtuse: what becomes of a gradient beyond 90 degrees; see ``rotation_coefficients``.
        angle_scope: one angle for the whole "model", or one for each "tensor".
        clip_grad, backend: as in UpdateRule, whose attributes it has.
    """

    reads_angle: ClassVar[bool] = True

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
        if angle_scope == "tensor":  # the count of obtuse steps is one for the model
            self._require("obtuse with angle_scope='tensor'", obtuse != "zero", "another", obtuse)
        self.max_angle, self.obtuse = max_angle, obtuse
        # AdamW's own epsilon stays in the groups: back under AdamW, 0 would give 0 / 0.
        super().__init__(
            params,
            lr,
            betas,
            weight_decay=weight_decay,
            clip_grad=clip_grad,
            backend=backend,
            angle_scope=angle_scope,
        )

    def _update(self, batches: Sequence[Batch], scalars: Scalars) -> list[Tensor]:
        dot, momentum_sq, grad_sq = scalars.sums.unbind(-1)
        a, b = rotation_coefficients(
            dot, momentum_sq, grad_sq, max_angle=self.max_angle, obtuse=self.obtuse
        )
        if self.obtuse == "zero":
            # Obtuse gradients in a row: a count saved with the groups, as ``lr`` is.
            streak = self.param_groups[0].get("obtuse_streak", 0.0) + 1.0
            streak = torch.where(dot < 0, streak, 0.0)
            passes = streak > _PATIENCE
            a, b = torch.where(passes, 1.0, a), torch.where(passes, 0.0, b)
            self._memory = {"obtuse_streak": torch.where(passes, 0.0, streak)}
        self.last_angle = Angle(dot, momentum_sq, grad_sq, a, b)
        parts = []
        for batch in batches:
            adamw, beta1 = adamw_coefficients(batch, scalars), batch.group["betas"][0]
            # beta1 m + (1 - beta1)(a g + b m) needs no g' in memory. atan2 does not change when
            # both sides are scaled, so scale_v has both bias corrections, as in AdamW.
            coefficients = adamw._replace(
                keep_m=beta1 + (1 - beta1) * batch.rows(b),
                take_g=(1 - beta1) * batch.rows(a) * scalars.clip,
                eps=0.0,
            )
            parts.append(batch.take_step(coefficients, bounded=True))
        return parts
