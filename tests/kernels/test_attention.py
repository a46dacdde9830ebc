"""Attention of documents that share prefixes against float64, row by row: torch's, and that of NPUs
on a stand-in for the operator.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_replay import kernels
from megatron_replay.kernels import ATTENTION
from megatron_replay.kernels.packed_attention import (
    TORCH_ATTENTION,
    AttentionBackend,
    Documents,
    row_segments_of,
)
from tests.loss.references import attention_by_position, seen_rows
from tests.npu_stub import fusion_attention

HEADS, CHANNELS, SCALE = 4, 8, 0.7
MODULE = "megatron_replay.kernels.ascend_attention"


def attention_on_npus(patch: pytest.MonkeyPatch) -> AttentionBackend:
    """Loaded anew, with the stand-in in place of torch_npu's operator."""
    operator = fusion_attention.npu_fusion_attention
    stub = types.SimpleNamespace(npu_fusion_attention=operator)
    patch.setitem(sys.modules, "torch_npu", stub)
    patch.delitem(sys.modules, MODULE, raising=False)
    kernels.load.cache_clear()
    return kernels.load(ATTENTION, "ascend")


@pytest.fixture(scope="module", params=["torch", "ascend"])
def backend(request: pytest.FixtureRequest) -> Iterator[AttentionBackend]:
    with pytest.MonkeyPatch.context() as patch:
        yield TORCH_ATTENTION if request.param == "torch" else attention_on_npus(patch)
    kernels.load.cache_clear()


Forest = tuple[list[int], list[int], int]


@st.composite
def forests(draw: st.DrawFn) -> Forest:
    """(own rows of each document, positions shared with the one before, rows of padding)."""
    own, shared, length = [], [], 0
    for _ in range(draw(st.integers(0, 6))):
        shared.append(draw(st.integers(0, length)))
        own.append(draw(st.integers(0, 6)))
        length = shared[-1] + own[-1]
    return own, shared, draw(st.integers(0 if sum(own) else 1, 3))


def operands(
    length: int, groups: int, seed: int, backend: AttentionBackend
) -> tuple[list[Tensor], list[Tensor]]:
    """Query, key and value in the widest dtype of the backend, and in fp64."""
    dtype = torch.float64 if backend is TORCH_ATTENTION else torch.float32
    generator = torch.Generator().manual_seed(seed)
    inputs = [
        torch.randn(length, heads, CHANNELS, generator=generator).to(dtype)
        for heads in (HEADS, groups, groups)
    ]
    exact = [x.double().requires_grad_() for x in inputs]
    return [x.clone().requires_grad_() for x in inputs], exact


def close(found: Tensor, expected: Tensor) -> None:
    rtol, atol = (1e-10, 1e-12) if found.dtype is torch.float64 else (1e-5, 2e-6)
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=atol)


groups_and_seeds = st.tuples(st.sampled_from([1, 2, 4]), st.integers(0, 99))
most_together = st.sampled_from([1, 4, 256])


@settings(deadline=None, derandomize=True, max_examples=100)
@given(forests(), groups_and_seeds, most_together)
def test_each_document_attends_to_its_path(backend, forest, drawn, together):
    (own, shared, padding), (groups, seed) = forest, drawn
    rows = sum(own)
    inputs, exact = operands(rows + padding, groups, seed, backend)
    expected = attention_by_position(*exact, seen_rows(own, shared), scale=SCALE)
    found = backend.everywhere(*inputs, Documents.of(own, shared, together=together), scale=SCALE)
    if backend is TORCH_ATTENTION:
        close(found, expected)
    assert found.isfinite().all()
    close(found[:rows], expected[:rows])
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed)).to(found)
    upstream[rows:] = 0  # padding is not used
    gradients = (
        torch.autograd.grad(expected, exact, upstream.double(), materialize_grads=True)
        if rows
        else [torch.zeros_like(x) for x in exact]
    )
    for ours, theirs in zip(torch.autograd.grad(found, inputs, upstream), gradients, strict=True):
        close(ours, theirs)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(forests(), groups_and_seeds, most_together, st.sampled_from([0.0, 0.5, 1.0]))
def test_rows_are_those_of_the_whole(backend, forest, drawn, together, share):
    """And zeros behind the last of them, with gradients of zero where there is none."""
    (own, shared, padding), (groups, seed) = forest, drawn
    (query, key, value), exact = operands(sum(own) + padding, groups, seed, backend)
    documents = Documents.of(own, shared, together=together)
    whole = attention_by_position(*exact, seen_rows(own, shared), scale=SCALE)
    chosen_T = torch.rand(len(query), generator=torch.Generator().manual_seed(seed)) < share
    chosen_T[sum(own) :] = False
    rows_N = chosen_T.nonzero().squeeze(1)
    count = len(rows_N)
    query_RND = torch.cat([query.detach()[rows_N], query.new_ones(2, HEADS, CHANNELS)])
    query_RND.requires_grad_()
    rows = documents, rows_N, row_segments_of(documents, rows_N)
    found = backend.at_rows(query_RND, key, value, *rows, scale=SCALE)
    close(found[:count], whole[rows_N])
    assert not found[count:].any()
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed)).to(found)
    ours = torch.autograd.grad(found, [query_RND, key, value], upstream)
    theirs = [torch.zeros_like(x) for x in exact]
    if count:
        theirs = torch.autograd.grad(whole[rows_N], exact, upstream[:count].double())
    assert not ours[0][count:].any()
    close(ours[0][:count], theirs[0][rows_N])
    close(ours[1], theirs[1])
    close(ours[2], theirs[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_the_bits(backend, dtype):
    _, exact = operands(12, 2, 0, backend)
    inputs, own, shared = [x.detach().to(dtype) for x in exact], [4, 3], [0, 2]
    found = backend.everywhere(*inputs, Documents.of(own, shared), scale=SCALE)
    assert found.dtype is dtype
    seen = seen_rows(own, shared)
    expected = attention_by_position(*(x.double() for x in inputs), seen, scale=SCALE)
    torch.testing.assert_close(found[:7].double(), expected[:7], rtol=1e-2, atol=1e-2)


def test_more_documents_than_a_call_takes(monkeypatch):
    backend = attention_on_npus(monkeypatch)
    monkeypatch.setattr(sys.modules[MODULE], "MOST_DOCUMENTS", 2)
    monkeypatch.setattr(fusion_attention, "MOST_DOCUMENTS", 2)
    own, shared = [1, 4, 4, 2, 1], [0, 1, 3, 0, 2]
    inputs, exact = operands(14, 2, 0, backend)
    found = backend.everywhere(*inputs, Documents.of(own, shared), scale=SCALE)
    close(found[:12], attention_by_position(*exact, seen_rows(own, shared), scale=SCALE)[:12])


def test_the_backend_needs_torch_npu(monkeypatch):
    attention_on_npus(monkeypatch)
    assert ATTENTION.why_not("ascend") is None
    kernels.load.cache_clear()
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    sys.modules.pop(MODULE)
    assert ATTENTION.why_not("ascend").startswith("torch_npu is not installed")
    kernels.load.cache_clear()


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_matrix_of_rows_squared_and_keys_gathered_once():
    """64 documents of 40 rows behind 300 that they share: 11 segments."""
    own, shared = [340] + [40] * 63, [0] + [300] * 63
    documents, rows = Documents.of(own, shared), sum(own)
    keys = [segment.num_keys for segment in documents.segments]
    assert keys == [340] + [300 + 240] * 10 + [300 + 120]  # six documents in 256 rows
    inputs = [torch.randn(rows, heads, CHANNELS, requires_grad=True) for heads in (HEADS, 1, 1)]
    with LargestTensor() as seen:
        TORCH_ATTENTION.everywhere(*inputs, documents, scale=SCALE).sum().backward()
    mask = 240 * 540
    assert seen.elements == max(rows * HEADS * CHANNELS, sum(keys) * CHANNELS, mask) < rows**2 / 50
