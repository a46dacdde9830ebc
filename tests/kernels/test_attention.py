"""Attention on NPUs, on a stand-in for the operator, against float64 and against torch's."""

from __future__ import annotations

import importlib
import sys
import types
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron_replay.kernels import ATTENTION, registry
from megatron_replay.kernels.packed_attention import (
    TORCH_ATTENTION,
    document_ends,
    row_segments_of,
    segments_of,
)
from tests.loss.references import attention_by_position
from tests.npu_stub import fusion_attention

HEADS, CHANNELS, SCALE, LENGTH = 4, 8, 0.7, 12
MODULE = "megatron_replay.kernels.ascend_attention"
#: Where documents begin, and end at last.
PACKS = {
    "one document": [[0, 12]],
    "documents": [[0, 1, 5, 9, 12]],
    "padding behind": [[0, 4, 7]],
    "padding alone": [[0]],
    "packs": [[0, 5, 12], [0], [0, 1, 2, 8]],
}


@dataclass
class Rows:
    rows_N: Tensor
    segments: list


@pytest.fixture
def module(monkeypatch):
    """The ascend backend, on a stand-in for torch_npu's operator."""
    operator = fusion_attention.npu_fusion_attention
    stub = types.SimpleNamespace(npu_fusion_attention=operator)
    monkeypatch.setitem(sys.modules, "torch_npu", stub)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    registry.load.cache_clear()
    yield importlib.import_module(MODULE)
    registry.load.cache_clear()
    sys.modules.pop(MODULE, None)


def operands(packs: int, groups: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(packs + groups)
    return [
        torch.randn(LENGTH, packs, heads, CHANNELS, generator=generator).to(dtype).requires_grad_()
        for heads in (HEADS, groups, groups)
    ]


def double(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in tensors]


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("shared", [1, 256])
def test_everywhere(module, name, groups, shared):
    boundaries = PACKS[name]
    inputs, segments = (
        operands(len(boundaries), groups),
        segments_of(boundaries, LENGTH, shared=shared),
    )
    found = module.attention.everywhere(*inputs, segments, scale=SCALE)
    exact, plain = double(inputs), double(inputs)
    expected = attention_by_position(*exact, boundaries, scale=SCALE)
    torchs = TORCH_ATTENTION.everywhere(*plain, segments, scale=SCALE)
    real_SB = torch.zeros(LENGTH, len(boundaries), dtype=torch.bool)
    for b, starts in enumerate(boundaries):
        real_SB[: starts[-1] if len(starts) > 1 else LENGTH, b] = True
    assert found.isfinite().all()
    for other in (expected, torchs):
        torch.testing.assert_close(found[real_SB].double(), other[real_SB], rtol=1e-5, atol=1e-6)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    upstream = upstream * real_SB[..., None, None]  # nobody reads padding
    ours = torch.autograd.grad(found, inputs, upstream)
    for wanted, leaves in ((expected, exact), (torchs, plain)):
        theirs = torch.autograd.grad(wanted, leaves, upstream.double())
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("step", [1, 3])
def test_at_rows(module, name, groups, step):
    boundaries = PACKS[name]
    whole_SBND, key, value = operands(len(boundaries), groups)
    segments = segments_of(boundaries, LENGTH)
    asked = [b * LENGTH + s for b, starts in enumerate(boundaries) for s in range(starts[-1])]
    rows_N = torch.tensor(asked[::step], dtype=torch.int64)
    rows = Rows(rows_N, row_segments_of(segments, rows_N, LENGTH))
    place, padding = (rows_N % LENGTH, rows_N // LENGTH), 2
    query_RND = torch.cat([whole_SBND.detach()[place], torch.ones(padding, HEADS, CHANNELS)])
    inputs = [query_RND.requires_grad_(), key, value]
    found = module.attention.at_rows(*inputs, segments, rows, scale=SCALE)
    exact, plain = double([whole_SBND, key, value]), double(inputs)
    expected = attention_by_position(*exact, boundaries, scale=SCALE)[place]
    torchs = TORCH_ATTENTION.at_rows(*plain, segments, rows, scale=SCALE)
    assert not found[len(rows_N) :].any()
    torch.testing.assert_close(found[: len(rows_N)].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.double(), torchs, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(found, inputs, upstream)
    theirs = torch.autograd.grad(torchs, plain, upstream.double())
    exacts = torch.autograd.grad(expected, exact, upstream[: len(rows_N)].double())
    assert not ours[0][len(rows_N) :].any()
    assert asked or not any(grad.any() for grad in ours)
    torch.testing.assert_close(ours[0][: len(rows_N)].double(), exacts[0][place])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    for one, other in zip(ours[1:], exacts[1:], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_the_bits(module, dtype):
    inputs, segments = operands(1, 2, dtype), segments_of([[0, 4, 7]], LENGTH)
    found = module.attention.everywhere(*inputs, segments, scale=SCALE)
    assert found.dtype is dtype
    expected = TORCH_ATTENTION.everywhere(*double(inputs), segments, scale=SCALE)
    torch.testing.assert_close(found[:7].double(), expected[:7], rtol=1e-2, atol=1e-2)


def test_more_documents_than_a_call_takes(module, monkeypatch):
    monkeypatch.setattr(module, "MOST_DOCUMENTS", 2)
    monkeypatch.setattr(fusion_attention, "MOST_DOCUMENTS", 2)
    boundaries = [[0, 1, 5, 9, 11], [0, 12]]
    inputs, segments = operands(2, 2), segments_of(boundaries, LENGTH)
    found = module.attention.everywhere(*inputs, segments, scale=SCALE)
    expected = attention_by_position(*double(inputs), boundaries, scale=SCALE)
    torch.testing.assert_close(found[:11].double(), expected[:11], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared", [1, 4, 256])
def test_ends_lead_from_document_to_document_and_reach_the_last_position(shared):
    segments = segments_of([[0, 5, 12], [0], [0, 1, 2, 8]], LENGTH, shared=shared)
    assert document_ends(segments, LENGTH) == [5, 12, 24, 25, 26, 32, 36]


@pytest.mark.usefixtures("module")
def test_the_backend_needs_torch_npu(monkeypatch):
    assert ATTENTION.why_not("ascend") is None
    registry.load.cache_clear()
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    sys.modules.pop(MODULE)
    assert "expected torch_npu.npu_fusion_attention" in ATTENTION.why_not("ascend")
