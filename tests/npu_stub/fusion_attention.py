"""A stand-in for ``torch_npu.npu_fusion_attention``: layout TND, mask mode 3, no dropout.

Written from torch_npu's documentation of the operator (``_op_plugin_docs.py`` in its wheels), and
registered by the schema that is in signatures.json, so that torch itself refuses an argument of
another name or type. What the documentation rules out is a RuntimeError. Computes in float64.

Shapes: T positions of all documents, N query heads, G of keys and values, D channels.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RECORD = json.loads((Path(__file__).parent / "signatures.json").read_text())
NAME = "npu_fusion_attention"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
#: Most documents of a call, channels and query heads.
MOST_DOCUMENTS, MOST_CHANNELS, MOST_HEADS = 1024, 768, 256
_GRAD = (
    "(Tensor query, Tensor key, Tensor value, Tensor grad, float scale, int[] qlen, int[] kvlen)"
    " -> (Tensor, Tensor, Tensor)"
)


@functools.cache
def operator(version: str) -> Callable[..., Any]:
    """``torch.ops.npu.npu_fusion_attention``, as that release of torch_npu has it."""
    library = torch.library.Library("npu", "DEF")
    library.define(NAME + RECORD["operators"][NAME][version])
    library.define(f"{NAME}_grad_in_tests{_GRAD}")
    library.impl(NAME, _forward, "CPU")
    library.impl(f"{NAME}_grad_in_tests", _backward, "CPU")
    torch.library.register_autograd(f"npu::{NAME}", _backward_of, setup_context=_save, lib=library)
    operator.library = library  # type: ignore[attr-defined]  # it ends with its last reference
    return getattr(torch.ops.npu, NAME)


def _named(values: Sequence[Any]) -> dict[str, Any]:
    """Arguments by name; torch leaves out those behind the last that is not its default."""
    parameters = getattr(torch.ops.npu, NAME).default._schema.arguments
    defaults = {parameter.name: parameter.default_value for parameter in parameters}
    return defaults | dict(zip(defaults, values, strict=False))


def _forward(*values):
    given = _named(values)
    query, key, value, head_num = (given[x] for x in ("query", "key", "value", "head_num"))
    _require(given["input_layout"] == "TND", "only the layout TND is here")
    _require(query.dim() == key.dim() == 3, "TND has three dimensions")
    _require(key.shape == value.shape, "key and value of different shapes")
    _require({x.dtype for x in (query, key, value)} == {query.dtype}, "operands of unlike dtypes")
    _require(query.dtype in DTYPES, f"operands of {query.dtype}")
    _require(query.shape[1] == head_num <= MOST_HEADS, "head_num is not the query's heads")
    _require(head_num % key.shape[1] == 0, "query heads are no multiple of the keys'")
    _require(query.shape[2] == key.shape[2] <= MOST_CHANNELS, "channels")
    _require(all(given[name] is None for name in _ABSENT), "not in the stand-in")
    _require(given["sparse_mode"] == 3 and given["keep_prob"] == 1.0, "not in the stand-in")
    mask = given["atten_mask"]
    _require(mask is not None and mask.dtype in (torch.bool, torch.uint8), "no mask")
    _require(torch.equal(mask.bool(), _compressed()), "mode 3 takes the mask of 2048 x 2048")
    ends = given["actual_seq_qlen"], given["actual_seq_kvlen"]
    _require(None not in ends and len(ends[0]) == len(ends[1]) <= MOST_DOCUMENTS, "documents")
    for of, x in zip(ends, (query, key), strict=True):
        _require(sorted(of) == list(of) and of[0] >= 0 and of[-1] == len(x), f"ends {of}")
    out = _attend(query.double(), key.double(), value.double(), given["scale"], *ends)
    statistics = [query.new_empty(*query.shape[:2], 8, dtype=torch.float32) for _ in range(2)]
    return out.to(query.dtype), *statistics, query.new_empty(0), 0, 0, 0


#: Arguments that nothing here is done with.
_ABSENT = ("pse", "padding_mask", "prefix", "sink", "dropout_mask")


def _require(fulfilled: bool, what: str) -> None:
    if not fulfilled:
        raise RuntimeError(f"{NAME}: {what}")


@functools.cache
def _compressed() -> Tensor:
    return torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def _documents(
    query_TND: Tensor, key_TGD: Tensor, value_TGD: Tensor, scale: float, *ends: list[int]
) -> Iterator[tuple[Tensor, ...]]:
    """Of each document query [N, L, D], key and value [N, M, D], and weights [N, L, M]."""
    shared = query_TND.shape[1] // key_TGD.shape[1]
    for (q, q_end), (k, k_end) in zip(*(itertools.pairwise([0, *x]) for x in ends), strict=True):
        key_NMD, value_NMD = (
            x[k:k_end].repeat_interleave(shared, 1).transpose(0, 1) for x in (key_TGD, value_TGD)
        )
        query_NLD = query_TND[q:q_end].transpose(0, 1)
        # The last query sees the last key, wherever the lengths differ.
        behind_LM = torch.ones(q_end - q, k_end - k, dtype=torch.bool)
        behind_LM = behind_LM.triu(1 + (k_end - k) - (q_end - q))
        logits_NLM = (scale * query_NLD @ key_NMD.mT).masked_fill(behind_LM, -torch.inf)
        yield query_NLD, key_NMD, value_NMD, logits_NLM.softmax(-1)


def _attend(*operands: Any) -> Tensor:
    parts = [weights @ value for _, _, value, weights in _documents(*operands)]
    return torch.cat(parts, dim=1).transpose(0, 1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    given = _named(inputs)
    ctx.save_for_backward(*inputs[:3])
    ctx.parameters = len(inputs)
    ctx.rest = given["scale"], given["actual_seq_qlen"], given["actual_seq_kvlen"]


def _backward_of(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grad_of = getattr(torch.ops.npu, f"{NAME}_grad_in_tests")
    grads = grad_of(*ctx.saved_tensors, grad, *ctx.rest)
    return (*grads, *[None] * (ctx.parameters - 3))


def _backward(query, key, value, grad, scale, qlen, kvlen):
    # By hand: below autograd there is none.
    operands = (query.double(), key.double(), value.double(), scale, qlen, kvlen)
    grads: list[list[Tensor]] = [[], [], []]
    for (query_NLD, key_NMD, value_NMD, weights_NLM), (q, q_end) in zip(
        _documents(*operands), itertools.pairwise([0, *qlen]), strict=True
    ):
        grad_NLD = grad[q:q_end].double().transpose(0, 1)
        moves_NLM = grad_NLD @ value_NMD.mT
        moves_NLM = weights_NLM * (moves_NLM - (moves_NLM * weights_NLM).sum(-1, keepdim=True))
        grads[0].append(scale * moves_NLM @ key_NMD)
        grads[1].append(scale * moves_NLM.mT @ query_NLD)
        grads[2].append(weights_NLM.mT @ grad_NLD)
    whole = [torch.cat(parts, dim=1).transpose(0, 1) for parts in grads]
    groups = key.shape[1]
    whole[1:] = [x.unflatten(1, (groups, -1)).sum(2) for x in whole[1:]]
    return tuple(x.to(query.dtype).contiguous() for x in whole)
