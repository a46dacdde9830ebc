"""A stand-in for ``torch_npu.npu_fusion_attention``: layout TND, mask mode 3, no dropout.

Written from torch_npu's documentation of the operator (``_op_plugin_docs.py`` in its wheels).

Shapes: T positions of all documents, N query heads, G of keys and values, D channels.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import _disable_current_modes

from tests.npu_stub.stand_in import DTYPES, Float64, require, stand_in

NAME = "npu_fusion_attention"
SCHEMA = (
    "npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num,"
    " str input_layout, Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None,"
    " float scale=1., float keep_prob=1., int pre_tockens=2147483647, int next_tockens=2147483647,"
    " int inner_precise=0, int[]? prefix=None, int[]? actual_seq_qlen=None,"
    " int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True,"
    ' bool sync=False, str softmax_layout="", Tensor? sink=None, Tensor? dropout_mask=None,'
    " int seed=0, int offset=0) -> (Tensor, Tensor, Tensor, Tensor, int, int, int)"
)
#: The most documents of a call, channels and query heads.
MOST_DOCUMENTS, MOST_CHANNELS, MOST_HEADS = 1024, 768, 256
#: Arguments that the stand-in does not implement, and the only values it takes.
_FIXED = {
    "input_layout": "TND", "sparse_mode": 3, "keep_prob": 1.0, "pse": None, "padding_mask": None,
    "prefix": None, "sink": None, "dropout_mask": None,
}  # fmt: skip
_require = functools.partial(require, name=NAME)


def _check_and_attend(**given: Any) -> tuple[Any, ...]:
    query, key, value, mask = (given[x] for x in ("query", "key", "value", "atten_mask"))
    ends, key_ends = given["actual_seq_qlen"], given["actual_seq_kvlen"]
    with _disable_current_modes():
        for name, only in _FIXED.items():
            _require(given[name] == only, f"{name} is {given[name]}, not in the stand-in")
        _require(query.dim() == key.dim() == 3, "TND has three dimensions")
        _require(key.shape == value.shape, "key and value of different shapes")
        _require(query.dtype == key.dtype == value.dtype, "operands of unlike dtypes")
        _require(query.dtype in DTYPES, f"operands of {query.dtype}")
        _require(query.shape[1] == given["head_num"] <= MOST_HEADS, "not the query's heads")
        _require(query.shape[1] % key.shape[1] == 0, "query heads are no multiple of the keys'")
        _require(query.shape[2] == key.shape[2] <= MOST_CHANNELS, "channels")
        _require(mask is not None and mask.dtype in (torch.bool, torch.uint8), "no mask")
        _require(torch.equal(mask.bool(), _compressed()), "mode 3 takes the mask of 2048 x 2048")
        _require(len(ends) <= MOST_DOCUMENTS, "documents")
        for of, rows in ((ends, query), (key_ends, key)):
            _require(bool(of) and len(of) == len(ends), "no ends, or not as many of both")
            _require(sorted(of) == list(of) and of[0] >= 0 and of[-1] == len(rows), "ends")
        # Counted from the lower right, a document with more queries than keys has rows that see
        # nothing.
        sizes = [[b - a for a, b in itertools.pairwise([0, *of])] for of in (ends, key_ends)]
        _require(all(q <= k for q, k in zip(*sizes, strict=True)), "more queries than keys")
    attend = functools.partial(_attend, scale=given["scale"], ends=ends, key_ends=key_ends)
    out = Float64.apply(NAME, attend, query, key, value)
    return out, *[query.new_empty(0) for _ in range(3)], 0, 0, 0


@functools.cache
def _compressed() -> Tensor:
    return torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def _attend(
    query: Tensor, *pairs: Tensor, scale: float, ends: list[int], key_ends: list[int]
) -> Tensor:
    spans = zip(itertools.pairwise([0, *ends]), itertools.pairwise([0, *key_ends]), strict=True)
    documents = []
    for (start, end), (first, last) in spans:
        rows, keys = end - start, last - first
        documents.append(scaled_dot_product_attention(
            query[start:end].transpose(0, 1), *(x[first:last].transpose(0, 1) for x in pairs),
            attn_mask=torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows),
            scale=scale, enable_gqa=True,
        ).transpose(0, 1))  # fmt: skip
    return torch.cat(documents)


npu_fusion_attention = stand_in(SCHEMA, _check_and_attend)
