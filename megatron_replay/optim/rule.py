"""The loop that all update rules share.

    1. One pass over the gradients (and momenta) sums their squares and products.
    2. One all-reduce makes these the whole model's; the norm, the clipping and the angle follow.
    3. One pass updates the weights.
    4. One read of the device: was the gradient finite?

A rule implements ``_update``, step 3. Gradients are never rewritten: clipping is a factor there.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

from megatron_replay.optim.batch import Angle, Batch, Place, Scalars
from megatron_replay.optim.groups import CheckedAdamW


class UpdateRule(CheckedAdamW):
    """Base of the update rules: ``torch.optim.AdamW``'s groups, state keys and checkpoints.

    A step whose gradient is not finite changes nothing, warns, and counts in ``skipped_steps``.

    Args:
        params, lr, betas, eps, weight_decay: as in AdamW, also for each group.
        clip_grad: norm at which the whole gradient is clipped; 0: never.
        backend: of the two passes (``momentum_step.OPTIMIZER``); "auto": the device's fastest.
        angle_scope: one angle for the whole "model", or one for each "tensor" (rules that read it).

    Attributes:
        grad_norm: norm of the last step's gradient before clipping; None before the first step.
        last_angle: that the last step read; None before the first and after a skipped step.
        skipped_steps: number of steps that were skipped.

    Raises:
        ConfigError: a setting that cannot work; in ``step``, a parameter that is not fp32 or fp64
            (a step of 1e-6 is lost in bf16: use fp32 masters) or has a sparse gradient.
        ValueError: a setting that AdamW refuses as well, or that is infinite in float32.
    """

    #: Whether pass 1 also needs the products with the momentum.
    reads_angle: ClassVar[bool] = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        clip_grad: float = 0.0,
        backend: str = "auto",
        angle_scope: str = "model",
    ) -> None:
        scopes = ("model", "tensor") if self.reads_angle else ("model",)
        self._require("clip_grad", 0 <= clip_grad < math.inf, "a norm from 0", clip_grad)
        self._require("angle_scope", angle_scope in scopes, ", ".join(scopes), angle_scope)
        self.clip_grad, self.backend, self.angle_scope = clip_grad, backend, angle_scope
        self.grad_norm: float | None = None
        self.last_angle: Angle | None = None
        self.skipped_steps = 0
        #: Numbers that a rule carries from step to step on the device, saved with the groups.
        self._memory: dict[str, Tensor] = {}
        self._update_sq: Tensor | None = None
        self._counted_numel: float | None = None
        super().__init__(params, lr, betas, eps, weight_decay)

    @_disable_dynamo  # torch.compile(optimizer.step) leaves our compiled kernels alone
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Communication: one all-reduce over the model's processes, if any, of three fp32 numbers (one
        if the rule does not read the angle; three for each tensor in the scope "tensor"), and what
        the rule's own docstring adds. One read of the device, after all work is queued.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches = self._batches()
        # A process without gradients still takes part in the collectives of the others.
        if not batches and self._placement is None:
            return loss
        scalars = self._scalars(self._reduced(self._sums(*self._counted_sums(batches))))
        parts = self._update(batches, scalars)
        zero = torch.zeros_like(scalars.grad_sq)
        self._update_sq = torch.stack([*(part.to(zero) for part in parts), zero]).sum()
        self._finish(batches, scalars)
        return loss

    def _update(self, batches: Sequence[Batch], scalars: Scalars) -> list[Tensor]:
        """Update every weight; the sums of (change / lr)^2 over what counts here, each []."""
        raise NotImplementedError

    def _counted_sums(self, batches: Sequence[Batch]) -> tuple[Tensor, list[Place]]:
        """Pass 1, of each tensor that counts here: (<m, g>, |m|^2, |g|^2) or (|g|^2)."""
        # Megatron gives every rank the same list of groups: on some ranks the first may be empty.
        device = next(p.device for group in self.param_groups for p in group["params"])
        rows = [torch.zeros(0, 3 if self.reads_angle else 1, device=device)]
        places = []
        for batch in batches:
            counted = batch.only(lambda place: place.counts)
            if not counted.items:  # a rank may hold only copies that other ranks count
                continue
            if self.reads_angle:
                rows.append(counted.kernels.dot_products(counted.state("exp_avg"), counted.grads))
            else:
                rows.append(counted.kernels.square_sums(counted.grads)[:, None])
            places += [item.place for item in counted.items]
        return torch.cat([row.to(device) for row in rows]), places

    def _sums(self, values: Tensor, places: Sequence[Place]) -> Tensor:
        """This process's part of the sums to reduce: [3] or [1], or [tensors, 3]."""
        if self.angle_scope == "model":
            return values.sum(0)
        tensors = self._placement.num_tensors if self._placement else len(places)
        sums = values.new_zeros(tensors, values.shape[1])
        sums[[place.row for place in places]] = values
        return sums

    def _reduced(self, sums: Tensor) -> Tensor:
        """The whole model's sums. One all-reduce in fp32 (HCCL has no fp64) over its processes."""
        if self._placement is not None:
            sums = sums.float()
            dist.all_reduce(sums, group=self._placement.model_group)
        return sums

    def _scalars(self, sums: Tensor) -> Scalars:
        grad_sq = sums[..., -1].sum()
        clip = torch.ones_like(grad_sq)
        if self.clip_grad:
            # Megatron's 1e-6 keeps a zero gradient from dividing by zero.
            clip = (self.clip_grad / (grad_sq.sqrt() + 1e-6)).clamp(max=1.0)
        proceed = torch.isfinite(sums).all()
        if self.reads_angle:
            dot, momentum_sq, clipped_sq = sums.unbind(-1)
            sums = torch.stack([dot * clip, momentum_sq, clipped_sq * clip * clip], dim=-1)
        return Scalars(proceed, grad_sq, clip, sums)

    def _finish(self, batches: Sequence[Batch], scalars: Scalars) -> None:
        """Read, at once, whether the step proceeded, the norm and the rule's memory."""
        read = [scalars.proceed, scalars.grad_sq, *self._memory.values()]
        numbers = torch.stack([x.to(scalars.grad_sq.dtype) for x in read])
        proceeded, grad_sq, *remembered = numbers.tolist()
        self.grad_norm = math.sqrt(grad_sq) if grad_sq >= 0 else math.nan
        if proceeded:
            for item in (item for batch in batches for item in batch.items):
                # Not in place: megatron-core loads one tensor for all.
                item.state["step"] = item.state["step"] + 1
            for group in self.param_groups:
                group.update(zip(self._memory, remembered, strict=True))
            return
        self.last_angle, self._update_sq = None, None
        self.skipped_steps += 1
        if self._placement is None:
            warnings.warn(
                f"{type(self).__name__}: gradient or momentum is not finite, step skipped "
                f"({self.skipped_steps} so far)",
                stacklevel=3,
            )

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """The last step in numbers, for a log; {} after a skipped one.

        Communication: one all-reduce of one fp32 over the model's processes, all of which must call
        it (and one more at the first call). One read of the device.

        Returns:
            grad_norm, clipped_grad_norm, update_rms_over_lr (root mean square over the model's
            parameters), and ``Angle.scalars`` for the rules that read the angle.
        """
        if self._update_sq is None or self.grad_norm is None:
            return {}
        if self._counted_numel is None:
            params = [(p, g) for g in self.param_groups for p in g["params"]]
            numel = sum(p.numel() for p, g in params if self._place(p, g, 0).counts)
            self._counted_numel = self._reduced(self._update_sq.new_tensor([numel])).item()
        total = self._reduced(self._update_sq.reshape(1))[0]
        scalars = {"update_rms_over_lr": (total / self._counted_numel).sqrt()}
        if self.last_angle is not None:
            scalars |= self.last_angle.scalars()
        values = torch.stack([x.to(total.dtype) for x in scalars.values()]).tolist()
        norm = self.grad_norm
        clipped = min(norm, self.clip_grad) if self.clip_grad else norm
        numbers = dict(zip(scalars, values, strict=True))
        return {"grad_norm": norm, "clipped_grad_norm": clipped, **numbers}
