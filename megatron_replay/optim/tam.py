"""Torque-aware momentum (Malviya et al., 2024), in the variant of the paper (Sec. 3.5).

    p moves by max(c, 0) times AdamW's step

with c the cosine between momentum and gradient, and AdamW's m and v. A misaligned gradient counts
for less; one that points against the momentum changes nothing but the decay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from megatron_replay.optim.adamw import adamw_coefficients
from megatron_replay.optim.batch import Angle, Batch, Scalars
from megatron_replay.optim.rule import UpdateRule


class TAM(UpdateRule):
    """AdamW with torque-aware momentum; ``angle_scope``: as in UpdateRule."""

    reads_angle: ClassVar[bool] = True

    def _update(self, batches: Sequence[Batch], scalars: Scalars) -> list[Tensor]:
        dot, momentum_sq, grad_sq = scalars.sums.unbind(-1)
        unturned = torch.ones_like(dot), torch.zeros_like(dot)
        self.last_angle = Angle(dot, momentum_sq, grad_sq, *unturned)
        damping = self.last_angle.cosine.clamp(min=0.0)
        parts = []
        for batch in batches:
            adamw, share = adamw_coefficients(batch, scalars), batch.rows(damping)
            parts.append(batch.take_step(adamw._replace(move=adamw.move * share), share=share))
        return parts
