"""Inputs for the operators, and the expected results in float64, from the definition.

Shapes: T positions, V rows of the weight, H channels, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_replay.kernels import ascend_operators as ascend


@dataclass(frozen=True)
class Case:
    """Pairs of positions and candidates, by position and by id."""

    hidden_TH: Tensor
    weight_VH: Tensor
    ids: Tensor
    offsets: Tensor
    dz: Tensor

    @property
    def tokens(self) -> Tensor:
        """The position of each pair."""
        counts = self.offsets.diff().long()
        return torch.arange(len(counts), dtype=torch.int32).repeat_interleave(counts)

    def by_id(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(order, tokens, offsets, rows): the pairs sorted by id, a segment a distinct id."""
        order = torch.argsort(self.ids, stable=True)
        rows, counts = torch.unique(self.ids, return_counts=True)
        offsets = torch.zeros(len(rows) + 1, dtype=torch.int32)
        offsets[1:] = counts.cumsum(0)
        return order, self.tokens[order], offsets, rows

    def to(self, dtype: torch.dtype) -> Case:
        hidden, weight = self.hidden_TH.to(dtype), self.weight_VH.to(dtype)
        return replace(self, hidden_TH=hidden, weight_VH=weight)


def make(sizes: list[int], vocabulary: int, channels: int, seed: int = 0) -> Case:
    """A case whose position t has ``sizes[t]`` candidates, the first and last ids among them."""
    generator = torch.Generator().manual_seed(seed)
    sets = []
    for size in sizes:
        ids = torch.randperm(vocabulary, generator=generator)[:size]
        if size >= 2:
            others = ids[(ids != 0) & (ids != vocabulary - 1)][: size - 2]
            ids = torch.cat(
                [torch.tensor([0]), others.sort().values, torch.tensor([vocabulary - 1])]
            )
        sets.append(ids.int())
    offsets = torch.tensor([0, *sizes]).cumsum(0).int()
    return Case(
        torch.randn(len(sizes), channels, generator=generator),
        torch.randn(vocabulary, channels, generator=generator),
        torch.cat([torch.empty(0, dtype=torch.int32), *sets]),
        offsets,
        torch.randn(sum(sizes), generator=generator),
    )


#: main_grad before the call: not zero, so that a test sees rows that must not change.
FOUND = 0.5


def run(case: Case, blocks: int, module: ascend.Operators) -> tuple[Tensor, Tensor, Tensor]:
    """(z, gradient of the hidden states, main_grad after its gradient was added)."""
    operators = ascend.PairOperators(module, blocks)
    z = operators.gather_dot(case.hidden_TH, case.weight_VH, case.ids, case.offsets)
    grad_hidden = torch.zeros(case.hidden_TH.shape)
    operators.segment_axpy_(grad_hidden, case.weight_VH, case.ids, case.dz, case.offsets)
    order, tokens, offsets, rows = case.by_id()
    main_grad = torch.full(case.weight_VH.shape, FOUND)
    operators.segment_axpy_(main_grad, case.hidden_TH, tokens, case.dz[order], offsets, rows=rows)
    return z, grad_hidden, main_grad


def expected(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """The same in float64, through the dense [T, V] matrix of dz."""
    hidden, weight = case.hidden_TH.double(), case.weight_VH.double()
    tokens, ids = case.tokens.long(), case.ids.long()
    z = (hidden @ weight.T)[tokens, ids]
    dense = torch.zeros(len(hidden), len(weight), dtype=torch.float64)
    dense[tokens, ids] = case.dz.double()
    return z, dense @ weight, FOUND + dense.T @ hidden


def error(found: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the largest magnitude; infinite if not finite."""
    if reference.numel() == 0:
        return 0.0
    difference = (found.double() - reference).abs().max().nan_to_num(nan=torch.inf)
    return (difference / reference.abs().max().clamp(min=1e-30)).item()
