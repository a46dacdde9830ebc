"""A stand-in for ``megatron_replay.kernels._ascend``, whose integers are addresses on the host."""

from __future__ import annotations

import ctypes
import types

import torch
from torch import Tensor

from megatron_replay.kernels.ascend_head import DTYPES


def _tensor(address: int, dtype: torch.dtype, *shape: int) -> Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    buffer = (ctypes.c_char * size).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype).view(shape)


def _owners(offsets: int, count: int) -> Tensor:
    """The segment of each pair."""
    return torch.arange(count).repeat_interleave(_tensor(offsets, torch.int32, count + 1).diff())


def gather_dot(stream: int, blocks: int, dtype: int, /, *numbers: int) -> None:
    hidden, weight, ids, offsets, z, tokens, rows, pairs, channels = numbers
    assert stream
    hidden_TH = _tensor(hidden, DTYPES[dtype], tokens, channels).float()
    weight_VH = _tensor(weight, DTYPES[dtype], rows, channels).float()
    products_PH = hidden_TH[_owners(offsets, tokens)] * weight_VH[_tensor(ids, torch.int32, pairs)]
    _tensor(z, torch.float32, pairs).copy_(products_PH.sum(1))


def segment_axpy(stream: int, blocks: int, dtype: int, /, *numbers: int) -> None:
    source, indices, coefficients, offsets, rows, out, inputs, outputs, segments = numbers[:9]
    pairs, channels = numbers[9:]
    assert stream
    source_NH = _tensor(source, DTYPES[dtype], inputs, channels).float()
    row_P = _owners(offsets, segments)
    if rows:
        row_P = _tensor(rows, torch.int32, segments)[row_P]
    move_PH = source_NH[_tensor(indices, torch.int32, pairs)]
    move_PH *= _tensor(coefficients, torch.float32, pairs)[:, None]
    _tensor(out, torch.float32, outputs, channels).index_add_(0, row_P, move_PH)


def module() -> types.ModuleType:
    """To be put into ``sys.modules``."""
    made = types.ModuleType("megatron_replay.kernels._ascend")
    vars(made).update(vector_cores=lambda _: 40, gather_dot=gather_dot, segment_axpy=segment_axpy)
    return made
