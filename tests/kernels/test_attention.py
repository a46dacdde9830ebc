"""Attention of packed documents against float64, position by position: torch's, and that of NPUs on
a stand-in for the operator.
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

from megatron_replay import kernels
from megatron_replay.kernels import ATTENTION
from megatron_replay.kernels.packed_attention import (
    TORCH_ATTENTION,
    AttentionBackend,
    document_ends,
    row_segments_of,
    segments_of,
)
from tests.loss.references import attention_by_position
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


@st.composite
def packs(draw: st.DrawFn) -> tuple[list[list[int]], int, int]:
    """(where documents begin in each pack, length of a pack, most positions shared)."""
    length = draw(st.integers(1, 24))
    boundaries = []
    for _ in range(draw(st.integers(1, 3))):
        inner = draw(st.sets(st.integers(1, length)))
        boundaries.append([0, *sorted(inner)])
    return boundaries, length, draw(st.sampled_from([1, 4, 256]))


def operands(
    length: int, packs: int, groups: int, seed: int, backend: AttentionBackend
) -> tuple[list[Tensor], list[Tensor]]:
    """Query, key and value in the widest dtype of the backend, and in fp64."""
    dtype = torch.float64 if backend is TORCH_ATTENTION else torch.float32
    generator = torch.Generator().manual_seed(seed)
    inputs = [
        torch.randn(length, packs, heads, CHANNELS, generator=generator).to(dtype)
        for heads in (HEADS, groups, groups)
    ]
    return [x.requires_grad_() for x in inputs], [x.detach().double().clone() for x in inputs]


def close(found: Tensor, expected: Tensor) -> None:
    rtol, atol = (1e-10, 1e-12) if found.dtype is torch.float64 else (1e-5, 2e-6)
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=atol)


groups_and_seeds = st.tuples(st.sampled_from([1, 2, 4]), st.integers(0, 99))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(packs(), groups_and_seeds)
def test_each_document_attends_to_itself(backend, case, drawn):
    (boundaries, length, shared), (groups, seed) = case, drawn
    inputs, exact = operands(length, len(boundaries), groups, seed, backend)
    segments = segments_of(boundaries, length, shared=shared)
    assert all(sum(s.stop - s.start for s in pack) == length for pack in segments)
    expected = attention_by_position(*(x.requires_grad_() for x in exact), boundaries, scale=SCALE)
    found = backend.everywhere(*inputs, segments, scale=SCALE)
    seen_SB = torch.arange(length)[:, None] < torch.tensor([b[-1] for b in boundaries])
    if backend is TORCH_ATTENTION:  # zeros, but for packs of nothing but padding
        close(found, expected)
    assert found.isfinite().all()
    close(found[seen_SB], expected[seen_SB])
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed)).to(found)
    upstream = upstream * seen_SB[..., None, None]  # padding is not used
    gradients = torch.autograd.grad(expected, exact, upstream.double(), materialize_grads=True)
    for ours, theirs in zip(torch.autograd.grad(found, inputs, upstream), gradients, strict=True):
        close(ours, theirs)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(packs(), groups_and_seeds, st.sampled_from([0.0, 0.5, 1.0]))
def test_rows_are_those_of_the_whole(backend, case, drawn, share):
    """And zeros behind the last of them, with gradients of zero where there is none."""
    (boundaries, length, shared), (groups, seed) = case, drawn
    (query, key, value), exact = operands(length, len(boundaries), groups, seed, backend)
    segments = segments_of(boundaries, length, shared=shared)
    whole = attention_by_position(*(x.requires_grad_() for x in exact), boundaries, scale=SCALE)
    chosen_SB = torch.rand(whole.shape[:2], generator=torch.Generator().manual_seed(seed)) < share
    chosen_SB &= torch.arange(length)[:, None] < torch.tensor([b[-1] for b in boundaries])
    rows_N = chosen_SB.T.flatten().nonzero().squeeze(1)
    place, count = (rows_N % length, rows_N // length), len(rows_N)
    padding = query.new_ones(2, HEADS, CHANNELS)
    query_RND = torch.cat([query.detach()[place], padding]).requires_grad_()
    rows = segments, rows_N, row_segments_of(segments, rows_N, length)
    found = backend.at_rows(query_RND, key, value, *rows, scale=SCALE)
    close(found[:count], whole[place])
    assert not found[count:].any()
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed)).to(found)
    ours = torch.autograd.grad(found, [query_RND, key, value], upstream)
    theirs = torch.autograd.grad(
        whole[place], exact, upstream[:count].double(), materialize_grads=True
    )
    assert not ours[0][count:].any()
    close(ours[0][:count], theirs[0][place])
    close(ours[1], theirs[1])
    close(ours[2], theirs[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_the_bits(backend, dtype):
    _, exact = operands(12, 1, 2, 0, backend)
    inputs, segments = [x.to(dtype) for x in exact], segments_of([[0, 4, 7]], 12)
    found = backend.everywhere(*inputs, segments, scale=SCALE)
    assert found.dtype is dtype
    expected = attention_by_position(*(x.double() for x in inputs), [[0, 4, 7]], scale=SCALE)
    torch.testing.assert_close(found[:7].double(), expected[:7], rtol=1e-2, atol=1e-2)


def test_more_documents_than_a_call_takes(monkeypatch):
    backend = attention_on_npus(monkeypatch)
    monkeypatch.setattr(sys.modules[MODULE], "MOST_DOCUMENTS", 2)
    monkeypatch.setattr(fusion_attention, "MOST_DOCUMENTS", 2)
    boundaries = [[0, 1, 5, 9, 11], [0, 12]]
    inputs, exact = operands(12, 2, 2, 0, backend)
    found = backend.everywhere(*inputs, segments_of(boundaries, 12), scale=SCALE)
    close(found[:11], attention_by_position(*exact, boundaries, scale=SCALE)[:11])


@pytest.mark.parametrize("shared", [1, 4, 256])
def test_ends_lead_from_document_to_document_and_reach_the_last_position(shared):
    segments = segments_of([[0, 5, 12], [0], [0, 1, 2, 8]], 12, shared=shared)
    assert document_ends(segments, 12) == [5, 12, 24, 25, 26, 32, 36]


def test_the_backend_needs_torch_npu(monkeypatch):
    attention_on_npus(monkeypatch)
    assert ATTENTION.why_not("ascend") is None
    kernels.load.cache_clear()
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    sys.modules.pop(MODULE)
    assert "expected torch_npu.npu_fusion_attention" in ATTENTION.why_not("ascend")
    kernels.load.cache_clear()
