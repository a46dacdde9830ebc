"""A stand-in for ``megatron_replay.kernels._ascend``, whose integers are addresses on the host."""

from __future__ import annotations

import ctypes
import types
from typing import Any

import torch
from torch import Tensor

from megatron_replay.kernels import ascend_selection
from megatron_replay.kernels.ascend_head import DTYPES
from megatron_replay.selection.shard_selection import (
    BLOCK,
    TORCH_SELECTION,
    SelectionBackend,
    ShardTokens,
    token_masses,
)

_BACKEND = ascend_selection.backend


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


def select_candidates(stream: int, blocks: int, dtype: int, /, *numbers: int) -> None:
    logits, largest, maxima, sums, rows, size, stride, lanes = numbers
    assert stream
    reach = (rows - 1) * stride + size
    logits_TV = _tensor(logits, DTYPES[dtype], reach).as_strided((rows, size), (stride, 1)).float()
    blocks_TV = torch.nn.functional.pad(logits_TV, (0, -size % BLOCK), value=-torch.inf)
    maxima_TB = blocks_TV.unflatten(1, (-1, BLOCK)).amax(2)
    columns = -(-maxima_TB.shape[1] // 16) * 16
    _tensor(maxima, torch.float32, rows, columns)[:, : maxima_TB.shape[1]] = maxima_TB
    masses_TV = token_masses(logits_TV, _tensor(largest, torch.float32, rows))
    sums_T2L = torch.zeros(rows, 2, lanes, dtype=torch.int64)
    for part, values_TV in enumerate((masses_TV // 2**19, masses_TV % 2**19)):
        sums_T2L[:, part].index_add_(1, torch.arange(size) % lanes, values_TV)
    _tensor(sums, torch.int32, rows, 2, lanes).copy_(sums_T2L)


def compared_selection() -> SelectionBackend:
    """``ascend_selection.backend()``, whose tokens and masses must have the bits of torch's."""
    ascend = _BACKEND()

    def shard_tokens(*operands: Any, **options: Any) -> ShardTokens:
        found = ascend.shard_tokens(*operands, **options)
        expected = TORCH_SELECTION.shard_tokens(*operands, **options)
        assert all(map(torch.equal, found, expected)), "selection differs from torch's"
        print("selection: the bits of torch")
        return found

    return SelectionBackend(ascend.row_maxima, shard_tokens)


def module() -> types.ModuleType:
    """To be put into ``sys.modules``."""
    made = types.ModuleType("megatron_replay.kernels._ascend")
    vars(made).update(
        vector_cores=lambda _: 40,
        gather_dot=gather_dot,
        segment_axpy=segment_axpy,
        select_candidates=select_candidates,
    )
    return made
