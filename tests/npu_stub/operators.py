"""A stand-in for ``megatron_replay.kernels._ascend``, whose integers are addresses on the host."""

from __future__ import annotations

import ctypes
import types

import torch
from torch import Tensor

from megatron_replay.kernels.ascend.operators import DTYPES


def _tensor(address: int, dtype: torch.dtype, *shape: int) -> Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    buffer = (ctypes.c_char * size).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype).view(shape)


def _owners(offsets: Tensor) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())


def gather_dot(stream: int, blocks: int, dtype: int, /, *numbers: int) -> None:
    hidden, weight, ids, offsets, z, tokens, rows, pairs, channels = numbers
    assert stream
    hidden_TH = _tensor(hidden, DTYPES[dtype], tokens, channels).float()
    weight_PH = _tensor(weight, DTYPES[dtype], rows, channels)[_tensor(ids, torch.int32, pairs)]
    owner = _owners(_tensor(offsets, torch.int32, tokens + 1))
    _tensor(z, torch.float32, pairs).copy_((hidden_TH[owner] * weight_PH.float()).sum(1))


def segment_axpy(stream: int, blocks: int, dtype: int, /, *numbers: int) -> None:
    (
        source,
        indices,
        coefficients,
        offsets,
        rows,
        out,
        inputs,
        outputs,
        segments,
        pairs,
        channels,
    ) = numbers
    assert stream
    source_PH = _tensor(source, DTYPES[dtype], inputs, channels)[
        _tensor(indices, torch.int32, pairs)
    ].float()
    row = _owners(_tensor(offsets, torch.int32, segments + 1))
    if rows:
        row = _tensor(rows, torch.int32, segments)[row]
    move = source_PH * _tensor(coefficients, torch.float32, pairs)[:, None]
    _tensor(out, torch.float32, outputs, channels).index_add_(0, row, move)


def module() -> types.ModuleType:
    """To be put into ``sys.modules``."""
    made = types.ModuleType("megatron_replay.kernels._ascend")
    made.__dict__.update(
        vector_cores=lambda device: 40, gather_dot=gather_dot, segment_axpy=segment_axpy
    )
    return made
