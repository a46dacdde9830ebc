"""The optimizer's two passes for CUDA, in Triton: ``optim.momentum_step``'s functions.

A pass is one launch over all tensors. A table holds each tensor's size and addresses, a list of
tasks the tensor and slot of each program: programs take stretches of tensors, and each writes its
sums to a slot of its own. One ``sum`` over a tensor's slots follows: no atomics, so equal input
gives equal bits. Nothing is read back from the device.

fp32, contiguous, of any alignment, all on one device. Memory bounds both passes: 8 bytes a
parameter, then 28, and 2 for the bf16 copy. Compiled for sm_90 and run in Triton's interpreter on
a CPU; not run on a GPU yet.
"""

# Triton compiles Python syntax whose types mypy cannot check.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_replay.errors import ConfigError

#: Elements a program holds at once. To keep an H100's 3.35 TB/s busy over a latency of some 700 ns,
#: each of its 132 multiprocessors needs 18 KB under way; a program loads 8 KB (pass 1) or 16 KB
#: (pass 2), eight elements of each array a thread, and several programs fit.
BLOCK, WARPS = 1024, 4
#: Blocks a program takes one after the other: its task and its sums cost next to nothing, while
#: 100 M parameters still go round the device several times, which evens out its end.
STEPS = 16
#: Most slots, so most programs, of one tensor; programs of a larger one take more steps.
SLOTS = 4096

#: Size and addresses of each tensor.
Rows = tuple[tuple[int, ...], ...]


def dot_products(exp_avgs: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """(<m, g>, |m|^2, |g|^2) of each pair: [tensors, 3], fp32. Raises ConfigError: ``_rows``."""
    return _launch(_dots, _rows(grads, exp_avgs), grads[0].device, sums=3)


def square_sums(grads: Sequence[Tensor]) -> Tensor:
    """|g|^2 of each: [tensors], fp32. Raises ConfigError: ``_rows``."""
    return _launch(_dots, _rows(grads), grads[0].device, sums=1)[:, 0]


def momentum_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    coefficients: Tensor,
    *,
    bounded: bool,
    copies: Sequence[Tensor] | None = None,
) -> Tensor:
    """``optim.momentum_step``: the step in place, sum of u^2 of each tensor: [tensors], fp32.

    Where a step does not proceed nothing is read or written. Raises ConfigError: ``_rows``.
    """
    rows = _rows(params, grads, exp_avgs, exp_avg_sqs, copies=copies)
    packed = coefficients.to(torch.float32).contiguous()
    assert packed.shape in ((10,), (len(rows), 10)), packed.shape
    stride = 10 if packed.dim() == 2 else 0
    options = {"BOUNDED": bounded, "COPIES": copies is not None, "STRIDE": stride}
    return _launch(_step, rows, params[0].device, packed, sums=1, **options)[:, 0]


def _rows(*parts: Sequence[Tensor], copies: Sequence[Tensor] | None = None) -> Rows:
    """The table's rows: size, and address in each of ``parts`` and ``copies``.

    Raises:
        ConfigError: a tensor of another size or device than the first part's, not contiguous, or
            not fp32 (bf16 in ``copies``): the kernels see addresses only.
    """
    sizes, device = [tensor.numel() for tensor in parts[0]], parts[0][0].device
    columns = [sizes]
    for part in parts if copies is None else (*parts, copies):
        dtype = torch.bfloat16 if part is copies else torch.float32
        for tensor, size in zip(part, sizes, strict=True):
            same = tensor.dtype is dtype and tensor.device == device and tensor.numel() == size
            if not (same and tensor.is_contiguous()):
                raise ConfigError(
                    "unusable tensor",
                    where="the optimizer's triton kernels",
                    expected=f"{size} contiguous elements of {dtype} on {device}",
                    found=f"{tensor.numel()} of {tensor.dtype} on {tensor.device}, "
                    f"strides {tensor.stride()}",
                    fix='Choose "auto" or "torch"',
                )
        columns.append([tensor.data_ptr() for tensor in part])
    return tuple(zip(*columns, strict=True))


def _launch(
    kernel: Any, rows: Rows, device: torch.device, *arguments: Tensor, sums: int, **options: Any
) -> Tensor:
    """Run ``kernel`` over ``rows``; what its programs summed, [tensors, sums]."""
    backend = torch.get_device_module(device)
    stream = backend.current_stream(device)
    # With the stream as a key, what one stream copies or drops is never another's.
    table, aligned = _table(rows, device, stream)
    tasks, steps, slots = _tasks(tuple(row[0] for row in rows), device, stream)
    partial = torch.zeros(len(rows), slots, sums, dtype=torch.float32, device=device)
    with backend.stream(stream):  # and on its device, which need not be the current one
        kernel[(len(tasks),)](
            table,
            tasks,
            partial,
            *arguments,
            steps,
            slots,
            COLUMNS=len(rows[0]),
            SUMS=sums,
            ALIGNED=aligned,
            BLOCK=BLOCK,
            num_warps=WARPS,
            **options,
        )
    return partial.sum(1)


@lru_cache(maxsize=16)
def _table(rows: Rows, device: torch.device, stream: Hashable) -> tuple[Tensor, bool]:
    """The rows, and whether all in them is a multiple of 16, so that threads may load 16 bytes."""
    aligned = all(word % 16 == 0 for row in rows for word in row)
    return _on_device(rows, torch.int64, device), aligned


@lru_cache(maxsize=8)
def _tasks(
    sizes: tuple[int, ...], device: torch.device, stream: Hashable
) -> tuple[Tensor, int, int]:
    """(tensor, slot) of each program, [programs, 2]; steps of a program; slots of a tensor."""
    blocks = [triton.cdiv(size, BLOCK) for size in sizes]
    steps = max(STEPS, triton.cdiv(max(blocks), SLOTS))
    slots = [triton.cdiv(count, steps) for count in blocks]
    tasks = [(tensor, slot) for tensor, count in enumerate(slots) for slot in range(count)]
    return _on_device(tasks, torch.int32, device), steps, max(slots)


def _on_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    # From pinned memory, because the host waits for a copy from any other.
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


@triton.jit
def _stretch(
    table, tasks, steps, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """This program's tensor, its slot, its row of the table, first element and length."""
    task = tasks + 2 * tl.program_id(0)
    tensor, slot = tl.load(task), tl.load(task + 1)
    row = table + tensor * COLUMNS
    first = slot.to(tl.int64) * steps * BLOCK
    length = tl.minimum(tl.load(row) - first, steps * BLOCK).to(tl.int32)
    if ALIGNED:
        length = tl.multiple_of(length, 16)
    return tensor, slot, row, first, length


@triton.jit
def _pointer(row, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + column).to(tl.pointer_type(dtype))
    if ALIGNED:  # four elements at once: 16 bytes in fp32, 8 in bf16
        pointer = tl.multiple_of(pointer, dtype.primitive_bitwidth // 2)
    return pointer


@triton.jit(do_not_specialize=["steps", "slots"])
def _dots(
    table,
    tasks,
    partial,
    steps,
    slots,
    COLUMNS: tl.constexpr,
    SUMS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pass 1: <m, g>, |m|^2, |g|^2 of a stretch, or with one sum |g|^2."""
    tensor, slot, row, first, length = _stretch(table, tasks, steps, COLUMNS, ALIGNED, BLOCK)
    grad = _pointer(row, 1, tl.float32, ALIGNED) + first
    grad_sq = tl.zeros([BLOCK], tl.float32)
    if SUMS == 3:
        exp_avg = _pointer(row, 2, tl.float32, ALIGNED) + first
        product = tl.zeros([BLOCK], tl.float32)
        exp_avg_sq = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        g = tl.load(grad + at, mask=at < length, other=0.0)
        grad_sq += g * g
        if SUMS == 3:
            m = tl.load(exp_avg + at, mask=at < length, other=0.0)
            product += m * g
            exp_avg_sq += m * m
    out = partial + (tensor * slots + slot) * SUMS
    tl.store(out + SUMS - 1, tl.sum(grad_sq))
    if SUMS == 3:
        tl.store(out, tl.sum(product))
        tl.store(out + 1, tl.sum(exp_avg_sq))


@triton.jit(do_not_specialize=["steps", "slots"])
def _step(
    table,
    tasks,
    partial,
    coefficients,
    steps,
    slots,
    COLUMNS: tl.constexpr,
    SUMS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    BOUNDED: tl.constexpr,
    COPIES: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Pass 2: the step on a stretch, and its sum of u^2."""
    tensor, slot, row, first, length = _stretch(table, tasks, steps, COLUMNS, ALIGNED, BLOCK)
    param = _pointer(row, 1, tl.float32, ALIGNED) + first
    grad = _pointer(row, 2, tl.float32, ALIGNED) + first
    exp_avg = _pointer(row, 3, tl.float32, ALIGNED) + first
    exp_avg_sq = _pointer(row, 4, tl.float32, ALIGNED) + first
    if COPIES:
        copy = _pointer(row, 5, tl.bfloat16, ALIGNED) + first
    given = coefficients + tensor * STRIDE  # in the order of Coefficients' fields
    # Where the step does not proceed there are no elements: nothing is read, written or summed.
    length = tl.where(tl.load(given) != 0, length, 0)
    keep_m, take_g = tl.load(given + 1), tl.load(given + 2)
    clip = tl.load(given + 3)
    keep_v, take_v = tl.load(given + 4), tl.load(given + 5)
    scale_v, eps = tl.load(given + 6), tl.load(given + 7)
    decay, move = tl.load(given + 8), tl.load(given + 9)
    update_sq = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < length
        p = tl.load(param + at, mask=inside, other=0.0)
        g = tl.load(grad + at, mask=inside, other=0.0)
        m = tl.load(exp_avg + at, mask=inside, other=0.0)
        v = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
        clipped = clip * g
        m = keep_m * m + take_g * g
        v = keep_v * v + take_v * (clipped * clipped)
        # Triton's plain root and quotient are approximate, and the root takes denormals for 0.
        root = scale_v * tl.sqrt_rn(v)
        if BOUNDED:
            u = _atan2(m, root)
        else:
            u = tl.div_rn(m, root + eps)
        p = decay * p - move * u
        tl.store(param + at, p, mask=inside)
        tl.store(exp_avg + at, m, mask=inside)
        tl.store(exp_avg_sq + at, v, mask=inside)
        if COPIES:
            tl.store(copy + at, p.to(tl.bfloat16), mask=inside)
        update_sq += tl.where(inside, u * u, 0.0)  # outside, 0 / 0 where eps is 0
    tl.store(partial + tensor * slots + slot, tl.sum(update_sq))


@triton.jit
def _atan2(y, x):
    """atan2(y, x) for x >= 0, within 1.8 ulp; csrc/cpu/atan2.h explains it.

    libdevice's takes denormals for 0, and the interpreter cannot call it.
    """
    a = tl.abs(y)
    steep = a > x
    larger = tl.where(steep, a, x)
    smaller = tl.where(steep, x, a)
    # 0/0 is 0 and inf/inf is 1; NaN stays, for it equals nothing.
    q = tl.where(smaller == larger, tl.where(larger > 0, 1.0, 0.0), tl.div_rn(smaller, larger))
    s = q * q
    series = 0.002920693216
    series = series * s - 0.01636793205
    series = series * s + 0.0432118676
    series = series * s - 0.07552214878
    series = series * s + 0.1066600493
    series = series * s - 0.1421105538
    series = series * s + 0.1999377284
    series = series * s - 0.3333315274
    flat = series * s * q + q
    angle = tl.where(steep, (1.57079637 - flat) - 4.37113883e-8, flat)
    return tl.where(y < 0, -angle, angle)
