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
from megatron_replay.optim.momentum_step import Coefficients
from megatron_replay.optim.rule import UpdateRule


def adamw_coefficients(batch: Batch, scalars: Scalars) -> Coefficients:
    """The step above on ``clip`` g, with the batch's settings; u is m_hat / (sqrt(v_hat) + eps).

    Both bias corrections go to the denominator: (m / c1) / (sqrt(v / c2) + eps) is
    m / ((c1 / sqrt c2) sqrt v + c1 eps).
    """
    group, clip = batch.group, scalars.clip
    beta1, beta2 = group["betas"]
    correction1, correction2 = 1 - beta1**batch.step, 1 - beta2**batch.step
    return Coefficients(
        proceed=scalars.proceed,
        keep_m=beta1,
        take_g=(1 - beta1) * clip,
        clip=clip,
        keep_v=beta2,
        take_v=1 - beta2,
        scale_v=correction1 / math.sqrt(correction2),
        eps=correction1 * group["eps"],
        decay=1 - group["lr"] * group["weight_decay"],
        move=group["lr"],
    )


class AdamW(UpdateRule):
    """``torch.optim.AdamW`` over a model on many processes, with clipping in the same pass."""

    def _update(self, batches: Sequence[Batch], scalars: Scalars) -> list[Tensor]:
        return [batch.take_step(adamw_coefficients(batch, scalars)) for batch in batches]
