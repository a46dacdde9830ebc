"""Attention on Ascend NPUs, by torch_npu's fused operator: as in ``kernels.packed_attention``.

Layout TND: queries end where a document's own rows end, and its keys are those of its path,
gathered where anything is shared. Padding is a document, so that the ends reach T. The operator
computes the causal half of each document, counted from the lower right: the last query sees every
key. The queries of a group share their keys and values.

Compared with a stand-in for the operator (tests/kernels/test_attention.py); not run on an NPU yet.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch_npu import npu_fusion_attention

from megatron_replay.kernels.packed_attention import (
    TORCH_ATTENTION,
    AttentionBackend,
    Documents,
    RowSegment,
    gather_rows,
)

#: The limit of one call in the operator's documentation.
MOST_DOCUMENTS = 1024
#: Causal, counted from a document's last query and last key; the mask is the same for any length.
_CAUSAL, _MASK_SIZE = 3, 2048


@functools.cache
def _masked(device: torch.device) -> Tensor:
    """bool [2048, 2048], true where a key is after the query; one for each device."""
    with torch.inference_mode(False):  # made once; later calls save it for backward
        return torch.ones(_MASK_SIZE, _MASK_SIZE, dtype=torch.bool, device=device).triu(1)


def _attend(
    operands: Sequence[Tensor], query_ends: list[int], key_ends: list[int], scale: float
) -> Tensor:
    """[T, N, D] of query [T, N, D], key and value [keys, G, D]; where documents end in both."""
    if len(query_ends) > MOST_DOCUMENTS:
        query_stop, key_stop = query_ends[MOST_DOCUMENTS - 1], key_ends[MOST_DOCUMENTS - 1]
        stops = (query_stop, key_stop, key_stop)
        cut = (x.split([stop, len(x) - stop]) for x, stop in zip(operands, stops, strict=True))
        first, others = zip(*cut, strict=True)
        query_left = [end - query_stop for end in query_ends[MOST_DOCUMENTS:]]
        key_left = [end - key_stop for end in key_ends[MOST_DOCUMENTS:]]
        done = _attend(first, query_ends[:MOST_DOCUMENTS], key_ends[:MOST_DOCUMENTS], scale)
        return torch.cat([done, _attend(others, query_left, key_left, scale)])
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
        actual_seq_qlen=query_ends,
        actual_seq_kvlen=key_ends,
        sparse_mode=_CAUSAL,
    )
    return out_TND


def packed_attention(
    query_TND: Tensor, key_TGD: Tensor, value_TGD: Tensor, documents: Documents, *, scale: float
) -> Tensor:
    """[T, N, D] attended; padding attends to itself. Differentiable.

    Memory: where anything is shared, the keys and values of every path, once a layer.
    """
    query_ends, key_ends, pairs = documents.stops, documents.path_stops, (key_TGD, value_TGD)
    if documents.path_rows is not None:
        padding = torch.arange(documents.rows, len(query_TND), device=key_TGD.device)
        rows = torch.cat([documents.path_rows, padding])
        pairs = (gather_rows(key_TGD, rows), gather_rows(value_TGD, rows))
    if documents.rows < len(query_TND):
        query_ends, key_ends = [*query_ends, len(query_TND)], [*key_ends, len(pairs[0])]
    return _attend([query_TND, *pairs], query_ends, key_ends, scale)


def row_attention(
    query_RND: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    documents: Documents,
    rows_N: Tensor,
    row_segments: Sequence[RowSegment],
    *,
    scale: float,
) -> Tensor:
    """[R, N, D]: the rows of attention at every position, with zero for the other queries.

    Exact, and as expensive as ``packed_attention``: the operator takes no scattered queries. The
    other queries' results are dropped, so they add nothing to a gradient.
    """
    count = len(rows_N)
    if not count:  # zeros, with gradients of zero
        operands = (query_RND, key_TGD, value_TGD)
        return TORCH_ATTENTION.at_rows(*operands, documents, rows_N, row_segments, scale=scale)
    rest = query_RND.new_zeros(len(query_RND) - count, *query_RND.shape[1:])
    query_TND = query_RND.new_zeros(len(key_TGD), *query_RND.shape[1:])
    query_TND = query_TND.index_put((rows_N,), query_RND[:count])
    out_TND = packed_attention(query_TND, key_TGD, value_TGD, documents, scale=scale)
    return torch.cat([out_TND[rows_N], rest])


def backend() -> AttentionBackend:
    """The attention of NPUs."""
    return AttentionBackend(packed_attention, row_attention)
