"""Attention on Ascend NPUs, by torch_npu's fused operator: as in ``kernels.packed_attention``.

The packs are concatenated, T = B * S positions, and cut where documents end (layout TND); padding
is a document, so that the ends reach T. The operator computes the causal half of each document, and
the queries of a group share their keys and values.

Compared with a stand-in for the operator (tests/kernels/test_attention.py); not run on an NPU yet.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_replay.errors import ConfigError
from megatron_replay.kernels.packed_attention import (
    TORCH_ATTENTION,
    AttentionBackend,
    RowSegment,
    Segments,
    document_ends,
)

try:
    from torch_npu import npu_fusion_attention
except ImportError as error:
    raise ConfigError(
        "no fused attention", expected="torch_npu.npu_fusion_attention", found=str(error)
    ) from error

#: The limit of one call in the operator's documentation.
MOST_DOCUMENTS = 1024
#: Causal, counted from a document's last query and last key; the mask is the same for any length.
_CAUSAL, _MASK_SIZE = 3, 2048


@functools.cache
def _masked(device: torch.device) -> Tensor:
    """bool [2048, 2048], true where a key is after the query; one for each device."""
    with torch.inference_mode(False):  # made once; later calls save it for backward
        return torch.ones(_MASK_SIZE, _MASK_SIZE, dtype=torch.bool, device=device).triu(1)


def _attend(operands: Sequence[Tensor], ends: list[int], scale: float) -> Tensor:
    """[T, N, D] of query [T, N, D], key and value [T, G, D]."""
    if len(ends) > MOST_DOCUMENTS:
        stop = ends[MOST_DOCUMENTS - 1]
        first, last = zip(*(x.split([stop, len(x) - stop]) for x in operands), strict=True)
        others = [end - stop for end in ends[MOST_DOCUMENTS:]]
        return torch.cat(
            [_attend(first, ends[:MOST_DOCUMENTS], scale), _attend(last, others, scale)]
        )
    heads = operands[0].shape[1]
    out_TND: Tensor
    out_TND, *_ = npu_fusion_attention(
        *operands,
        heads,
        "TND",
        atten_mask=_masked(operands[0].device),
        scale=scale,
        keep_prob=1.0,
        # Without effect with this mask; the values are MindSpeed's.
        pre_tockens=1 << 20,
        next_tockens=0,
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
        sparse_mode=_CAUSAL,
    )
    return out_TND


def _end_to_end(x_SBND: Tensor) -> Tensor:
    return x_SBND.transpose(0, 1).flatten(0, 1)


def packed_attention(
    query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, segments: Segments, *, scale: float
) -> Tensor:
    """[S, B, N, D] attended; padding attends to its own pack's. Differentiable."""
    length, packs = query_SBND.shape[:2]
    operands = [_end_to_end(x) for x in (query_SBND, key_SBGD, value_SBGD)]
    out_TND = _attend(operands, document_ends(segments, length), scale)
    return out_TND.view(packs, length, *out_TND.shape[1:]).transpose(0, 1)


def row_attention(
    query_RND: Tensor,
    key_SBGD: Tensor,
    value_SBGD: Tensor,
    segments: Segments,
    rows_N: Tensor,
    row_segments: Sequence[RowSegment],
    *,
    scale: float,
) -> Tensor:
    """[R, N, D]: the rows of attention at every position, with zero for the other queries.

    Exact, and as expensive as ``packed_attention``: the operator takes no scattered queries. The
    other queries' results are dropped, so they add nothing to a gradient.
    """
    (length, packs), count = key_SBGD.shape[:2], len(rows_N)
    if not count:  # zeros, with gradients of zero
        operands = (query_RND, key_SBGD, value_SBGD)
        return TORCH_ATTENTION.at_rows(*operands, segments, rows_N, row_segments, scale=scale)
    rest = query_RND.new_zeros(len(query_RND) - count, *query_RND.shape[1:])
    query_TND = query_RND.new_zeros(packs * length, *query_RND.shape[1:])
    query_TND = query_TND.index_put((rows_N,), query_RND[:count])
    whole = [query_TND, _end_to_end(key_SBGD), _end_to_end(value_SBGD)]
    out_TND = _attend(whole, document_ends(segments, length), scale)
    return torch.cat([out_TND[rows_N], rest])


def backend() -> AttentionBackend:
    """The attention of NPUs."""
    return AttentionBackend(packed_attention, row_attention)
