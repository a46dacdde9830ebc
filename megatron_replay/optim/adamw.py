"""AdamW (Loshchilov and Hutter, arXiv 1711.05101), the baseline of all comparisons.

m <- beta1 m + (1 - beta1) g
v <- beta2 v + (1 - beta2) g^2
p <- (1 - lr wd) p - lr m_hat / (sqrt(v_hat) + eps)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from megatron_replay.optim.batch import Batch, Scalars
from megatron_replay.optim.momentum_step import Coefficients, Scalar
from megatron_replay.optim.rule import UpdateRule


def adamw_coefficients(
    *,
    step: int,
    lr: Scalar,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float = 1e-8,
    clip: Scalar = 1.0,
    proceed: Scalar = 1.0,
) -> Coefficients:
    """The step above on ``clip`` g, with ``step`` counted from 1; u is m_hat / (sqrt(v_hat) + eps).

    Both bias corrections go to the denominator: (m / c1) / (sqrt(v / c2) + eps) is
    m / ((c1 / sqrt c2) sqrt v + c1 eps).
    """
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    return Coefficients(
        proceed=proceed,
        keep_m=beta1,
        take_g=(1 - beta1) * clip,
        clip=clip,
        keep_v=beta2,
        take_v=1 - beta2,
        scale_v=correction1 / math.sqrt(correction2),
        eps=correction1 * eps,
        decay=1 - lr * weight_decay,
        move=lr,
    )


def adamw_of(batch: Batch, scalars: Scalars) -> Coefficients:
    """AdamW's coefficients with the batch's settings."""
    return adamw_coefficients(eps=batch.group["eps"], **batch.settings(scalars))


class AdamW(UpdateRule):
    """``torch.optim.AdamW`` over a model on many processes, with clipping in the same pass."""

    def _update(self, batches: Sequence[Batch], scalars: Scalars) -> list[Tensor]:
        return [batch.take_step(adamw_of(batch, scalars)) for batch in batches]
