"""MoClip (Sec. 2.1): AdamW with a cap on the angle between gradient and momentum, and atan2 steps.

    g' = a g + b m                                   a, b from the angle of m and g: angle.py
    m  <- beta1 m + (1 - beta1) g'
    v  <- beta2 v + (1 - beta2) g^2                  the raw g, or g' with second_moment="clipped"
    p  <- (1 - lr wd) p - lr A atan2(m_hat, B sqrt(v_hat))

One pass over memory takes three dot products, one pass updates.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay.errors import ConfigError
from megatron_replay.optim.angle import (
    READINGS,
    Angle,
    cosine,
    dot_products,
    rotation_coefficients,
)


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
    """One parameter's update, in place; the plain form of it, with ``step`` counted from 1:

    g' = a grad + b exp_avg;  h = grad, or g' with second_moment="clipped"
    exp_avg = beta1 exp_avg + (1 - beta1) g'
    exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) h^2
    update = atan2(exp_avg / (1 - beta1^step), atan_b sqrt(exp_avg_sq / (1 - beta2^step)))
    param = (1 - lr weight_decay) param - lr atan_a update          atan2(0, 0) = 0
    """
    squared = grad if second_moment == "raw" else a * grad + b * exp_avg
    exp_avg_sq.mul_(beta2).addcmul_(squared, squared, value=1 - beta2)
    # beta1 m + (1 - beta1)(a g + b m), without a temporary for g'.
    exp_avg.mul_(beta1 + (1 - beta1) * b).addcmul_(grad, (1 - beta1) * a)
    # atan2 does not change when both sides are scaled: both corrections go to the one temporary.
    scale = atan_b * (1 - beta1**step) / math.sqrt(1 - beta2**step)
    update = exp_avg_sq.sqrt().mul_(scale)
    torch.atan2(exp_avg, update, out=update)
    param.mul_(1 - lr * weight_decay).sub_(update.mul_(lr * atan_a))


_WHOLE_OPTIMIZER = {"max_angle", "obtuse", "angle_scope", "second_moment", "atan_a", "atan_b"}


class MoClip(torch.optim.AdamW):
    """A drop-in replacement for ``torch.optim.AdamW``; state keys and checkpoints are AdamW's.

    Args:
        params, lr, betas, weight_decay: as in AdamW, also per group. There is no epsilon.
        max_angle: degrees between momentum and gradient beyond which the gradient is turned.
        obtuse: reading of Eq. 5; see ``rotation_coefficients``.
        obtuse_patience: with ``zero``, so many obtuse gradients in a row are dropped; the next one
            passes unchanged, for otherwise momentum and gradient can face each other for ever.
        angle_scope: one angle for the whole "model", or one for each "tensor".
        second_moment: v averages the squares of the "raw" gradient, or of the "clipped" one.
        atan_a, atan_b: A and B in lr A atan2(m, B sqrt v). |update| <= lr A pi / 2 (Lemma 3).

    A step whose dot products are not finite changes nothing, warns, and counts in
    ``skipped_steps``. That check is the step's one read of the device.

    Attributes:
        last_angle: what the last step did; None before the first one and after a skipped one.
        skipped_steps: steps left out.

    Raises:
        ConfigError: a setting of MoClip's own that cannot work; in ``step``, a parameter that is
            not fp32 or fp64 (a step of 1e-6 is lost in bf16: keep fp32 masters) or has a sparse
            gradient.
        ValueError: a setting that AdamW refuses as well.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        *,
        max_angle: float = 45.0,
        obtuse: str = "line",
        obtuse_patience: int = 3,
        angle_scope: str = "model",
        second_moment: str = "raw",
        atan_a: float = 1.0,
        atan_b: float = 1.0,
    ) -> None:
        _require("max_angle", 0 < max_angle <= 90, "degrees above 0, at most 90", max_angle)
        _require("obtuse", obtuse in READINGS, ", ".join(READINGS), obtuse)
        _require("obtuse_patience", obtuse_patience >= 0, "a count from 0", obtuse_patience)
        _require("angle_scope", angle_scope in ("model", "tensor"), "model, tensor", angle_scope)
        if angle_scope == "tensor":  # the count of obtuse steps is one for the model
            _require("obtuse with angle_scope='tensor'", obtuse != "zero", "another", obtuse)
        _require(
            "second_moment", second_moment in ("raw", "clipped"), "raw, clipped", second_moment
        )
        _require("atan_a", 0 < atan_a < math.inf, "a number above 0", atan_a)
        _require("atan_b", 0 < atan_b < math.inf, "a number above 0", atan_b)
        self.max_angle, self.obtuse, self.angle_scope = max_angle, obtuse, angle_scope
        self.obtuse_patience, self.second_moment = obtuse_patience, second_moment
        self.atan_a, self.atan_b = atan_a, atan_b
        self.last_angle: Angle | None = None
        self.skipped_steps = 0
        self._group: dist.ProcessGroup | None = None
        self._counts: Callable[[Tensor], bool] | None = None
        # AdamW's own epsilon stays in the groups: back under AdamW, 0 would give 0 / 0.
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)

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
                "angle_scope='tensor' is not available under model parallelism yet",
                expected="one process",
                found=f"{dist.get_world_size(group)} processes that share the model",
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
        # Of several processes one may have nothing to add, and must still answer the others.
        if not entries and (self._group is None or self.angle_scope == "tensor"):
            return loss
        sums = self._sums(entries)
        if not torch.isfinite(sums).all():
            self._skip()
            return loss
        a, b = self._coefficients(sums)
        norms = sums[..., 1:].sqrt()
        self.last_angle = Angle(cosine(*sums.unbind(-1)), a, b, norms[..., 1], norms[..., 0])
        for i, (param, grad, group) in enumerate(entries):
            state, row = self.state[param], i if self.angle_scope == "tensor" else ()
            state["step"] += 1
            moclip_update(
                param,
                grad,
                state["exp_avg"],
                state["exp_avg_sq"],
                a=a[row].to(param),
                b=b[row].to(param),
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
                _require_usable(param, param.grad)
                state = self.state[param]
                if not state:
                    state["step"] = torch.tensor(0.0, dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
                entries.append((param, param.grad, group))
        return entries

    def _sums(self, entries: list[tuple[Tensor, Tensor, dict[str, Any]]]) -> Tensor:
        """(<m, g>, |m|^2, |g|^2): [3] over the model, or [tensors, 3]."""
        # Megatron gives every rank the same list of groups: on some ranks the first may be empty.
        device = next(p.device for group in self.param_groups for p in group["params"])
        rows = [
            dot_products(self.state[param]["exp_avg"], grad).to(device)
            for param, grad, _ in entries
            if self.angle_scope == "tensor" or self._counts is None or self._counts(param)
        ]
        if self.angle_scope == "tensor":
            return torch.stack(rows)
        # A rank may hold nothing but copies of what others count.
        sums = torch.stack(rows).sum(0) if rows else torch.zeros(3, device=device)
        if self._group is not None:
            sums = sums.float()  # HCCL has no fp64
            dist.all_reduce(sums, group=self._group)
        return sums

    def _coefficients(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        a, b = rotation_coefficients(*sums.unbind(-1), max_angle=self.max_angle, obtuse=self.obtuse)
        if self.obtuse == "zero" and self._patience_is_spent(is_obtuse=bool(sums[0] < 0)):
            return torch.ones_like(a), torch.zeros_like(b)
        return a, b

    def _patience_is_spent(self, *, is_obtuse: bool) -> bool:
        """Count obtuse gradients in a row; the count is saved with the groups, as ``lr`` is."""
        streak = self.param_groups[0].get("obtuse_streak", 0) + 1 if is_obtuse else 0
        spent = streak > self.obtuse_patience
        for group in self.param_groups:
            group["obtuse_streak"] = 0 if spent else streak
        return spent

    def _skip(self) -> None:
        self.last_angle = None
        self.skipped_steps += 1
        warnings.warn(
            "MoClip: gradient or momentum is not finite, step skipped "
            f"({self.skipped_steps} so far)",
            stacklevel=3,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in AdamW. Raises ConfigError for options a group cannot have."""
        _require_no_variant(param_group)
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        # torch copies and pickles state and groups alone; without its settings a copy cannot step.
        if self._group is not None:
            raise ConfigError("MoClip cannot be copied once its angle is reduced over processes")
        return {name: value for name, value in vars(self).items() if name in _OWN} | (
            super().__getstate__()
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            _require_no_variant(group)
        super().__setstate__(state)  # type: ignore[no-untyped-call]


#: What a copy of a MoClip needs beyond what torch copies.
_OWN = frozenset(
    "max_angle obtuse obtuse_patience angle_scope second_moment atan_a atan_b "
    "last_angle skipped_steps _group _counts".split()
)


def _require(name: str, condition: bool, expected: str, found: object) -> None:
    if not condition:
        raise ConfigError(f"unusable {name}", where="MoClip", expected=expected, found=repr(found))


def _require_usable(param: Tensor, grad: Tensor) -> None:
    if param.dtype not in (torch.float32, torch.float64):
        raise ConfigError(
            "unusable parameter",
            where="MoClip",
            expected="float32 or float64",
            found=param.dtype,
            fix="Give MoClip fp32 masters of the model's weights",
        )
    _require("gradient", grad.layout == torch.strided, "a dense one", grad.layout)


def _require_no_variant(group: dict[str, Any]) -> None:
    for name in ("amsgrad", "maximize", "differentiable"):
        _require(f"option {name} of a group", not group.get(name), "False", group.get(name))
    for name in sorted(_WHOLE_OPTIMIZER & group.keys()):  # the angle is one for all groups
        _require(f"option {name} of a group", False, "it to be given to MoClip", group[name])
