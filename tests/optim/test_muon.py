"""Orthogonalisation of whole and of sharded matrices; QK-Clip against the logits in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_replay.optim.muon import newton_schulz, on_whole_matrices
from megatron_replay.optim.muonclip import qk_clip_factors, scale_query_key_
from tests import pool


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16), (1, 9), (9, 1)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    mapped = u.T @ newton_schulz(1e3 * matrix) @ vh.T  # the scale does not matter
    values = mapped.diagonal()
    # The quintic's fixed band: [0.68, 1.14] for singular values above 1 % of the norm.
    assert (values[s / s.norm() > 0.01] > 0.65).all()
    assert (values < 1.2).all()
    torch.testing.assert_close(mapped, values.diag(), atol=1e-9, rtol=0)
    assert not newton_schulz(torch.zeros(shape)).any()


#: Shape and the dimension it is cut along; more than ranks, not a multiple, and unequal.
MATRICES = [((8, 6), 0), ((4, 8), 1), ((16, 4), 0), ((12, 12), 1), ((4, 4), 0)]


def transform_shards(rank: int, world_size: int) -> list[Any]:
    calls: list[tuple[int, ...]] = []

    def transform(matrix: Tensor) -> Tensor:
        calls.append(tuple(matrix.shape))
        return newton_schulz(matrix)

    def parts(wholes: list[Tensor]) -> list[Tensor]:
        cut = zip(wholes, dims, strict=True)
        return [whole.chunk(world_size, dim)[rank] for whole, dim in cut]

    generator = torch.Generator().manual_seed(3)
    dims = [dim for _, dim in MATRICES]
    wholes = [torch.randn(shape, generator=generator) for shape, _ in MATRICES]
    found = on_whole_matrices(transform, parts(wholes), dims, group=dist.group.WORLD)
    expected = parts([newton_schulz(whole) for whole in wholes])
    assert all(map(torch.equal, found, expected))
    return calls


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_parts_equal_the_whole_and_the_work_is_shared(world_size):
    calls = [call for calls in pool.run(world_size, transform_shards) for call in calls]
    assert sorted(calls) == sorted(shape for shape, _ in MATRICES)  # each once, whole


HIDDEN, CHANNELS, TOKENS = 24, 6, 10


def projection(heads: int, groups: int) -> Tensor:
    """[(N + 2 G) D, H] in float64, some heads large, some small."""
    generator = torch.Generator().manual_seed(0)
    rows = (heads + 2 * groups, CHANNELS, HIDDEN)
    size = torch.rand(rows[0], 1, 1, generator=generator, dtype=torch.float64).mul(3).exp()
    weight = torch.randn(rows, generator=generator, dtype=torch.float64) * size
    return weight.flatten(0, 1)


def parts(weight: Tensor, groups: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Query, key and value heads [D, H] each, one by one from the definition of the layout."""
    heads = list(weight.double().split(CHANNELS))
    size = len(heads) // groups
    queries, keys, values = [], [], []
    for group in range(groups):
        *own, key, value = heads[group * size : (group + 1) * size]
        queries, keys, values = queries + own, [*keys, key], [*values, value]
    return queries, keys, values


def largest_logits(weight: Tensor, groups: int) -> Tensor:
    """S_h of a fixed batch: one head after the other, over causal pairs."""
    generator = torch.Generator().manual_seed(1)
    x_TH = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    queries, keys, _ = parts(weight, groups)
    largest = []
    for number, query in enumerate(queries):
        key = keys[number // (len(queries) // groups)]
        logits_TT = (x_TH @ query.T) @ (x_TH @ key.T).T / CHANNELS**0.5
        largest.append(max(logits_TT[s, r] for s in range(TOKENS) for r in range(s + 1)))
    return torch.stack(largest)


def clip(weight: Tensor, max_logits_N: Tensor, threshold: float, groups: int) -> Tensor:
    clipped = weight.clone()
    factors = qk_clip_factors(max_logits_N, threshold=threshold, num_query_groups=groups)
    scale_query_key_(clipped, *factors)
    return clipped


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (8, 2), (6, 3), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_end_at_the_threshold_or_as_they_were(heads, groups, dtype):
    weight = projection(heads, groups).to(dtype)
    before = largest_logits(weight, groups)
    threshold = before.median().item()
    clipped = clip(weight, before.to(dtype), threshold, groups)
    after, over = largest_logits(clipped, groups), before > threshold
    assert 0 < over.sum() < heads
    torch.testing.assert_close(after, before.clamp(max=threshold), rtol=1e-6, atol=0)
    values, untouched = (torch.stack(parts(w, groups)[2]) for w in (clipped, weight))
    assert torch.equal(values, untouched)


def test_how_queries_and_keys_share_a_factor():
    """Alone with its key a head takes sqrt(gamma), as in Kimi K2; a shared key what all its heads
    ask for; a logit that is not finite clips nothing.
    """
    factors = qk_clip_factors(torch.tensor([400.0, 50.0]), threshold=100.0, num_query_groups=2)
    assert [f.tolist() for f in factors] == [[0.5, 1.0], [0.5, 1.0]]
    shared = torch.tensor([400.0, 1600.0, 400.0, 100.0])
    query, key = qk_clip_factors(shared, threshold=100.0, num_query_groups=2)
    assert (query.tolist(), key.tolist()) == ([0.5, 0.125, 0.25, 1.0], [0.5, 1.0])
    broken = torch.tensor([torch.nan, torch.inf, -torch.inf, 400.0])
    for factors in qk_clip_factors(broken, threshold=100.0, num_query_groups=4):
        assert factors.tolist() == [1.0, 1.0, 1.0, 0.5]


def test_heads_that_are_not_clipped_keep_every_bit():
    weight = projection(8, 2).float()
    max_logits = torch.tensor([7.0, 9.0, 8.0, 3.0, -5.0, 0.0, 10.0, 1.0])
    assert torch.equal(clip(weight, max_logits, 10.0, 2), weight)
    max_logits[1] = 10.1  # one head of the first group: only its own rows change
    changed = (clip(weight, max_logits, 10.0, 2) != weight).any(1).view(-1, CHANNELS).any(1)
    assert changed.nonzero().flatten().tolist() == [1]


@settings(derandomize=True, deadline=None, max_examples=100, database=None)
@given(
    st.integers(1, 4).flatmap(
        lambda groups: st.lists(
            st.floats(-1e4, 1e4, width=32), min_size=groups * 3, max_size=groups * 3
        )
    ),
    st.floats(0.01, 1e3),
)
def test_every_head_shrinks_by_its_own_gamma_and_nothing_grows(values, threshold):
    max_logits = torch.tensor(values, dtype=torch.float64)
    groups = len(values) // 3
    query, key = qk_clip_factors(max_logits, threshold=threshold, num_query_groups=groups)
    gamma = [min(1.0, threshold / value) if value > 0 else 1.0 for value in values]
    both = query * key.repeat_interleave(3)
    torch.testing.assert_close(both, torch.tensor(gamma, dtype=torch.float64), rtol=1e-12, atol=0)
    for factors in (query, key):
        assert (factors > 0).all()
        assert (factors <= 1 + 1e-12).all()


def test_a_half_precision_copy_is_rounded_once():
    """Factors are not rounded before they multiply: a bf16 weight ends within half a unit."""
    weight = projection(4, 2).bfloat16()
    query, key = qk_clip_factors(torch.tensor([3.0, 5, 7, 9]), threshold=2.0, num_query_groups=2)
    exact, rounded = weight.double(), weight.clone()
    scale_query_key_(exact, query, key)
    scale_query_key_(rounded, query, key)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.double(), exact, rtol=2**-8, atol=0)
