"""The mass of a token, exp(z - max) in units of 2^-38: an integer with the same bits everywhere.

``torch.exp`` differs by its last bit between processors, and between the places of one vector
register. This exponential consists of fp32 operations that IEEE 754 rounds alike on every device,
each rounded on its own (none fused into another):

    x = max(z - max, -28)     k = round(x log2(e))     r = (x - k ln2_hi) - k ln2_lo
    mass = round(2^(k + 38) p(r)),   p(r) = 1 + r (1 + r (c2 + r (c3 + r (c4 + r (c5 + r c6)))))

with halves rounded to even. ln2_hi has 16 significant bits and |k| at most 40, so k ln2_hi is
exact, and so is its difference to x. Over all fp32 x in [-28, 0] the power errs by at most 2^-23.2
of itself and never exceeds 2^38, which x = 0 gives. At -28 it is 0.19: what lies below is nothing.
Whether denormals are flushed to zero makes no difference.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASS_BITS = 38
#: Below, a mass is 0.
LOWEST = -28.0
# All constants are fp32 numbers. The polynomial: least relative error for |r| <= ln(2) / 2, found
# by iterated least squares (2^-28.2 before rounding), with its first two coefficients held at 1.
LOG2_E = float.fromhex("0x1.715476p+0")
LN2_HI = float.fromhex("0x1.62e4p-1")
LN2_LO = float.fromhex("0x1.7f7d1cp-20")
POLYNOMIAL = (
    float.fromhex("0x1.6a2434p-10"),
    float.fromhex("0x1.1239e2p-7"),
    float.fromhex("0x1.5558f2p-5"),
    float.fromhex("0x1.555492p-3"),
    float.fromhex("0x1.fffffcp-2"),
    1.0,
    1.0,
)


def token_masses(logits: Tensor, max_T: Tensor) -> Tensor:
    """int64 [T, ...] masses of fp32 [T, ...] logits, given each row's maximum."""
    x = (logits - max_T[:, None]).clamp_(min=LOWEST)
    k = (x * LOG2_E).round_()
    r = x.sub_(k * LN2_HI).sub_(k * LN2_LO)
    p = r * POLYNOMIAL[0]
    for coefficient in POLYNOMIAL[1:-1]:
        p.add_(coefficient).mul_(r)
    p.add_(POLYNOMIAL[-1])
    # A normal fp32 number, whose exponent field is biased by 127: the product is exact.
    power = k.int().add_(MASS_BITS + 127).bitwise_left_shift_(23).view(torch.float32)
    return p.mul_(power).round_().long()
