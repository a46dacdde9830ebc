"""What an update rule works on: a model's tensors, where they are over processes, and scalars."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay.optim.momentum_step import Coefficients, OptimizerKernels


@dataclass(frozen=True)
class Piece:
    """A matrix of the model, as far as this process holds it: q, k and v share one parameter.

    Attributes:
        index: its number among the matrices of this pipeline stage, equal on all ranks that hold
            a part of it.
        numel: elements of the whole matrix.
        columns: of the part held here, before a distributed optimizer cuts it.
        ranges: its place in the flattened tensor, half-open, ascending.
        split_dim: the dimension cut over tensor parallel ranks; None where each holds it whole.
    """

    index: int
    numel: int
    columns: int
    ranges: tuple[tuple[int, int], ...]
    split_dim: int | None

    def views(self, tensor: Tensor) -> list[Tensor]:
        """The piece's ranges of a tensor laid out as the parameter is, flat."""
        flat = tensor.view(-1)
        return [flat[start:stop] for start, stop in self.ranges]

    def gather(self, tensor: Tensor) -> Tensor:
        """The part held here, as a matrix [rows, columns]; a copy unless it is contiguous."""
        views = self.views(tensor)
        return (views[0] if len(views) == 1 else torch.cat(views)).view(-1, self.columns)

    def scatter(self, matrix: Tensor, tensor: Tensor) -> None:
        """Write ``matrix`` back to where ``gather`` found it."""
        views = self.views(tensor)
        parts = matrix.reshape(-1).split([len(view) for view in views])
        for view, part in zip(views, parts, strict=True):
            view.copy_(part)


@dataclass(frozen=True)
class Place:
    """What one of an optimizer's tensors is of the model.

    Attributes:
        row: its number among the model's parameters; both copies of a tied weight have one number.
        counts: whether it enters this rank's sums. A tensor that several ranks hold whole (a norm)
            counts on the first of them only, and a tied embedding counts once.
        pieces: its matrices; none for vectors.
        orthogonal: whether AdaMuon and MuonClip orthogonalise it: a matrix inside a layer.
        attention_layer: number of the layer whose attention it belongs to, if any.
    """

    row: int
    counts: bool
    pieces: tuple[Piece, ...]
    orthogonal: bool
    attention_layer: int | None = None


def place_alone(param: Tensor, row: int, *, orthogonal: bool) -> Place:
    """The place of a parameter that is whole, in a model that is on one process."""
    if param.dim() < 2:
        return Place(row, counts=True, pieces=(), orthogonal=False)
    columns = param.numel() // len(param) if len(param) else 1
    piece = Piece(row, param.numel(), columns, ((0, param.numel()),), split_dim=None)
    return Place(row, counts=True, pieces=(piece,), orthogonal=orthogonal and param.dim() == 2)


@dataclass(frozen=True)
class Placement:
    """One model over processes.

    Attributes:
        places: of each tensor in the optimizer's groups.
        model_group: the processes that share one model; with a distributed optimizer, all that
            share its state.
        tensor_group: the processes that share a parameter: TP, or TP x DP if distributed.
        tp_group: the processes that share a matrix.
        num_tensors: parameters of the whole model.
        piece_sizes: elements of each matrix of this stage, by ``Piece.index``.
        num_layers: layers of the whole model.
    """

    places: Mapping[Tensor, Place]
    model_group: dist.ProcessGroup
    tensor_group: dist.ProcessGroup
    tp_group: dist.ProcessGroup
    num_tensors: int
    piece_sizes: tuple[int, ...]
    num_layers: int


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
    def grads(self) -> list[Tensor]:
        """The gradients of the parameters."""
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
        params = [item.param for item in self.items]
        if self.kernels.name != "torch":
            # Autograd does not see what compiled code writes: a backward pass through weights that
            # have changed since its forward pass must fail, as it does after torch's optimizers.
            torch.autograd.graph.increment_version(params)
        copies = [item.copy for item in self.items if copy and item.copy is not None]
        sums = self.kernels.momentum_step(
            params,
            self.grads,
            self.state("exp_avg"),
            self.state("exp_avg_sq"),
            coefficients.pack(params[0]),
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

    def scalars(self) -> dict[str, Tensor]:
        """Numbers for a log, [] each: means over tensors; ratios of norms are the whole model's.

        degrees, cosine, a, b, clipped and obtuse (shares), turned_over_grad_norm |g'| / |g|,
        momentum_over_grad_norm |m| / |g|, and snr = D / (n^2 - D) with D = <m, g> and n = |g|, an
        estimate of |signal|^2 / |noise|^2: the gradients of two batches share only the signal.
        """
        a, b, cos = self.a, self.b, self.cosine
        turned_sq = a**2 * self.grad_sq + 2 * a * b * self.dot + b**2 * self.momentum_sq
        values = {
            "degrees": cos.acos().rad2deg(), "cosine": cos, "a": a, "b": b,
            "clipped": (a != 1) | (b != 0), "obtuse": cos < 0,
        }  # fmt: skip
        dot, momentum_sq, grad_sq = (x.sum() for x in (self.dot, self.momentum_sq, self.grad_sq))
        return {name: value.to(dot.dtype).mean() for name, value in values.items()} | {
            "turned_over_grad_norm": (turned_sq.clamp(min=0).sum() / grad_sq).sqrt(),
            "momentum_over_grad_norm": (momentum_sq / grad_sq).sqrt(),
            "snr": dot / (grad_sq - dot),
        }
