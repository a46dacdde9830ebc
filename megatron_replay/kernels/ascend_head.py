"""The restricted head on Ascend NPUs: the two operators of ``loss.pairs`` on the vector cores.

The operators (csrc/ascend) take fp16, bf16 or fp32, and compute in fp32; equal input gives equal
bits, for any number of cores. They receive addresses: dtypes, sizes and devices are checked here.
Shared sets are dense products, which are for the cube units, through torch.

Run on an emulated core (tests/ascemu); not run on an NPU yet. Shapes as in ``loss.pairs``.
"""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_replay.errors import ConfigError
from megatron_replay.loss.backends import HeadBackend
from megatron_replay.loss.pairs import pair_backend

WHERE = "the ascend kernels"
#: In the order of Dtype in csrc/ascend/common/host.h.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: The longest row that the tests run.
MAX_CHANNELS = 8192


def backend() -> HeadBackend:
    """The head of NPUs."""
    operators = PairOperators()
    return pair_backend(operators.gather_dot, operators.segment_axpy_)


@dataclass(frozen=True)
class PairOperators:
    """The operators on NPUs; operands that are not contiguous are copied.

    The methods raise ConfigError for a tensor of another dtype, shape or device.

    Attributes:
        module: an emulated module, for tensors on a CPU; None for the one compiled for NPUs,
            csrc/ascend/bindings.cpp. All arguments are integers, a tensor its address.
    """

    module: Any = None

    def gather_dot(
        self, hidden_NH: Tensor, weight_VH: Tensor, ids: Tensor, offsets: Tensor, /
    ) -> Tensor:
        """z[p] = <hidden[n], weight[ids[p]]> of every pair: fp32 [P]."""
        hidden_NH, weight_VH = hidden_NH.contiguous(), weight_VH.contiguous()
        channels = _channels("hidden", hidden_NH)
        positions, rows, pairs = len(hidden_NH), len(weight_VH), ids.numel()
        check("weight", weight_VH, hidden_NH.dtype, (rows, channels), hidden_NH)
        check("ids", ids, torch.int32, (pairs,), hidden_NH)
        check("offsets", offsets, torch.int32, (positions + 1,), hidden_NH)
        z = torch.empty(pairs, dtype=torch.float32, device=hidden_NH.device)
        sizes = (positions, rows, pairs, channels)
        if pairs:
            launch(self.module, "gather_dot", hidden_NH, weight_VH, ids, offsets, z, sizes=sizes)
        return z

    def segment_axpy_(
        self,
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
        source_MH = source_MH.contiguous()
        channels = _channels("source", source_MH)
        outputs, pairs = len(out_RH), indices.numel()
        segments = outputs if rows is None else rows.numel()
        check("out", out_RH, torch.float32, (outputs, channels), source_MH)
        check("indices", indices, torch.int32, (pairs,), source_MH)
        check("coefficients", coefficients, torch.float32, (pairs,), source_MH)
        check("offsets", offsets, torch.int32, (segments + 1,), source_MH)
        if rows is not None:
            check("rows", rows, torch.int32, (segments,), source_MH)
        tensors = (source_MH, indices, coefficients, offsets, rows, out_RH)
        sizes = (len(source_MH), outputs, segments, pairs, channels)
        if pairs:
            launch(self.module, "segment_axpy", *tensors, sizes=sizes)
        return out_RH


def launch(module: Any, name: str, *tensors: Tensor | None, sizes: tuple[int, ...]) -> None:
    """Put an operator into the current stream of the device of the first tensor.

    Args:
        module: as ``PairOperators.module``.
        tensors: what the operator takes the addresses of; None is the address 0.

    Raises:
        ConfigError: ``module`` is None, and the tensors are not on an NPU.
    """
    like = tensors[0]
    assert like is not None
    is_npu = like.device.type == "npu"
    if module is None and not is_npu:
        raise ConfigError(
            "the tensors are elsewhere", where=WHERE, expected="an NPU", found=like.device
        )
    module = module or importlib.import_module("megatron_replay.kernels._ascend")
    blocks = module.vector_cores(like.device.index or 0)
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    stream, device = 0, contextlib.nullcontext()
    if is_npu:
        npu = torch.get_device_module(like.device)
        # Reading the address waits until torch_npu has launched what is queued on the host.
        stream = npu.current_stream(like.device).npu_stream
        device = npu.device(like.device)
    with device:
        dtype = DTYPES.index(like.dtype)
        getattr(module, name)(stream, blocks, dtype, *addresses, *sizes)


def _channels(name: str, matrix: Tensor) -> int:
    """Channels of an operand, which is checked."""
    if matrix.dtype not in DTYPES or matrix.dim() != 2 or not 1 <= matrix.shape[1] <= MAX_CHANNELS:
        raise ConfigError(
            f"unusable {name}",
            where=WHERE,
            expected=f"rows of 1 to {MAX_CHANNELS} channels, of {', '.join(map(str, DTYPES))}",
            found=f"{matrix.dtype} {list(matrix.shape)}",
        )
    check(name, matrix, matrix.dtype, tuple(matrix.shape), matrix)
    return matrix.shape[1]


def check(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], like: Tensor
) -> None:
    """Raise ConfigError unless the tensor is what the operators read at its address."""
    found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
    if not tensor.is_contiguous():
        found += f" with strides {tensor.stride()}"
    elif max(tensor.shape, default=0) >= 2**31:
        found += ", too long for 32 bits"
    elif tensor.dtype is dtype and tuple(tensor.shape) == shape and tensor.device == like.device:
        return
    expected = f"contiguous {dtype} {list(shape)} on {like.device}"
    raise ConfigError(f"unusable {name}", where=WHERE, expected=expected, found=found)
