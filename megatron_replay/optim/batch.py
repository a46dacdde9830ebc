"""What an update rule works on: the whole model's scalars, and parameters that step alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_replay.optim.momentum_step import Coefficients, OptimizerKernels
from megatron_replay.optim.placement import Place


@dataclass(frozen=True)
class Scalars:
    """What a step knows of the whole model; tensors on the device.

    Attributes:
        proceed: [] bool; False where a gradient is not finite, and nothing may move.
        grad_sq: |g|^2 before clipping, [].
        clip: factor that brings |g| to the clipping norm, [].
        sums: (<m, g>, |m|^2, |g|^2) of the clipped g, [3] or [tensors, 3]; for a rule that does
            not look at the angle (|g|^2), [1].
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


@dataclass
class Batch:
    """Parameters that take the same step: one group, one count of steps, one kind of kernel."""

    group: dict[str, Any]
    step: int
    kernels: OptimizerKernels
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    copies: list[Tensor] | None = None

    def state(self, key: str) -> list[Tensor]:
        """One of the states of each parameter."""
        return [state[key] for state in self.states]

    def rows(self, values: Tensor) -> Tensor:
        """The entries of [tensors] that are these parameters'; [] is everybody's."""
        return values if values.dim() == 0 else values[[place.row for place in self.places]]

    def take_step(self, coefficients: Coefficients, *, bounded: bool, copy: bool = True) -> Tensor:
        """``optim.momentum_step`` on these parameters: the sum of u^2 of each."""
        if self.kernels.name != "torch":
            # Autograd does not see what compiled code writes: a backward pass through weights that
            # have moved since its forward pass must fail, as it does after torch's optimizers.
            torch.autograd.graph.increment_version(self.params)
        return self.kernels.momentum_step(
            self.params,
            self.grads,
            self.state("exp_avg"),
            self.state("exp_avg_sq"),
            coefficients.pack(self.params[0]),
            bounded=bounded,
            copies=self.copies if copy else None,
        )

    def write_copies(self) -> None:
        """Write the parameters to their bf16 copies, where a step did not."""
        for param, copy in zip(self.params, self.copies or (), strict=self.copies is not None):
            copy.copy_(param)

    def only(self, keep: Callable[[Place], bool]) -> Batch:
        """The parameters whose place is as asked."""
        chosen = [i for i, place in enumerate(self.places) if keep(place)]
        return Batch(
            self.group,
            self.step,
            self.kernels,
            [self.params[i] for i in chosen],
            [self.grads[i] for i in chosen],
            [self.states[i] for i in chosen],
            [self.places[i] for i in chosen],
            [self.copies[i] for i in chosen] if self.copies is not None else None,
        )
