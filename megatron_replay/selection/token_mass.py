"""The mass of a token, exp(z - max) in units of 2^-38: an integer with the same bits everywhere.

``torch.exp`` differs in its last bit between processors, and between the lanes of one vector
register. This exponential consists of fp32 operations that IEEE 754 rounds alike on every device,
each rounded separately (none is fused with another):

    t = log2(e) max(z - max, -28)     k = round(t)     mass = round(2^(k + 38) p(t - k))
    p(f) = ((c5 f + c4) f^2 + (c3 f + c2)) f^2 + (c1 f + 1)

with halves rounded to even; t - k is exact. Over all fp32 differences in [-28, 0] the relative
error is at most 2^-19.05, nearly all of it from rounding t; the largest mass is 2^38, at 0. At -28
the power is 0.19, so a mass below that is 0. Whether denormals are flushed to zero makes no
difference.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASS_BITS = 38
#: Logit differences below this have mass 0.
LOWEST = -28.0
# All constants are fp32 numbers.
LOG2_E = float.fromhex("0x1.715476p+0")
#: c5 to c1. Least relative error to 2^f for |f| <= 1/2, found by iterated least squares with p(0)
#: held at 1: 2^-23.1, and 2^-22.3 with p's roundings.
POLYNOMIAL = (
    float.fromhex("0x1.5bb9fcp-10"),
    float.fromhex("0x1.3cea9ep-7"),
    float.fromhex("0x1.c6b754p-5"),
    float.fromhex("0x1.ebf9bcp-3"),
    float.fromhex("0x1.62e42ap-1"),
)


def token_masses(logits: Tensor, max_T: Tensor) -> Tensor:
    """int64 [T, ...] masses of fp32 [T, ...] logits, given each row's maximum."""
    t = (logits - max_T[:, None]).clamp_(min=LOWEST).mul_(LOG2_E)
    k = t.round()
    f = t.sub_(k)
    c5, c4, c3, c2, c1 = POLYNOMIAL
    square = f * f
    p = (f * c5).add_(c4).mul_(square).add_((f * c3).add_(c2)).mul_(square).add_((f * c1).add_(1.0))
    # A normal fp32 number, whose exponent field is biased by 127: the product is exact.
    power = k.int().add_(MASS_BITS + 127).bitwise_left_shift_(23).view(torch.float32)
    return p.mul_(power).round_().long()
