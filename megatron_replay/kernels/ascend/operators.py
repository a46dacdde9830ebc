"""The restricted head's operators for Ascend NPUs (csrc/ascend), on the vector cores.

Shapes: T positions, V rows of the weight (this rank's), H channels, P pairs of a position and a
candidate, S segments, R rows of an output, N rows of a source.

The pairs lie by position (CSR) for z and for the gradient of the hidden states, and by id for that
of the weight (CSC): with ``z = gather_dot(hidden, weight, ids, offsets)`` and dz its gradient,

    segment_axpy_(grad_hidden_TH, weight_VH, ids, dz, offsets)
    segment_axpy_(main_grad_VH, hidden_TH, tokens[order], dz[order], id_offsets, rows=distinct_ids)

where ``order`` sorts the pairs by id, stably. Operands fp16, bf16 or fp32, arithmetic and results
fp32; equal input gives equal bits, for any number of cores. Softmax is left to torch.

The operators see addresses only. Dtypes, sizes and devices are checked here, what ids and offsets
say is not: that would be a device sync, and the data loader knows it.

Compiled and run on an emulated core (tests/ascemu); not run on an NPU yet.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from megatron_replay.errors import ConfigError

WHERE = "the head's ascend kernels"
#: In the order of Dtype in csrc/ascend/common/host.h.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: The longest row that the tests run.
MAX_CHANNELS = 8192


class Operators(Protocol):
    """The compiled module: nothing but integers, a tensor being its address."""

    def vector_cores(self, device: int, /) -> int:
        """Vector cores of a device."""

    def gather_dot(
        self, stream: int, blocks: int, dtype: int, /, *addresses_and_sizes: int
    ) -> None:
        """Puts csrc/ascend/gather_dot into a stream."""

    def segment_axpy(
        self, stream: int, blocks: int, dtype: int, /, *addresses_and_sizes: int
    ) -> None:
        """Puts csrc/ascend/segment_axpy into a stream."""


@functools.cache
def load() -> Operators:
    """The module compiled for NPUs.

    Raises:
        ConfigError: it was not built, or CANN's libraries are not found.
    """
    try:
        return cast(Operators, importlib.import_module("megatron_replay.kernels._ascend"))
    except ImportError as error:
        raise ConfigError(
            "the compiled operators cannot be loaded",
            where=WHERE,
            found=error,
            fix="Source CANN's set_env.sh, and build them: pip install -e . --no-build-isolation "
            "(csrc/ascend/README.md)",
        ) from error


def gather_dot(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    ids: Tensor,
    offsets: Tensor,
    *,
    blocks: int | None = None,
    operators: Operators | None = None,
) -> Tensor:
    """z[p] = <hidden[t], weight[ids[p]]> for the pairs offsets[t] <= p < offsets[t + 1].

    Args:
        hidden_TH: [T, H], fp16, bf16 or fp32.
        weight_VH: [V, H], of the same dtype.
        ids: int32 [P], rows of the weight; not checked.
        offsets: int32 [T + 1], from 0 to P, ascending; not checked.
        blocks: cores to use; None for all.
        operators: the compiled module; None for that for NPUs.

    Returns:
        fp32 [P].

    Raises:
        ConfigError: a tensor of another dtype, shape or device, or not contiguous; no module.
    """
    tokens, channels = _operands("hidden", hidden_TH, "weight", weight_VH)
    pairs = ids.numel()
    _check("ids", ids, torch.int32, (pairs,), hidden_TH)
    _check("offsets", offsets, torch.int32, (tokens + 1,), hidden_TH)
    z = torch.empty(pairs, dtype=torch.float32, device=hidden_TH.device)
    if pairs == 0:
        return z
    launcher = _Launcher(hidden_TH, blocks, operators)
    sizes = (tokens, weight_VH.shape[0], pairs, channels)
    launcher("gather_dot", (hidden_TH, weight_VH, ids, offsets, z), sizes)
    return z


def segment_axpy_(
    out_RH: Tensor,
    source_NH: Tensor,
    indices: Tensor,
    coefficients: Tensor,
    offsets: Tensor,
    *,
    rows: Tensor | None = None,
    blocks: int | None = None,
    operators: Operators | None = None,
) -> Tensor:
    """out[rows[s]] += sum of coefficients[p] * source[indices[p]] over the pairs of segment s.

    In place and in the order of the pairs, offsets[s] <= p < offsets[s + 1]. A segment without
    pairs leaves its row untouched.

    Args:
        out_RH: fp32 [R, H].
        source_NH: [N, H], fp16, bf16 or fp32.
        indices: int32 [P], rows of the source; not checked.
        coefficients: fp32 [P].
        offsets: int32 [S + 1], from 0 to P, ascending; not checked.
        rows: int32 [S], rows of ``out_RH``, none twice; not checked. None for 0 to R - 1 (S = R).
        blocks: cores to use; None for all.
        operators: the compiled module; None for that for NPUs.

    Returns:
        ``out_RH``.

    Raises:
        ConfigError: a tensor of another dtype, shape or device, or not contiguous; no module.
    """
    _, channels = _operands("source", source_NH)
    outputs, pairs = len(out_RH), indices.numel()
    segments = outputs if rows is None else rows.numel()
    _check("out", out_RH, torch.float32, (outputs, channels), source_NH)
    _check("indices", indices, torch.int32, (pairs,), source_NH)
    _check("coefficients", coefficients, torch.float32, (pairs,), source_NH)
    _check("offsets", offsets, torch.int32, (segments + 1,), source_NH)
    if rows is not None:
        _check("rows", rows, torch.int32, (segments,), source_NH)
    if pairs == 0:
        return out_RH
    launcher = _Launcher(source_NH, blocks, operators)
    tensors = (source_NH, indices, coefficients, offsets, rows, out_RH)
    launcher("segment_axpy", tensors, (len(source_NH), outputs, segments, pairs, channels))
    return out_RH


@dataclass(frozen=True)
class PairOperators:
    """``loss.pairs.PairOperators`` on NPUs; operands that are not contiguous are copied.

    Attributes:
        operators: the compiled module.
        blocks: cores to use; None for all.
    """

    operators: Operators
    blocks: int | None = None

    def gather_dot(
        self, hidden_NH: Tensor, weight_VH: Tensor, ids: Tensor, offsets: Tensor, /
    ) -> Tensor:
        """As the function above."""
        operands = hidden_NH.contiguous(), weight_VH.contiguous(), ids, offsets
        return gather_dot(*operands, blocks=self.blocks, operators=self.operators)

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
        """As the function above."""
        operands = source_MH.contiguous(), indices, coefficients, offsets
        return segment_axpy_(
            out_RH, *operands, rows=rows, blocks=self.blocks, operators=self.operators
        )


class _Launcher:
    """Puts operators into the current stream of the device of a tensor."""

    def __init__(self, like: Tensor, blocks: int | None, operators: Operators | None) -> None:
        # Any other module than ours for NPUs is an emulated one, and takes what it is given.
        if operators is None and like.device.type != "npu":
            raise ConfigError(
                "the tensors are elsewhere", where=WHERE, expected="an NPU", found=like.device
            )
        self.operators = load() if operators is None else operators
        self.like = like
        self.blocks = blocks or self.operators.vector_cores(like.device.index or 0)

    def __call__(
        self, name: str, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...]
    ) -> None:
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        dtype = DTYPES.index(self.like.dtype)
        stream, device = 0, contextlib.nullcontext()
        if self.like.device.type == "npu":
            backend = torch.get_device_module(self.like.device)
            # Asking for the address waits until torch_npu has launched what is queued on the host.
            stream = backend.current_stream(self.like.device).npu_stream
            device = backend.device(self.like.device)
        with device:
            getattr(self.operators, name)(stream, self.blocks, dtype, *addresses, *sizes)


def _operands(
    name: str, first: Tensor, other: str = "", second: Tensor | None = None
) -> tuple[int, int]:
    """Rows and channels of the first of one or two operands, which are checked."""
    if first.dtype not in DTYPES or first.dim() != 2 or not 1 <= first.shape[1] <= MAX_CHANNELS:
        raise ConfigError(
            f"unusable {name}",
            where=WHERE,
            expected=f"rows of 1 to {MAX_CHANNELS} channels, of {', '.join(map(str, DTYPES))}",
            found=f"{first.dtype} {list(first.shape)}",
        )
    rows, channels = first.shape
    _check(name, first, first.dtype, (rows, channels), first)
    if second is not None:
        _check(other, second, first.dtype, (second.shape[0], channels), first)
    return rows, channels


def _check(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], like: Tensor
) -> None:
    """That the operators can take it, who see its address only."""
    found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
    if not tensor.is_contiguous():
        found += f" with strides {tensor.stride()}"
    elif max(tensor.shape, default=0) >= 2**31:
        found += ", too long for 32 bits"
    elif tensor.dtype is dtype and tuple(tensor.shape) == shape and tensor.device == like.device:
        return
    expected = f"contiguous {dtype} {list(shape)} on {like.device}"
    raise ConfigError(f"unusable {name}", where=WHERE, expected=expected, found=found)
