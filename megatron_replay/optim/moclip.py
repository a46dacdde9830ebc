"""MoClip (Sec. 2.1): AdamW with a cap on the angle between gradient and momentum, and atan2 steps.

    D = <m, g>,  M = |m|,  n = |g|,  c = D / (M n) = cos phi
    g' = a g + b m                                   (a, b) = (1, 0) where phi <= max_angle
    m  <- beta1 m + (1 - beta1) g'
    v  <- beta2 v + (1 - beta2) g^2                  the raw g, or g' with second_moment="clipped"
    p  <- (1 - lr wd) p - lr A atan2(m_hat, B sqrt(v_hat))

Every reading of Eq. 5 is a pair (a, b), so one pass over memory takes three dot products and one
pass updates. docs/method.md says why ``line`` is the default.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay.errors import ConfigError

OBTUSE = ("line", "zero", "reflect", "project", "rotate")
ANGLE_SCOPES = ("model", "tensor")


@dataclass(frozen=True)
class Rotation:
    """g' = a g + b m, and the angle it was found from; fp32 tensors of one element."""

    a: Tensor
    b: Tensor
    cosine: Tensor
    clipped: Tensor


def rotation(
    dot: Tensor, momentum_sq: Tensor, grad_sq: Tensor, *, max_angle: float, obtuse: str = "line"
) -> Rotation:
    """The coefficients of g' from D, M^2 and n^2. Stays on the device; works elementwise.

    With t = tan(max_angle), s = sin phi, for phi > max_angle:

    ========  ===================================================  ===============================
    obtuse    a, b                                                 property
    ========  ===================================================  ===============================
    line      a = t |c| / s,       b = D (1 - a) / M^2             |cos phi'| >= cos(max_angle);
                                                                   <g', g> > 0; Lemma 2 to 90 deg
    zero      line to 90 degrees, then a = b = 0                   Lemma 2 always
    reflect   a = t |c| / s,       b = (|D| - a D) / M^2           Lemma 2; may ascend
    project   the nearest point of the cone around m               Lemma 2
    rotate    |g'| = |g|, turned onto the cone                     Lemma 2
    ========  ===================================================  ===============================

    Without momentum or gradient, (a, b) = (1, 0). At phi = 180 degrees, s = 0: a = 0.
    """
    limit = math.radians(max_angle)
    tangent = math.tan(limit) if max_angle < 90 else math.inf
    defined = (momentum_sq > 0) & (grad_sq > 0)
    momentum_sq = torch.where(defined, momentum_sq, 1.0)
    norms = momentum_sq.sqrt() * torch.where(defined, grad_sq, 1.0).sqrt()
    cosine = torch.where(defined, dot / norms, 1.0).clamp(-1.0, 1.0)
    sine = (1 - cosine * cosine).sqrt()
    acute = cosine >= 0
    clipped = cosine < math.cos(limit)
    ratio = (norms / momentum_sq).to(cosine.dtype)  # n / M
    if obtuse in ("project", "rotate"):
        if obtuse == "rotate":
            length = torch.ones_like(cosine)
        else:  # n cos(phi - limit) along the cone's edge, nothing where that points away
            length = (cosine * math.cos(limit) + sine * math.sin(limit)).clamp(min=0.0)
        a = length * math.sin(limit) / sine
        b = ratio * (length * math.cos(limit) - a * cosine)
    else:
        # Keep what lies along m, shorten what lies across to t times it. At 90 degrees the cap on
        # acute angles is never reached, and an obtuse gradient keeps all that lies across.
        a = torch.ones_like(cosine) if math.isinf(tangent) else tangent * cosine.abs() / sine
        a = torch.where(sine > 0, a.clamp(max=1.0), 0.0)
        if obtuse == "line":
            along = torch.zeros_like(cosine) if math.isinf(tangent) else cosine
        else:
            along = cosine.abs() if obtuse == "reflect" else cosine
        b = ratio * (along - a * cosine)
        if obtuse == "zero":
            a, b = torch.where(acute, a, 0.0), torch.where(acute, b, 0.0)
    if obtuse in ("project", "rotate"):
        # On the axis there is no direction to turn in: keep the part along m, forwards.
        on_axis = sine == 0
        a = torch.where(on_axis, 0.0, a)
        b = torch.where(on_axis, ratio * length * math.cos(limit), b)
    return Rotation(torch.where(clipped, a, 1.0), torch.where(clipped, b, 0.0), cosine, clipped)


def moclip_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    a: Tensor,
    b: Tensor,
    step: int,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    second_moment: str,
    atan_a: float,
    atan_b: float,
) -> None:
    """One parameter's update, in place; the equations of this module after g' = a g + b m."""
    if second_moment == "clipped":
        grad_for_v = a * grad + b * exp_avg
    else:
        grad_for_v = grad
    exp_avg_sq.mul_(beta2).addcmul_(grad_for_v, grad_for_v, value=1 - beta2)
    # beta1 m + (1 - beta1)(a g + b m), without a temporary for g'
    exp_avg.mul_(beta1 + (1 - beta1) * b).add_(grad * ((1 - beta1) * a))
    denominator = exp_avg_sq.sqrt().mul_(atan_b / math.sqrt(1 - beta2**step))
    update = torch.atan2(exp_avg / (1 - beta1**step), denominator)  # atan2(0, 0) = 0
    param.mul_(1 - lr * weight_decay).sub_(update.mul_(lr * atan_a))


@dataclass(frozen=True)
class Angle:
    """What the last step's clipping did: tensors of one element, read when logged."""

    cosine: Tensor
    a: Tensor
    b: Tensor
    clipped: Tensor
    grad_norm: Tensor
    momentum_norm: Tensor

    def as_floats(self) -> dict[str, float]:
        """Numbers for a log: the mean over tensors under ``angle_scope="tensor"``."""
        cosine = self.cosine.float().mean().item()
        return {
            "degrees": math.degrees(math.acos(max(-1.0, min(1.0, cosine)))),
            "cosine": cosine,
            "a": self.a.float().mean().item(),
            "b": self.b.float().mean().item(),
            "clipped": self.clipped.float().mean().item(),
            "obtuse": (self.cosine < 0).float().mean().item(),
            "grad_norm": self.grad_norm.float().square().sum().sqrt().item(),
            "momentum_norm": self.momentum_norm.float().square().sum().sqrt().item(),
        }


class MoClip(torch.optim.AdamW):
    """A drop-in replacement for ``torch.optim.AdamW``; state keys and checkpoints are AdamW's.

    Args:
        max_angle: degrees between momentum and gradient beyond which the gradient is turned.
        obtuse: reading of Eq. 5; see ``rotation``.
        angle_scope: one angle for the whole "model", or one for each "tensor".
        second_moment: v averages the squares of the "raw" gradient, or of the "clipped" one.
        atan_a, atan_b: A and B in lr A atan2(m, B sqrt v). |update| <= lr A pi / 2 (Lemma 3).

    A step whose angle is not finite changes nothing, warns, and counts in ``skipped_steps``.

    Attributes:
        last_angle: what the last step did, or None before the first.
        skipped_steps: steps left out.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        *,
        max_angle: float = 45.0,
        obtuse: str = "line",
        angle_scope: str = "model",
        second_moment: str = "raw",
        atan_a: float = 1.0,
        atan_b: float = 1.0,
    ) -> None:
        _require("max_angle", 0 < max_angle <= 90, "degrees above 0, at most 90", max_angle)
        _require("obtuse", obtuse in OBTUSE, ", ".join(OBTUSE), obtuse)
        _require("angle_scope", angle_scope in ANGLE_SCOPES, ", ".join(ANGLE_SCOPES), angle_scope)
        _require(
            "second_moment", second_moment in ("raw", "clipped"), "raw, clipped", second_moment
        )
        _require("atan_a", atan_a > 0, "a number above 0", atan_a)
        _require("atan_b", atan_b > 0, "a number above 0", atan_b)
        super().__init__(params, lr=lr, betas=betas, eps=0.0, weight_decay=weight_decay)
        self.max_angle, self.obtuse, self.angle_scope = max_angle, obtuse, angle_scope
        self.second_moment, self.atan_a, self.atan_b = second_moment, atan_a, atan_b
        self.last_angle: Angle | None = None
        self.skipped_steps = 0
        self._group: dist.ProcessGroup | None = None
        self._counts: Callable[[Tensor], bool] = lambda _: True

    def reduce_angle_over(self, group: dist.ProcessGroup, counts: Callable[[Tensor], bool]) -> None:
        """Sum the angle's dot products over ``group``, the processes that share one model.

        Args:
            counts: whether a parameter enters this rank's sums. What several ranks hold whole, and
                a second copy of a tied weight, must count once.

        Raises:
            ConfigError: under ``angle_scope="tensor"``, which would need a group for each tensor.
        """
        if self.angle_scope == "tensor" and dist.get_world_size(group) > 1:
            raise ConfigError(
                "angle_scope='tensor' is not available where tensors are sharded",
                fix="Use angle_scope='model'",
            )
        self._group, self._counts = group, counts

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step. Communication: one all-reduce of three fp32 over the group, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        entries = self._entries()
        if not entries and self._group is None:
            return loss
        sums = self._sums(entries)
        if not torch.isfinite(sums).all():
            self.skipped_steps += 1
            warnings.warn(
                f"MoClip: the gradient is not finite, step skipped ({self.skipped_steps} so far)",
                stacklevel=2,
            )
            return loss
        turn = rotation(*sums.unbind(-1), max_angle=self.max_angle, obtuse=self.obtuse)
        norms = sums[..., 1:].sqrt()
        self.last_angle = Angle(
            turn.cosine, turn.a, turn.b, turn.clipped, norms[..., 1], norms[..., 0]
        )
        for i, (param, grad, group) in enumerate(entries):
            state = self.state[param]
            state["step"] += 1
            row = i if self.angle_scope == "tensor" else ()
            moclip_update(
                param,
                grad,
                state["exp_avg"],
                state["exp_avg_sq"],
                a=turn.a[row].to(param.dtype),
                b=turn.b[row].to(param.dtype),
                step=int(state["step"]),
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                second_moment=self.second_moment,
                atan_a=self.atan_a,
                atan_b=self.atan_b,
            )
        return loss

    def _entries(self) -> list[tuple[Tensor, Tensor, dict[str, Any]]]:
        """(parameter, gradient, group) of what has one; state is created as AdamW creates it."""
        entries = []
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.grad.is_sparse or param.is_complex():
                    raise RuntimeError(
                        "MoClip supports neither sparse gradients nor complex numbers"
                    )
                state = self.state[param]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
                entries.append((param, param.grad, group))
        return entries

    def _sums(self, entries: list[tuple[Tensor, Tensor, dict[str, Any]]]) -> Tensor:
        """(<m, g>, |m|^2, |g|^2): fp32 [3] over the model, or [tensors, 3]."""
        rows = [
            _dot_products(self.state[param]["exp_avg"], grad)
            for param, grad, _ in entries
            if self._counts(param)
        ]
        if self.angle_scope == "tensor":
            return torch.stack(rows)
        if rows:
            sums = torch.stack(rows).sum(0)
        else:  # this rank holds only copies of what others count
            sums = torch.zeros(3, dtype=torch.float32, device=self._device())
        sums = sums.float()
        if self._group is not None:
            dist.all_reduce(sums, group=self._group)
        return sums

    def _device(self) -> torch.device:
        return next(p.device for group in self.param_groups for p in group["params"])


def _dot_products(exp_avg: Tensor, grad: Tensor) -> Tensor:
    m, g = exp_avg.flatten().float(), grad.flatten().float()
    return torch.stack([torch.dot(m, g), torch.dot(m, m), torch.dot(g, g)])


def _require(name: str, condition: bool, expected: str, found: object) -> None:
    if not condition:
        raise ConfigError(f"unusable {name}", expected=expected, found=repr(found))
