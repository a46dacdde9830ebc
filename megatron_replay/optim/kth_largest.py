"""Finds the exact k-th largest magnitude of tensors that are sharded over processes.

Magnitudes sort as their bit patterns do, as integers. So the answer is found digit by digit
from the top: a histogram of the next digit over the elements that agree with it so far, summed over
the processes, gives the digit of the k-th largest.

On an accelerator the histogram is a scatter of integers, which an NPU may run on its slow scalar
processor (not run on one).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_DIGIT_BITS = 11
#: Number of bits below the sign, and the integer type of that width.
_PATTERNS = {torch.float32: (31, torch.int32), torch.float64: (63, torch.int64)}


def kth_largest_magnitudes(
    parts: Sequence[Sequence[Tensor]],
    ranks: Sequence[int],
    *,
    group: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """The ``ranks[i]``-th largest |x| (from 1) of tensor i, for all tensors at once: [tensors].

    Communication: one all-reduce of [tensors, 2048] int32 for each of 3 digits (fp64: 6).

    Args:
        parts: the flat pieces of each tensor that this process holds, in one precision; every
            element is held by one process. A tensor that is elsewhere has no pieces here.
        ranks: at most the number of the whole tensor's elements.
        device: where to reduce, for a process without pieces.
    """
    pieces = [piece for tensor in parts for piece in tensor]
    device = pieces[0].device if pieces else device
    dtype = pieces[0].dtype if pieces else torch.float32
    bits, integers = _PATTERNS[dtype]
    found = torch.zeros(len(parts), dtype=integers, device=device)
    wanted = torch.tensor(list(ranks), dtype=torch.int64, device=device)
    while bits > 0:
        width = min(_DIGIT_BITS, bits)
        bits -= width
        counts = torch.zeros(len(parts), 1 << width, dtype=torch.int32, device=device)
        for i, tensor in enumerate(parts):
            for piece in tensor:
                pattern = piece.abs().view(integers)
                digit = (pattern >> bits) & ((1 << width) - 1)
                agrees = (pattern >> (bits + width)) == found[i]
                counts[i] += _histogram(digit, agrees, 1 << width)
        if group is not None:
            dist.all_reduce(counts, group=group)
        # The bins from the top that together do not reach the wanted rank are above the digit.
        reached = counts.flip(1).cumsum(1)
        above = (reached < wanted[:, None]).sum(1)
        passed = torch.where(
            above > 0, reached.gather(1, (above - 1).clamp(min=0)[:, None])[:, 0], 0
        )
        wanted = wanted - passed
        found = (found << width) | ((1 << width) - 1 - above).to(integers)
    return found.view(dtype)


def _histogram(digit: Tensor, agrees: Tensor, bins: int) -> Tensor:
    """How often each digit occurs where it ``agrees``, int32 [bins]; no copy to the host."""
    if digit.is_cpu:
        return torch.bincount(digit[agrees], minlength=bins).int()
    counts = torch.zeros(bins, dtype=torch.int32, device=digit.device)
    return counts.scatter_add_(0, digit.flatten().long(), agrees.flatten().int())
