"""Where an optimizer's tensors are in the model: what its sums, thresholds and matrices need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


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
        sizes = [stop - start for start, stop in self.ranges]
        for view, part in zip(self.views(tensor), matrix.reshape(-1).split(sizes), strict=True):
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


def place_alone(param: Tensor, row: int, *, orthogonal: bool) -> Place:
    """The place of a parameter that is whole, in a model that is on one process."""
    if param.dim() < 2:
        return Place(row, counts=True, pieces=(), orthogonal=False)
    columns = param.numel() // len(param) if len(param) else 1
    piece = Piece(row, param.numel(), columns, ((0, param.numel()),), split_dim=None)
    return Place(row, counts=True, pieces=(piece,), orthogonal=orthogonal and param.dim() == 2)
