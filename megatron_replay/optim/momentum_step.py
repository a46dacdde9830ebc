"""One elementwise step for AdamW, TAM and MoClip, which differ only in its coefficients.

    m <-  keep_m m + take_g g
    v <-  keep_v v + take_v (clip g)^2
    u  =  atan2(m, scale_v sqrt(v))           or  m / (scale_v sqrt(v) + eps)
    p <-  decay p - move u                    atan2(0, 0) = 0

Where ``proceed`` is 0 nothing changes, whatever the tensors hold, so a step is skipped without a
read by the host. The compiled backends (``kernels``) compute exactly this in one pass. Here is the
plain torch backend, with which they are compared and which other devices run: an NPU needs only
elementwise fp32 operations here that its vector cores have (not run on one).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_replay.kernels import Backends

Scalar = float | Tensor


class Coefficients(NamedTuple):
    """The scalars of a step: numbers, or tensors [] or [tensors] on the device, in this order.

    With c1 = 1 - beta1^step and c2 = 1 - beta2^step; c and (a, b) come from the angle:

    ======  ====================  ===================  ======  ================
    rule    keep_m                take_g               eps     move
    ======  ====================  ===================  ======  ================
    AdamW   beta1                 (1 - beta1) clip     c1 eps  lr
    TAM     beta1                 (1 - beta1) clip     c1 eps  lr max(c, 0)
    MoClip  beta1 + (1 - beta1)b  (1 - beta1) a clip   0       lr
    ======  ====================  ===================  ======  ================

    The same for all: keep_v = beta2, take_v = 1 - beta2, scale_v = c1 / sqrt(c2),
    decay = 1 - lr weight_decay, clip = min(1, clipping norm / |g|), proceed = 1, or 0 to skip.
    """

    proceed: Scalar
    keep_m: Scalar
    take_g: Scalar
    clip: Scalar
    keep_v: Scalar
    take_v: Scalar
    scale_v: Scalar
    eps: Scalar
    decay: Scalar
    move: Scalar

    def pack(self, like: Tensor) -> Tensor:
        """[10], or [tensors, 10] where a scalar is [tensors]; dtype and device of ``like``.

        Reads nothing from the device. Numbers are filled in on the device, because a copy from the
        host would wait for the host.
        """
        scalars = [
            x.to(like)
            if isinstance(x, Tensor)
            else torch.full((), x, dtype=like.dtype, device=like.device)
            for x in self
        ]
        return torch.stack(torch.broadcast_tensors(*scalars), dim=-1)


def dot_products(exp_avgs: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """(<m, g>, |m|^2, |g|^2) of each pair: [tensors, 3], fp64 on a CPU, else fp32."""
    rows = []
    for exp_avg, grad in zip(exp_avgs, grads, strict=True):
        m, g = exp_avg.flatten(), grad.flatten()
        rows.append(torch.stack([_dot(m, g), _dot(m, m), _dot(g, g)]))
    return torch.stack(rows)


def square_sums(grads: Sequence[Tensor]) -> Tensor:
    """|g|^2 of each: [tensors], fp64 on a CPU, else fp32."""
    flat = [grad.flatten() for grad in grads]
    return torch.stack([_dot(g, g) for g in flat])


#: Elements that one BLAS call sums on a CPU.
_BLOCK = 1 << 13


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """<x, y>. A CPU's BLAS keeps few fp32 partial sums, which lose small terms: over 2^26 normal
    squares it was 0.4 % off, in blocks 1e-7; squares of which a few are large need small blocks
    (1.4e-6 off in blocks of 2^16 with AVX2). Accelerators sum in a tree.
    """
    if not x.is_cpu:
        return torch.dot(x, y)
    blocks = zip(x.split(_BLOCK), y.split(_BLOCK), strict=True)
    return torch.stack([torch.dot(u, v) for u, v in blocks]).sum(dtype=torch.float64)


def momentum_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    coefficients: Tensor,
    *,
    bounded: bool,
    copies: Sequence[Tensor] | None = None,
) -> Tensor:
    """Take the step on each tensor, in place; the four tensors of a parameter have one shape.

    Args:
        coefficients: ``Coefficients.pack``: [10] for all tensors, or [tensors, 10].
        bounded: u is the arctangent (MoClip); else the quotient (AdamW).
        copies: where to write each new p in bf16 as well: the model's own weights.

    Returns:
        The sum of u^2 over each tensor, [tensors]; 0 where the step did not proceed.
    """
    sums = []
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        row = coefficients if coefficients.dim() == 1 else coefficients[i]
        c = Coefficients(*row.unbind())
        new_m = c.keep_m * m + c.take_g * g
        u = g * c.clip
        new_v = c.keep_v * v + u.square_().mul_(c.take_v)
        torch.sqrt(new_v, out=u).mul_(c.scale_v)
        if bounded:
            torch.atan2(new_m, u, out=u)
        else:
            torch.div(new_m, u.add_(c.eps), out=u)
        new_p = c.decay * p - c.move * u
        # Selected, not multiplied by 0, which would keep values that are not finite.
        proceed = row[0] != 0
        m.copy_(torch.where(proceed, new_m, m))
        v.copy_(torch.where(proceed, new_v, v))
        p.copy_(torch.where(proceed, new_p, p))
        if copies is not None:
            copies[i].copy_(torch.where(proceed, new_p, copies[i]))
        sums.append(torch.where(proceed, _dot(u.flatten(), u.flatten()), 0.0))
    return torch.stack(sums)


class OptimizerKernels(NamedTuple):
    """One backend of this module's three functions."""

    name: str
    dot_products: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
    square_sums: Callable[[Sequence[Tensor]], Tensor]
    momentum_step: Callable[..., Tensor]


#: The backends of the two passes of an optimizer's step.
OPTIMIZER = Backends[OptimizerKernels](
    what="the optimizer's passes",
    anywhere={"torch": OptimizerKernels("torch", dot_products, square_sums, momentum_step)},
    compiled={"cpu": (torch.float32,), "triton": (torch.float32,)},
    module="optimizer",
    bind=lambda name, module: OptimizerKernels(
        name, module.dot_products, module.square_sums, module.momentum_step
    ),
    contiguous=True,
)
