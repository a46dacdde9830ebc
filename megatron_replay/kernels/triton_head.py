"""The restricted head for CUDA, in Triton: the two operators of ``loss.pairs``, with its shapes.

A program takes some pairs of one position, or those of one segment and a block of channels, and
writes what no other does: no atomics, so equal input gives equal bits. Operands fp16, bf16 or fp32,
in any strides; products and sums fp32. Indices are not checked: that would be a device sync.

The shared sets of document scope use every product: they are left to torch, in fp32.

Compiled for sm_90 and run in Triton's interpreter on a CPU; not run on a GPU yet.
"""

# Triton compiles Python syntax whose types mypy cannot check.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_replay.loss.backends import HeadBackend
from megatron_replay.loss.pairs import pair_backend

#: A program is one warp, which waits for no other: 16 bytes a thread are 256 channels of a row, in
#: 16 bits, and eight rows are under way. Four programs share a position's pairs.
DOT = {"PAIRS": 8, "CHANNELS": 256, "num_warps": 1}
STRIPES = 4
#: Pairs come one after the other, so that their order is fixed; the loads of eight do not wait for
#: one another. Two warps with 16 bytes a thread.
AXPY = {"PAIRS": 8, "CHANNELS": 512, "num_warps": 2}


def gather_dot(hidden_NH: Tensor, weight_VH: Tensor, ids: Tensor, offsets: Tensor, /) -> Tensor:
    """z[p] = <hidden[n], weight[ids[p]]> of every pair: fp32 [P]."""
    N, H = hidden_NH.shape
    assert weight_VH.shape[1] == H
    assert offsets.shape == (N + 1,)
    assert ids.is_contiguous()
    assert offsets.is_contiguous()
    z = torch.empty(len(ids), dtype=torch.float32, device=ids.device)
    if N and len(ids):
        strides = (*hidden_NH.stride(), *weight_VH.stride())
        launch(_dots, (N, STRIPES), hidden_NH, weight_VH, ids, offsets, z, H, *strides, **DOT)
    return z


def segment_axpy_(
    out_RH: Tensor,
    source_MH: Tensor,
    indices: Tensor,
    coefficients: Tensor,
    offsets: Tensor,
    /,
    *,
    rows: Tensor | None = None,
) -> Tensor:
    """out[rows[s]] += sum of coefficients[p] * source[indices[p]], in place."""
    S, H = len(offsets) - 1, out_RH.shape[1]
    assert source_MH.shape[1] == H
    assert out_RH.dtype is torch.float32
    assert coefficients.shape == indices.shape
    assert rows is None or (rows.shape == (S,) and rows.is_contiguous())
    assert all(part.is_contiguous() for part in (indices, coefficients, offsets))
    if S and len(indices):
        operands = (out_RH, source_MH, indices, coefficients, offsets, rows)
        strides = (*out_RH.stride(), *source_MH.stride())
        grid = (S, triton.cdiv(H, AXPY["CHANNELS"]))
        launch(_axpys, grid, *operands, H, *strides, **AXPY)
    return out_RH


def backend() -> HeadBackend:
    """The head of CUDA devices."""
    return pair_backend(gather_dot, segment_axpy_)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Put ``kernel`` into the stream of its first argument, whose device need not be current."""
    device = arguments[0].device
    cuda = torch.get_device_module(device)
    with cuda.stream(cuda.current_stream(device)):
        kernel[grid](*arguments, **options)


@triton.jit
def _dots(
    hidden,
    weight,
    ids,
    offsets,
    z,
    channels,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    PAIRS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Blocks of one position's pairs, each over all channels and folded once at its end."""
    position = tl.program_id(0).to(tl.int64)
    first = tl.load(offsets + position).to(tl.int64)
    size = (tl.load(offsets + position + 1) - first).to(tl.int32)
    hidden += position * hidden_row
    stripe = tl.program_id(1) * PAIRS
    for start in range(stripe, size, tl.num_programs(1) * PAIRS):
        pair = start + tl.arange(0, PAIRS)
        id = tl.load(ids + first + pair, mask=pair < size, other=0).to(tl.int64)
        row = weight + (id * weight_row)[:, None]
        products = tl.zeros([PAIRS, CHANNELS], tl.float32)
        for begin in range(0, channels, CHANNELS):
            channel = begin + tl.arange(0, CHANNELS)
            inside = channel < channels
            channel = channel.to(tl.int64)
            h = tl.load(hidden + channel * hidden_column, mask=inside, other=0.0)
            real = (pair < size)[:, None] & inside[None, :]
            w = tl.load(row + (channel * weight_column)[None, :], mask=real, other=0.0)
            products += h.to(tl.float32)[None, :] * w.to(tl.float32)
        tl.store(z + first + pair, tl.sum(products, axis=1), mask=pair < size)


@triton.jit
def _axpys(
    out,
    source,
    indices,
    coefficients,
    offsets,
    rows,
    channels,
    out_row,
    out_column,
    source_row,
    source_column,
    PAIRS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One segment and one block of channels."""
    segment = tl.program_id(0)
    first = tl.load(offsets + segment).to(tl.int64)
    size = (tl.load(offsets + segment + 1) - first).to(tl.int32)
    if size == 0:
        return
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    channel = channel.to(tl.int64)
    source += channel * source_column
    total = tl.zeros([CHANNELS], tl.float32)
    for start in range(0, size, PAIRS):
        for step in tl.static_range(PAIRS):
            pair = start + step
            real = pair < size
            index = tl.load(indices + first + pair, mask=real, other=0).to(tl.int64)
            factor = tl.load(coefficients + first + pair, mask=real, other=0.0)
            x = tl.load(source + index * source_row, mask=real & inside, other=0.0)
            total += factor * x.to(tl.float32)
    row = segment
    if rows is not None:
        row = tl.load(rows + segment)
    at = out + row.to(tl.int64) * out_row + channel * out_column
    tl.store(at, tl.load(at, mask=inside, other=0.0) + total, mask=inside)
