"""QK-Clip against the logits themselves, computed anew in float64 from the clipped weights."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_replay.optim.muonclip import max_over_replicas, qk_clip_factors, scale_query_key_
from tests import pool

HIDDEN, CHANNELS, TOKENS = 24, 6, 10


def projection(heads: int, groups: int, seed: int = 0) -> Tensor:
    """[(N + 2 G) D, H] in float64, some heads large, some small."""
    generator = torch.Generator().manual_seed(seed)
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
        own = heads[group * size : (group + 1) * size]
        queries += own[:-2]
        keys.append(own[-2])
        values.append(own[-1])
    return queries, keys, values


def largest_logits(weight: Tensor, groups: int, seed: int = 1) -> Tensor:
    """S_h of a fixed batch: one head after the other, over causal pairs."""
    generator = torch.Generator().manual_seed(seed)
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
    assert (after <= threshold * (1 + 1e-6)).all()
    torch.testing.assert_close(after, before.clamp(max=threshold), rtol=1e-6, atol=0)
    values, untouched = (torch.stack(parts(w, groups)[2]) for w in (clipped, weight))
    assert torch.equal(values, untouched)


def test_a_head_alone_with_its_key_shares_evenly():
    """One query head a group: both sides take sqrt(gamma), as in Kimi K2."""
    factors = qk_clip_factors(torch.tensor([400.0, 50.0]), threshold=100.0, num_query_groups=2)
    assert [f.tolist() for f in factors] == [[0.5, 1.0], [0.5, 1.0]]


def test_a_shared_key_takes_what_all_its_heads_ask_for():
    max_logits = torch.tensor([400.0, 1600.0, 400.0, 100.0])
    query, key = qk_clip_factors(max_logits, threshold=100.0, num_query_groups=2)
    assert key.tolist() == [0.5, 1.0]
    assert query.tolist() == [0.5, 0.125, 0.25, 1.0]


def test_heads_that_are_not_clipped_keep_every_bit():
    weight = projection(8, 2).float()
    max_logits = torch.tensor([7.0, 9.0, 8.0, 3.0, -5.0, 0.0, 10.0, 1.0])
    assert torch.equal(clip(weight, max_logits, 10.0, 2), weight)
    max_logits[1] = 10.1  # one head of the first group: only its own rows change
    changed = (clip(weight, max_logits, 10.0, 2) != weight).any(1).view(-1, CHANNELS).any(1)
    assert changed.nonzero().flatten().tolist() == [1]


def test_what_is_not_finite_clips_nothing():
    nothing = torch.tensor([torch.nan, torch.inf, -torch.inf, 5.0])
    for factors in qk_clip_factors(nothing, threshold=1.0, num_query_groups=4):
        assert torch.equal(factors[:3], torch.ones(3))
        assert factors[3] == pytest.approx(0.2**0.5)


@settings(derandomize=True, deadline=None, max_examples=100, database=None)
@given(
    st.integers(1, 4).flatmap(
        lambda groups: st.tuples(
            st.just(groups),
            st.lists(st.floats(-1e4, 1e4, width=32), min_size=groups * 3, max_size=groups * 3),
        )
    ),
    st.floats(0.01, 1e3),
)
def test_every_head_shrinks_by_its_own_gamma_and_nothing_grows(case, threshold):
    groups, values = case
    max_logits = torch.tensor(values, dtype=torch.float64)
    query, key = qk_clip_factors(max_logits, threshold=threshold, num_query_groups=groups)
    gamma = [min(1.0, threshold / value) if value > 0 else 1.0 for value in values]
    both = query * key.repeat_interleave(3)
    torch.testing.assert_close(both, torch.tensor(gamma, dtype=torch.float64), rtol=1e-12, atol=0)
    assert (query > 0).all()
    assert (key > 0).all()
    assert (query <= 1 + 1e-12).all()
    assert (key <= 1).all()


def test_shards_of_tensor_parallelism_make_the_whole():
    """Heads and groups are local to a rank: clipping two halves is clipping the whole."""
    weight, groups = projection(8, 4).float(), 4
    max_logits = largest_logits(weight, groups).float()
    threshold = max_logits.median().item()
    halves = [
        clip(shard, logits, threshold, groups // 2)
        for shard, logits in zip(weight.chunk(2), max_logits.chunk(2), strict=True)
    ]
    assert torch.equal(torch.cat(halves), clip(weight, max_logits, threshold, groups))


def test_a_half_precision_copy_is_rounded_once():
    """Factors are not rounded before they multiply: a bf16 weight ends within half a unit."""
    weight = projection(4, 2).bfloat16()
    query, key = qk_clip_factors(torch.tensor([3.0, 5, 7, 9]), threshold=2.0, num_query_groups=2)
    exact, rounded = weight.double(), weight.clone()
    scale_query_key_(exact, query, key)
    scale_query_key_(rounded, query, key)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.double(), exact, rtol=2**-8, atol=0)


def test_a_weight_that_is_trained_keeps_its_gradient_and_identity():
    weight = torch.nn.Parameter(projection(4, 2).float())
    weight.grad, address = torch.ones_like(weight), weight.data_ptr()
    scale_query_key_(weight, torch.full((4,), 0.5), torch.ones(2))
    assert weight.is_leaf
    assert weight.data_ptr() == address
    assert torch.equal(weight.grad, torch.ones_like(weight))


def reduce_maxima(rank: int, world_size: int) -> list[Tensor]:
    mine = [torch.tensor([1.0, 2.0, -3.0]) * (rank + 1), torch.tensor([5.0, -1.0, 0.0]) - rank]
    alone = max_over_replicas(mine, None)
    assert all(torch.equal(a, b) for a, b in zip(alone, mine, strict=True))
    return max_over_replicas(mine, dist.group.WORLD)


@pytest.mark.distributed
def test_the_largest_of_all_replicas():
    for layers in pool.run(2, reduce_maxima):
        assert [layer.tolist() for layer in layers] == [[2.0, 4.0, -3.0], [5.0, -1.0, 0.0]]
