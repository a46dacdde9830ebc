"""Inputs for the operators of NPUs, and their results: those of ``loss.pairs`` in float64, those
of candidate selection by torch.

Shapes: T positions, V rows of the weight, H channels, P pairs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_replay.kernels.ascend_selection import backend
from megatron_replay.selection.shard_selection import TORCH_SELECTION


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


def on_cores(module: Any, *counts: int) -> Any:
    """``module`` as on devices of ``counts`` vector cores, in turn."""
    turns = itertools.cycle(counts)
    return SimpleNamespace(
        vector_cores=lambda _: next(turns),
        gather_dot=module.gather_dot,
        segment_axpy=module.segment_axpy,
        select_candidates=module.select_candidates,
    )


def run(case: Case, operators: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(z, gradient of the hidden states, main_grad after its gradient was added)."""
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


def require_right(found: tuple[Tensor, ...], case: Case) -> None:
    """Within 1e-6 of the largest number: operands of 16 bits are exact in float64 as well."""
    for one, exact in zip(found, expected(case), strict=True):
        assert one.shape == exact.shape
        assert not exact.numel() or ((one - exact).abs() <= 1e-6 * exact.abs().max()).all()


def require_same_selection(logits_TV: Tensor, module: Any) -> None:
    """The bits of torch, with maxima found, and given by another shard."""
    for max_T in (None, logits_TV.float().amax(1) + 3):
        options = {"vocab_start": 7, "count": 5}
        found = backend(module).shard_tokens(logits_TV, max_T, **options)
        expected = TORCH_SELECTION.shard_tokens(logits_TV, max_T, **options)
        assert all(map(torch.equal, found, expected))
