"""Candidate selection for CUDA, in Triton: ``selection.shard_selection``'s functions, bit for bit.

A program takes a row: it finds the maxima of blocks of 64 ids, and sums masses, in one pass over
memory where the row's maximum is known, else in two, the second over what the L2 cache still has.
The first tokens are then found in few blocks, by torch. Integers are summed and nothing is fused
(``enable_fp_fusion``), so the bits are those of every other backend.

fp32, bf16 or fp16 logits. Compiled for sm_90 and run in Triton's interpreter on a CPU; not run on a
GPU yet.

Shapes: T positions, V ids of this rank's shard, B blocks of ids.
"""

# Triton compiles Python syntax whose types mypy cannot check.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_replay.kernels.triton_head import launch
from megatron_replay.selection.shard_selection import (
    BLOCK,
    LOG2_E,
    LOWEST,
    MASS_BITS,
    POLYNOMIAL,
    SelectionBackend,
    ShardTokens,
    first_tokens,
    row_maxima,
)

#: Blocks a program holds at once: eight logits a thread, 32 or 16 bytes.
BLOCKS, WARPS = 64, 16
#: Steps whose masses are summed in 32 bits: at most 2^22 units of 2^16 each.
STEPS = 256
#: Tokens of chosen blocks in one step; temporaries take 40 bytes for each, 160 MiB.
CHUNK_ENTRIES = 1 << 22

_LOG2_E, _LOWEST = tl.constexpr(LOG2_E), tl.constexpr(LOWEST)
_C5, _C4, _C3, _C2, _C1 = (tl.constexpr(c) for c in POLYNOMIAL)
#: Added to a number below 2^22: the last bits are the number's, rounded, and 38.
_SHIFT = tl.constexpr(1.5 * 2.0**23 + MASS_BITS)
#: The same without 38, and in units of 2^16 for numbers up to 2^38; their bits.
_UNITS, _UNITS_BITS = tl.constexpr(1.5 * 2.0**23), tl.constexpr(0x4B400000)
_HIGH_UNITS, _HIGH_UNITS_BITS = tl.constexpr(1.5 * 2.0**39), tl.constexpr(0x53400000)


def shard_tokens(
    logits_TV: Tensor, max_T: Tensor | None, *, vocab_start: int, count: int
) -> ShardTokens:
    """As ``selection.shard_selection``'s."""
    if logits_TV.stride(1) != 1:
        logits_TV = logits_TV.contiguous()
    T, V = logits_TV.shape
    device = logits_TV.device
    maxima_TB = torch.empty(T, triton.cdiv(V, BLOCK), dtype=torch.float32, device=device)
    total_T = torch.empty(T, dtype=torch.int64, device=device)
    given = max_T is not None
    max_T = max_T.contiguous() if max_T is not None else torch.empty(T, device=device)
    assert (max_T.dtype, max_T.shape) == (torch.float32, (T,))
    if T:
        launch(
            _rows,
            (T,),
            logits_TV,
            maxima_TB,
            max_T,
            total_T,
            V,
            logits_TV.stride(0),
            GIVEN=given,
            BLOCK=BLOCK,
            BLOCKS=BLOCKS,
            STEPS=STEPS,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    rows = max(1, CHUNK_ENTRIES // (count * BLOCK))
    tokens = [
        first_tokens(logits, maxima, vocab_start, count)
        for logits, maxima in zip(logits_TV.split(rows), maxima_TB.split(rows), strict=True)
    ]
    return ShardTokens(max_T, total_T, *map(torch.cat, zip(*tokens, strict=True)))


@triton.jit
def _rows(
    logits,
    block_maxima,
    maxima,
    totals,
    size,
    logits_row,
    GIVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The row's block maxima and mass; its maximum as well unless it is given."""
    t = tl.program_id(0).to(tl.int64)
    row = logits + t * logits_row
    num_blocks = tl.cdiv(size, BLOCK)
    out = block_maxima + t * num_blocks
    blocks = tl.arange(0, BLOCKS)
    within = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if GIVEN:
        largest = tl.load(maxima + t)
    else:
        found = tl.full([BLOCKS], float("-inf"), tl.float32)
        for start in range(0, num_blocks, BLOCKS):
            at = start * BLOCK + within
            z = tl.load(row + at, mask=at < size, other=float("-inf")).to(tl.float32)
            # Triton's maxima drop NaN: it counts as +inf, which is refused as well.
            block_max = tl.max(tl.where(z == z, z, float("inf")), 1)
            tl.store(out + start + blocks, block_max, mask=start + blocks < num_blocks)
            found = tl.maximum(found, block_max)
        largest = tl.max(found)
        tl.store(maxima + t, largest)
    total = tl.zeros([BLOCKS, BLOCK], tl.int64)
    for first in range(0, num_blocks, BLOCKS * STEPS):
        low = tl.zeros([BLOCKS, BLOCK], tl.int32)
        high = tl.zeros([BLOCKS, BLOCK], tl.int32)
        for start in range(first, tl.minimum(num_blocks, first + BLOCKS * STEPS), BLOCKS):
            at = start * BLOCK + within
            z = tl.load(row + at, mask=at < size, other=float("-inf")).to(tl.float32)
            if GIVEN:
                block_max = tl.max(z, 1)
                tl.store(out + start + blocks, block_max, mask=start + blocks < num_blocks)
            y = _mass(z, largest)
            upper = y + _HIGH_UNITS
            high += upper.to(tl.int32, bitcast=True) - _HIGH_UNITS_BITS
            lower = (y - (upper - _HIGH_UNITS)) + _UNITS  # the difference is exact, at most 2^15
            low += lower.to(tl.int32, bitcast=True) - _UNITS_BITS
        total += high.to(tl.int64) * 65536 + low
    tl.store(totals + t, tl.sum(tl.sum(total, 1), 0))


@triton.jit
def _mass(z, largest):
    """``selection.shard_selection.token_masses``, before it rounds to units."""
    t = tl.maximum(z - largest, _LOWEST) * _LOG2_E
    k = t + _SHIFT
    f = t - (k - _SHIFT)
    square = f * f
    p = ((f * _C5 + _C4) * square + (f * _C3 + _C2)) * square + (f * _C1 + 1.0)
    # k's last bits are those of the integer; an exponent is 23 bits up.
    power = k.to(tl.int32, bitcast=True) << 23
    return (p.to(tl.int32, bitcast=True) + power).to(tl.float32, bitcast=True)


def backend() -> SelectionBackend:
    """The selection of CUDA devices."""
    return SelectionBackend(row_maxima, shard_tokens)
