"""The restricted head's operators for Ascend NPUs (csrc/ascend), on the vector cores.

Shapes: T positions, V rows of the weight (this rank's), H channels, P pairs of a position and a
candidate, S segments, R rows of an output, N rows of a source.

The pairs are ordered by position (CSR) for z and for the gradient of the hidden states, and by id
for that of the weight (CSC). With ``z = gather_dot(hidden, weight, ids, offsets)`` and its gradient
dz,

    segment_axpy_(grad_hidden_TH, weight_VH, ids, dz, offsets)
    segment_axpy_(main_grad_VH, hidden_TH, tokens[order], dz[order], id_offsets, rows=distinct_ids)

where ``order`` sorts the pairs by id, stably. Operands fp16, bf16 or fp32, arithmetic and results
fp32; equal input gives equal bits, for any number of cores. Softmax is left to torch.

The operators receive addresses. Dtypes, sizes and devices are checked here; the values of ids and
offsets are not, because that needs a device sync, and the data loader has checked them.

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
    """The compiled module. All arguments are integers; a tensor is its address."""

    def vector_cores(self, device: int, /) -> int:
        """Vector cores of a device."""

    def gather_dot(
        self, stream: int, blocks: int, dtype: int, /, *addresses_and_sizes: int
    ) -> None:
        """Launches csrc/ascend/gather_dot in a stream."""

    def segment_axpy(
        self, stream: int, blocks: int, dtype: int, /, *addresses_and_sizes: int
    ) -> None:
        """Launches csrc/ascend/segment_axpy in a stream."""


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


@dataclass(frozen=True)
class PairOperators:
    """``loss.pairs.PairOperators`` on NPUs; operands that are not contiguous are copied.

    The methods raise ConfigError for a tensor of another dtype, shape or device.

    Attributes:
        module: an emulated module, for tensors on a CPU; None for the one compiled for NPUs.
        blocks: cores to use; None for all.
    """

    module: Operators | None = None
    blocks: int | None = None

    def gather_dot(
        self, hidden_TH: Tensor, weight_VH: Tensor, ids: Tensor, offsets: Tensor, /
    ) -> Tensor:
        """z[p] = <hidden[t], weight[ids[p]]> for the pairs offsets[t] <= p < offsets[t + 1].

        Args:
            hidden_TH: [T, H], fp16, bf16 or fp32.
            weight_VH: [V, H], of the same dtype.
            ids: int32 [P], rows of the weight; not checked.
            offsets: int32 [T + 1], from 0 to P, ascending; not checked.

        Returns:
            fp32 [P].
        """
        hidden_TH, weight_VH = hidden_TH.contiguous(), weight_VH.contiguous()
        tokens, channels = _operands("hidden", hidden_TH, "weight", weight_VH)
        pairs = ids.numel()
        _check("ids", ids, torch.int32, (pairs,), hidden_TH)
        _check("offsets", offsets, torch.int32, (tokens + 1,), hidden_TH)
        z = torch.empty(pairs, dtype=torch.float32, device=hidden_TH.device)
        sizes = (tokens, len(weight_VH), pairs, channels)
        if pairs:
            self._launch("gather_dot", (hidden_TH, weight_VH, ids, offsets, z), sizes)
        return z

    def segment_axpy_(
        self,
        out_RH: Tensor,
        source_NH: Tensor,
        indices: Tensor,
        coefficients: Tensor,
        offsets: Tensor,
        /,
        *,
        rows: Tensor | None = None,
    ) -> Tensor:
        """out[rows[s]] += sum of coefficients[p] * source[indices[p]] over the pairs of segment s.

        In place and in the order of the pairs, offsets[s] <= p < offsets[s + 1]. A segment without
        pairs leaves its row untouched.

        Args:
            out_RH: fp32 [R, H], contiguous.
            source_NH: [N, H], fp16, bf16 or fp32.
            indices: int32 [P], rows of the source; not checked.
            coefficients: fp32 [P].
            offsets: int32 [S + 1], from 0 to P, ascending; not checked.
            rows: int32 [S], distinct rows of ``out_RH``; not checked. None for 0 to R - 1 (S = R).

        Returns:
            ``out_RH``.
        """
        source_NH = source_NH.contiguous()
        _, channels = _operands("source", source_NH)
        outputs, pairs = len(out_RH), indices.numel()
        segments = outputs if rows is None else rows.numel()
        _check("out", out_RH, torch.float32, (outputs, channels), source_NH)
        _check("indices", indices, torch.int32, (pairs,), source_NH)
        _check("coefficients", coefficients, torch.float32, (pairs,), source_NH)
        _check("offsets", offsets, torch.int32, (segments + 1,), source_NH)
        if rows is not None:
            _check("rows", rows, torch.int32, (segments,), source_NH)
        tensors = (source_NH, indices, coefficients, offsets, rows, out_RH)
        sizes = (len(source_NH), outputs, segments, pairs, channels)
        if pairs:
            self._launch("segment_axpy", tensors, sizes)
        return out_RH

    def _launch(
        self, name: str, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...]
    ) -> None:
        """Put an operator into the current stream of the device of the first tensor."""
        like = tensors[0]
        assert like is not None
        is_npu = like.device.type == "npu"
        if self.module is None and not is_npu:
            raise ConfigError(
                "the tensors are elsewhere", where=WHERE, expected="an NPU", found=like.device
            )
        module = load() if self.module is None else self.module
        blocks = self.blocks or module.vector_cores(like.device.index or 0)
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        stream, device = 0, contextlib.nullcontext()
        if is_npu:
            backend = torch.get_device_module(like.device)
            # Reading the address waits until torch_npu has launched what is queued on the host.
            stream = backend.current_stream(like.device).npu_stream
            device = backend.device(like.device)
        with device:
            dtype = DTYPES.index(like.dtype)
            getattr(module, name)(stream, blocks, dtype, *addresses, *sizes)


def _operands(
    name: str, first: Tensor, other: str = "", second: Tensor | None = None
) -> tuple[int, int]:
    """Check one or two operands; return rows and channels of the first."""
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
