"""What the store relies on at its limits: masses that do not move, and values within bounds.

Shapes: T positions, V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.functional import select_candidates
from megatron_replay.selection.shard_selection import token_masses
from tests.loss.references import first_tokens, probabilities


@given(seed=st.integers(0, 2**31), size=st.integers(1, 200), start=st.integers(0, 130))
@settings(max_examples=60, deadline=None)
def test_a_mass_is_the_same_wherever_it_is_computed(seed: int, size: int, start: int) -> None:
    """Whole rows, a strided slice, a packed slice and a gather: the sums over shards need it."""
    generator = torch.Generator().manual_seed(seed)
    logits_TV = torch.randn(3, 331, generator=generator) * 6
    max_T = logits_TV.amax(1)
    whole_TV = token_masses(logits_TV, max_T)
    part = slice(start, start + size)
    order = torch.randperm(331, generator=generator)[:size].expand(3, -1)
    assert torch.equal(token_masses(logits_TV[:, part], max_T), whole_TV[:, part])
    assert torch.equal(token_masses(logits_TV[:, part].clone(), max_T), whole_TV[:, part])
    gathered = token_masses(logits_TV.gather(1, order), max_T)
    assert torch.equal(gathered, whole_TV.gather(1, order))


def test_a_mass_is_the_power_of_e_it_stands_for() -> None:
    """Against float64, over fp32 numbers of every size; none above that of 0, which is exact."""
    steps = torch.arange(0x30000000, 0x41E00000, 977, dtype=torch.int32)  # 4.7e-10 to 28
    x = -torch.cat([steps.view(torch.float32), torch.tensor([0.0, 1e-40, 28.0])])
    found = token_masses(x[None], torch.zeros(1))[0]
    exact = x.double().exp() * 2.0**38
    assert ((found - exact).abs() <= 0.5 + exact * 2.0**-19.05).all()
    assert int(found[-3]) == 2**38
    assert int(found.max()) == 2**38
    assert int(found[-1]) == 0


def test_a_mass_has_the_same_bits_on_every_device() -> None:
    """Computed again in numpy, one correctly rounded fp32 operation after the other."""
    f = np.float32
    x = -np.geomspace(1e-9, 30, 100_000, dtype=f)
    t = np.maximum(x, f(-28)) * f(1.4426950216293335)
    k = np.rint(t)
    t -= k
    upper = t * f(0.001326471334323287) + f(0.009671523235738277)
    middle = t * f(0.05550733953714371) + f(0.24022242426872253)
    p = (upper * (t * t) + middle) * (t * t) + (t * f(0.6931470036506653) + f(1.0))
    expected = np.rint(np.ldexp(p, k.astype(np.int32) + 38)).astype(np.int64)
    found = token_masses(torch.from_numpy(x)[None], torch.zeros(1))[0]
    assert expected.dtype == np.int64
    assert np.array_equal(found.numpy(), expected)


@given(
    seed=st.integers(0, 2**31),
    V=st.integers(1, 260),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e4, 1e37]),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
    cap=st.sampled_from([1, 20, 255]),
    coverage=st.sampled_from([1e-9, 0.95, 1.0]),
)
@settings(max_examples=120, deadline=None)
def test_probabilities_are_probabilities(
    seed: int, V: int, scale: float, masked: float, cap: int, coverage: float
) -> None:
    """The store refuses a tail of -1e-8, and so it must: here none is rounded past its bound."""
    generator = torch.Generator().manual_seed(seed)
    logits_TV = torch.randn(6, V, generator=generator) * scale
    labels_T = torch.randint(V, (6,), generator=generator)
    kept = logits_TV.gather(1, labels_T[:, None])
    logits_TV[torch.rand(6, V, generator=generator) < masked] = -math.inf
    logits_TV.scatter_(1, labels_T[:, None], kept)
    sets = select_candidates(logits_TV, labels_T, coverage=coverage, max_candidates=cap)
    assert ((sets.tail_mass_T >= 0) & (sets.tail_mass_T <= 1)).all()
    assert (sets.label_logprob_T <= sets.max_logprob_T).all()
    assert (sets.max_logprob_T <= 0).all()
    assert sets.lse_T.isfinite().all()
    sizes = sets.offsets.diff()
    assert torch.equal(sizes, sets.num_candidates_T + sets.label_appended_T)
    assert int(sizes.max()) <= cap + 1
    assert int(sets.num_candidates_T.min()) >= 1
    position = torch.arange(6).repeat_interleave(sizes)
    assert ((sets.ids.diff() > 0) | (position.diff() > 0)).all()
    assert torch.equal(position[sets.ids == labels_T[position]], torch.arange(6))


def test_a_vocabulary_of_a_real_model() -> None:
    """151,936 tokens, one of them held by half the mass: 2^-39 a token must not add up."""
    generator = torch.Generator().manual_seed(0)
    logits_TV = torch.randn(2, 151_936, generator=generator) * torch.tensor([[0.01], [3.0]])
    logits_TV[0, 77] = math.log(151_936)
    labels_T = torch.tensor([5, 151_935])
    sets = select_candidates(logits_TV, labels_T, coverage=0.9, max_candidates=200)
    for t, logits_V in enumerate(logits_TV.double().numpy()):
        p_V = probabilities(logits_V)
        chosen = sets.ids[sets.offsets[t] : sets.offsets[t + 1]].numpy()
        expected = {*first_tokens(logits_V)[:200].tolist(), int(labels_T[t])}
        assert set(chosen.tolist()) == expected
        lse = float(torch.tensor(logits_V).logsumexp(0))
        assert float(sets.lse_T[t]) == pytest.approx(lse, abs=1e-6)
        assert float(sets.tail_mass_T[t]) == pytest.approx(1 - p_V[chosen].sum(), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_decisions_are_those_of_fp32(dtype: torch.dtype) -> None:
    """Narrow logits are widened, wide ones rounded first: two doubles one fp32 apart tie."""
    logits_TV = torch.tensor([[1.0, 1.0 + 2.0**-40, 0.5, 1.0]], dtype=dtype)
    sets = select_candidates(logits_TV, torch.tensor([0]), coverage=0.5, max_candidates=2)
    assert sets.ids.tolist() == [0, 1]
    sets = select_candidates(logits_TV, torch.tensor([0]), coverage=0.1)
    assert sets.ids.tolist() == [0]
