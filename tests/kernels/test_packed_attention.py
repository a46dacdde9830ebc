"""Attention of packed documents against float64, position by position."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_replay.kernels.packed_attention import (
    packed_attention,
    row_attention,
    row_segments_of,
    segments_of,
)
from tests.loss.references import attention_by_position

HEADS, CHANNELS, SCALE = 4, 3, 0.7


@st.composite
def packs(draw: st.DrawFn) -> tuple[list[list[int]], int, int]:
    """(where documents begin in each pack, length of a pack, most positions shared)."""
    length = draw(st.integers(1, 24))
    boundaries = []
    for _ in range(draw(st.integers(1, 3))):
        inner = draw(st.sets(st.integers(1, length)))
        boundaries.append([0, *sorted(inner)])
    return boundaries, length, draw(st.sampled_from([1, 4, 256]))


def operands(length: int, packs: int, groups: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(length, packs, heads, CHANNELS, generator=generator, dtype=torch.float64)
        for heads in (HEADS, groups, groups)
    ]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(packs(), st.sampled_from([1, 2, 4]), st.integers(0, 99))
def test_each_document_attends_to_itself(case, groups, seed):
    boundaries, length, shared = case
    inputs = [x.requires_grad_() for x in operands(length, len(boundaries), groups, seed)]
    segments = segments_of(boundaries, length, shared=shared)
    assert all(sum(s.stop - s.start for s in pack) == length for pack in segments)
    expected = attention_by_position(*inputs, boundaries, scale=SCALE)
    found = packed_attention(*inputs, segments, scale=SCALE)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed)).double()
    gradients = torch.autograd.grad(expected, inputs, upstream, allow_unused=True)
    for ours, theirs in zip(torch.autograd.grad(found, inputs, upstream), gradients, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(packs(), st.sampled_from([1, 2, 4]), st.integers(0, 99))
def test_rows_are_those_of_the_whole(case, groups, seed):
    boundaries, length, shared = case
    query, key, value = operands(length, len(boundaries), groups, seed)
    segments = segments_of(boundaries, length, shared=shared)
    whole_SBND = attention_by_position(query, key, value, boundaries, scale=SCALE)
    generator = torch.Generator().manual_seed(seed)
    asked = [
        b * length + s
        for b, starts in enumerate(boundaries)
        for s in range(starts[-1])
        if torch.rand(1, generator=generator) < 0.5
    ]
    rows_N = torch.tensor(asked, dtype=torch.int64)
    place = rows_N % length, rows_N // length
    padding = 2
    query_RND = torch.cat([query[place], query.new_ones(padding, HEADS, CHANNELS)])
    for operand in (query_RND, key, value):
        operand.requires_grad_()
    found = row_attention(
        query_RND, key, value, row_segments_of(segments, rows_N, length), scale=SCALE
    )
    torch.testing.assert_close(found[: len(rows_N)], whole_SBND[place], rtol=1e-10, atol=1e-12)
    assert not found[len(rows_N) :].any()
    for grad in torch.autograd.grad(found.sum(), [query_RND, key, value]):
        assert grad.isfinite().all()
        assert asked or not grad.any()
