"""Logits that could part a form of candidate selection from the torch form, in one bit.

Shapes: T positions, V ids of a shard.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_replay.selection.shard_selection import TORCH_SELECTION, SelectionBackend

#: Around every size of a block, and a vocabulary of many blocks.
SIZES = (1, 2, 63, 64, 65, 127, 128, 129, 511, 1000, 4097)
COUNTS = (1, 2, 20, 64, 200, 255)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("gauss", "peaked", "wide", "tied", "equal", "masked", "zeros of both signs", "edges")


@dataclass(frozen=True)
class Case:
    """Arguments of ``shard_tokens``."""

    name: str
    logits_TV: Tensor
    max_T: Tensor | None
    vocab_start: int
    count: int

    def differences(self, kernel: SelectionBackend) -> list[str]:
        """What a form finds otherwise than the torch form."""
        arguments = self.logits_TV, self.max_T
        options = {"vocab_start": self.vocab_start, "count": self.count}
        expected = TORCH_SELECTION.shard_tokens(*arguments, **options)
        found = kernel.shard_tokens(*arguments, **options)
        pairs = list(zip(found._fields, expected, found, strict=True))
        maxima = [form.row_maxima(self.logits_TV) for form in (TORCH_SELECTION, kernel)]
        pairs.append(("row_maxima", *maxima))
        return [f"{self.name}: {name}" for name, one, other in pairs if not same(one, other)]


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def logits(kind: str, T: int, V: int, generator: torch.Generator) -> Tensor:
    values_TV = torch.randn(T, V, generator=generator) * 2
    if kind == "peaked":
        values_TV[:, V // 2] += 20
    elif kind == "wide":  # differences beyond -28, and of every size below
        values_TV *= 40 * torch.rand(T, V, generator=generator) ** 4
    elif kind == "tied":
        values_TV = values_TV.round()
    elif kind == "equal":
        values_TV[:] = -3.25
    elif kind == "masked":
        values_TV[torch.rand(T, V, generator=generator) < 0.97] = -math.inf
        values_TV[:, V // 3] = 1.0
    elif kind == "zeros of both signs":
        values_TV = -values_TV.abs().round()
        values_TV *= torch.where(torch.rand(T, V, generator=generator) < 0.5, 0.0, 1.0)
    elif kind == "edges":  # denormals of every dtype, and what their sizes hide from each other
        numbers = [0.0, -0.0, 1e-45, -1e-41, 3e-8, -6e-8, 1e-5, 6e4, -6e4, 1.0, -27.9, -28.1]
        drawn = torch.randint(len(numbers), (T, V), generator=generator)
        values_TV = torch.tensor(numbers)[drawn]
    return values_TV


def cases(*, T: int = 3, sizes: tuple[int, ...] = SIZES) -> Iterator[Case]:
    """Every kind with every size and dtype; counts and maxima of other shards in turn."""
    generator = torch.Generator().manual_seed(0)
    number = 0
    for kind in KINDS:
        for V in sizes:
            for dtype in DTYPES:
                logits_TV = logits(kind, T, V, generator).to(dtype)
                count = COUNTS[number % len(COUNTS)]
                above = (None, 0.0, 5.5, 13.0, 40.0)[number % 5]
                max_T = None if above is None else logits_TV.float().amax(1) + above
                start = (0, 77, (1 << 24) - V)[number % 3]
                name = f"{kind}, V {V}, {dtype}, count {count}, above {above}, start {start}"
                yield Case(name, logits_TV, max_T, start, count)
                number += 1
