"""What an update rule works on: scalars of the whole model, and parameters that step alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_replay.optim.momentum_step import Coefficients, OptimizerKernels
from megatron_replay.optim.placement import Place


@dataclass(frozen=True)
class Scalars:
    """What a step computes over the whole model: tensors on the device.

    Attributes:
        proceed: [] bool; False where a gradient is not finite, so that nothing may change.
        grad_sq: |g|^2 before clipping, [].
        clip: factor that brings |g| to the clipping norm, [].
        sums: (<m, g>, |m|^2, |g|^2) with the clipped g, [3] or [tensors, 3]; for a rule that does
            not read the angle (|g|^2), [1].
    """

    proceed: Tensor
    grad_sq: Tensor
    clip: Tensor
    sums: Tensor

    def if_proceeding(self, value: float | Tensor) -> Tensor:
        """``value``, or 0 in a step that is skipped; a number in the sums' precision."""
        if not isinstance(value, Tensor):
            value = self.grad_sq.new_full((), value)
        return torch.where(self.proceed, value, 0.0)


@dataclass(frozen=True)
class Item:
    """One parameter in a step; ``copy`` is the model's bf16 weight, which follows it."""

    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    place: Place
    copy: Tensor | None


@dataclass(frozen=True)
class Batch:
    """Parameters that take the same step: of one group, one count of steps, one kind of kernel."""

    group: dict[str, Any]
    step: int
    kernels: OptimizerKernels
    items: list[Item]

    @property
    def params(self) -> list[Tensor]:
        """The parameters."""
        return [item.param for item in self.items]

    @property
    def grads(self) -> list[Tensor]:
        """Their gradients."""
        return [item.grad for item in self.items]

    def state(self, key: str) -> list[Tensor]:
        """One of the states of each parameter."""
        return [item.state[key] for item in self.items]

    def only(self, keep: Callable[[Place], Any]) -> Batch:
        """The parameters with a place for which ``keep`` holds."""
        return dataclasses.replace(self, items=[item for item in self.items if keep(item.place)])

    def rows(self, values: Tensor) -> Tensor:
        """The entries of [tensors] that belong to these parameters; [] belongs to all."""
        return values if values.dim() == 0 else values[[item.place.row for item in self.items]]

    def settings(self, scalars: Scalars) -> dict[str, Any]:
        """The scalars that every rule's coefficients depend on."""
        return {
            "step": self.step,
            "lr": self.group["lr"],
            "beta1": self.group["betas"][0],
            "beta2": self.group["betas"][1],
            "weight_decay": self.group["weight_decay"],
            "clip": scalars.clip,
            "proceed": scalars.proceed,
        }

    def take_step(
        self,
        coefficients: Coefficients,
        *,
        bounded: bool = False,
        copy: bool = True,
        share: Tensor | None = None,
    ) -> Tensor:
        """``momentum_step`` on these parameters; the sum of (share u)^2 over what counts here: [].

        Args:
            share: what a rule has multiplied the learning rate by, [] or one for each parameter.
        """
        if not self.items:
            return torch.zeros(())
        if self.kernels.name != "torch":
            # Autograd does not see what compiled code writes: a backward pass through weights that
            # have changed since its forward pass must fail, as it does after torch's optimizers.
            torch.autograd.graph.increment_version(self.params)
        copies = [item.copy for item in self.items if copy and item.copy is not None]
        sums = self.kernels.momentum_step(
            self.params,
            self.grads,
            self.state("exp_avg"),
            self.state("exp_avg_sq"),
            coefficients.pack(self.params[0]),
            bounded=bounded,
            copies=copies or None,
        )
        if share is not None:
            sums = sums * share**2
        counts = [i for i, item in enumerate(self.items) if item.place.counts]
        return sums[counts].sum() if len(counts) < len(sums) else sums.sum()

    def write_copies(self) -> None:
        """Write the parameters to their bf16 copies, where ``take_step`` did not."""
        for item in self.items:
            if item.copy is not None:
                item.copy.copy_(item.param)


def cosine(dot: Tensor, momentum_sq: Tensor, grad_sq: Tensor) -> Tensor:
    """cos phi = <m, g> / (|m| |g|), elementwise; 1 where momentum or gradient is zero."""
    defined = (momentum_sq > 0) & (grad_sq > 0)
    # Two roots: the product of the squares leaves fp32's range where that of the norms does not.
    norms = momentum_sq.sqrt() * grad_sq.sqrt()
    return torch.where(defined, dot / norms, 1.0).clamp(-1.0, 1.0)


@dataclass(frozen=True)
class Angle:
    """The angle phi between momentum and gradient in a step: tensors on the device.

    Attributes:
        dot, momentum_sq, grad_sq: <m, g>, |m|^2 and |g|^2 of m before the step and the clipped g,
            [] or [tensors].
        a, b: what the gradient became, g' = a g + b m.
    """

    dot: Tensor
    momentum_sq: Tensor
    grad_sq: Tensor
    a: Tensor
    b: Tensor

    @property
    def cosine(self) -> Tensor:
        """cos phi; 1 where there is no angle, as in the first step."""
        return cosine(self.dot, self.momentum_sq, self.grad_sq)

    @property
    def clipped(self) -> Tensor:
        """Whether the gradient was turned."""
        return (self.a != 1) | (self.b != 0)

    def scalars(self) -> dict[str, Tensor]:
        """Numbers for a log, [] each: means over tensors; ratios of norms are the whole model's.

        degrees, cosine, a, b, clipped and obtuse (shares), turned_over_grad_norm |g'| / |g|,
        momentum_over_grad_norm |m| / |g|, and snr = D / (n^2 - D) with D = <m, g> and n = |g|, an
        estimate of |signal|^2 / |noise|^2: the gradients of two batches share only the signal.
        """
        dot, momentum_sq, grad_sq = (x.sum() for x in (self.dot, self.momentum_sq, self.grad_sq))
        turned_sq = (
            self.a**2 * self.grad_sq + 2 * self.a * self.b * self.dot + self.b**2 * self.momentum_sq
        )
        cos = self.cosine
        values = {
            "degrees": cos.acos().rad2deg(), "cosine": cos, "a": self.a, "b": self.b,
            "clipped": self.clipped, "obtuse": cos < 0,
        }  # fmt: skip
        return {name: value.to(dot.dtype).mean() for name, value in values.items()} | {
            "turned_over_grad_norm": (turned_sq.clamp(min=0).sum() / grad_sq).sqrt(),
            "momentum_over_grad_norm": (momentum_sq / grad_sq).sqrt(),
            "snr": dot / (grad_sq - dot),
        }
