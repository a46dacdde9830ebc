"""The angle between gradient and momentum, and how MoClip turns the gradient within its cap.

    D = <m, g>,  M = |m|,  n = |g|,  c = D / (M n) = cos phi,  s = sin phi
    g' = a g + b m                                   (a, b) = (1, 0) where phi <= max_angle

Eq. 5 of the paper is a pair (a, b), so one pass over memory takes three dot products and one pass
updates. docs/method.md says why ``line`` is the default beyond 90 degrees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: What becomes of a gradient more than 90 degrees from the momentum: ``rotation_coefficients``.
OBTUSE = ("line", "zero")


def cosine(dot: Tensor, momentum_sq: Tensor, grad_sq: Tensor) -> Tensor:
    """c = D / (M n), elementwise; 1 where momentum or gradient is zero."""
    defined = (momentum_sq > 0) & (grad_sq > 0)
    # Two roots: the product of the squares leaves fp32's range where that of the norms does not.
    norms = momentum_sq.sqrt() * grad_sq.sqrt()
    return torch.where(defined, dot / norms, 1.0).clamp(-1.0, 1.0)


def rotation_coefficients(
    dot: Tensor, momentum_sq: Tensor, grad_sq: Tensor, *, max_angle: float, obtuse: str = "line"
) -> tuple[Tensor, Tensor]:
    """(a, b) of g' = a g + b m from D, M^2 and n^2, elementwise and on their device.

    Where phi > max_angle, with t = tan(max_angle):

    ======  ====================================================  ==============================
    obtuse  a, b                                                  property
    ======  ====================================================  ==============================
    line    a = min(1, t |c| / s),  b = D (1 - a) / M^2           |cos phi'| >= cos(max_angle);
                                                                  <g', g> > 0; Lemma 2 to 90 deg
    zero    line up to 90 degrees, then a = b = 0                 Lemma 2 always
    ======  ====================================================  ==============================

    Without momentum or gradient, (a, b) = (1, 0). Where s = 0, nothing lies across m: a = 0.
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


@dataclass(frozen=True)
class Angle:
    """The angle a step saw and what became of the gradient: tensors on the device, [] or [tensors].

    D, M^2 and n^2 are of m and the clipped g before the step; g' = a g + b m.
    """

    dot: Tensor
    momentum_sq: Tensor
    grad_sq: Tensor
    a: Tensor
    b: Tensor

    @property
    def cosine(self) -> Tensor:
        """cos phi; 1 where there is no angle, at the first step among others."""
        return cosine(self.dot, self.momentum_sq, self.grad_sq)

    @property
    def degrees(self) -> Tensor:
        """phi."""
        return self.cosine.acos().rad2deg()

    @property
    def clipped(self) -> Tensor:
        """Whether the gradient was turned."""
        return (self.a != 1) | (self.b != 0)

    @property
    def obtuse(self) -> Tensor:
        """Whether the gradient pointed against the momentum."""
        return self.cosine < 0

    def scalars(self) -> dict[str, Tensor]:
        """What a log wants, [] each: means over tensors; ratios of norms are the whole's.

        ``snr`` is D / (n^2 - D), an estimate of |signal|^2 / |noise|^2: gradients of two batches
        share the signal alone.
        """
        dot, momentum_sq, grad_sq = (x.sum() for x in (self.dot, self.momentum_sq, self.grad_sq))
        turned_sq = (
            self.a**2 * self.grad_sq + 2 * self.a * self.b * self.dot + self.b**2 * self.momentum_sq
        )
        means = {
            name: getattr(self, name).to(dot.dtype).mean()
            for name in ("degrees", "cosine", "a", "b", "clipped", "obtuse")
        }
        return means | {
            "turned_over_grad_norm": (turned_sq.clamp(min=0).sum() / grad_sq).sqrt(),
            "momentum_over_grad_norm": (momentum_sq / grad_sq).sqrt(),
            "snr": dot / (grad_sq - dot),
        }
