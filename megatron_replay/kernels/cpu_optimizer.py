"""The optimizer's two passes compiled for the CPU (csrc/cpu): ``optim.momentum_step``'s
functions, each one parallel region over all tensors, in one pass over memory.

fp32, contiguous, and of any alignment. A result has the same bits for any number of threads, which
is ``torch.get_num_threads()``. Importing this fails where the module was not built.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_replay.errors import ConfigError
from megatron_replay.kernels import _cpu


def why_not(tensor: Tensor, dtype: torch.dtype = torch.float32) -> str | None:
    """What keeps these kernels from ``tensor``; None where nothing does."""
    if not tensor.is_cpu:
        return f"a tensor on {tensor.device}"
    if tensor.dtype is not dtype:
        return f"a tensor of {tensor.dtype}"
    return None if tensor.is_contiguous() else "a tensor that is not contiguous"


def dot_products(exp_avgs: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """(<m, g>, |m|^2, |g|^2) of each pair: [tensors, 3], fp64. Raises ConfigError: ``why_not``."""
    sizes = [grad.numel() for grad in grads]
    sums = torch.empty(len(sizes), 3, dtype=torch.float64)
    _cpu.dot_products(
        _pointers("exp_avgs", exp_avgs, sizes),
        _pointers("grads", grads, sizes),
        sizes,
        sums.data_ptr(),
        torch.get_num_threads(),
    )
    return sums


def square_sums(grads: Sequence[Tensor]) -> Tensor:
    """|g|^2 of each: [tensors], fp64. Raises ConfigError: ``why_not``."""
    sizes = [grad.numel() for grad in grads]
    sums = torch.empty(len(sizes), dtype=torch.float64)
    pointers = _pointers("grads", grads, sizes)
    _cpu.square_sums(pointers, sizes, sums.data_ptr(), torch.get_num_threads())
    return sums


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
    """``optim.momentum_step``: the step in place, sum of u^2 of each tensor: [tensors], fp64.

    Where a step does not proceed nothing is read or written. Raises ConfigError: ``why_not``.
    """
    sizes = [param.numel() for param in params]
    sums = torch.empty(len(sizes), dtype=torch.float64)
    packed = coefficients.to(torch.float32).contiguous()
    assert packed.is_cpu
    assert packed.shape in ((10,), (len(sizes), 10)), packed.shape
    _cpu.momentum_step(
        _pointers("params", params, sizes),
        _pointers("grads", grads, sizes),
        _pointers("exp_avgs", exp_avgs, sizes),
        _pointers("exp_avg_sqs", exp_avg_sqs, sizes),
        [] if copies is None else _pointers("copies", copies, sizes, torch.bfloat16),
        sizes,
        packed.data_ptr(),
        packed.shape[-1],
        packed.dim() - 1,
        bounded,
        sums.data_ptr(),
        torch.get_num_threads(),
    )
    return sums


def _pointers(
    name: str, tensors: Sequence[Tensor], sizes: list[int], dtype: torch.dtype = torch.float32
) -> list[int]:
    """Where the compiled code finds them; it checks nothing itself."""
    assert [tensor.numel() for tensor in tensors] == sizes, f"{name}: other sizes than the first"
    for tensor in tensors:
        if found := why_not(tensor, dtype):
            raise ConfigError(
                f"unusable {name}",
                where="the optimizer's cpu kernels",
                expected=f"contiguous tensors of {dtype} on the CPU",
                found=found,
                fix='Use "auto" or "torch"',
            )
    return [tensor.data_ptr() for tensor in tensors]
