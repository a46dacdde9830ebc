"""Candidate sets against a float64 numpy reference; ties, bf16, bounds, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.errors import ConfigError, DataError, TrainingError
from megatron_replay.functional import SelectedCandidates, select_candidates
from megatron_replay.selection import shard_selection
from tests.loss.references import CUT_MARGIN, first_tokens, probabilities


def set_of(sets: SelectedCandidates, t: int) -> list[int]:
    return sets.ids[sets.offsets[t] : sets.offsets[t + 1]].tolist()


def check(logits_TV: torch.Tensor, labels_T: torch.Tensor, **options: Any) -> None:
    """Every field against float64. K may differ only where a sum is at the coverage."""
    sets = select_candidates(logits_TV, labels_T, **options)
    tau, cap = options.get("coverage", 0.95), options.get("max_candidates", 200)
    for t, logits_V in enumerate(logits_TV.double().numpy()):
        V, label = len(logits_V), int(labels_T[t])
        order, p_V = first_tokens(logits_V), probabilities(logits_V)
        cumulative = np.cumsum(p_V[order])
        margin = CUT_MARGIN + V * 2.0**-39
        fewest = int((cumulative < tau - margin).sum()) + 1
        most = int((cumulative < tau + margin).sum()) + 1
        K = int(sets.num_candidates_T[t])
        assert min(fewest, cap, V) <= K <= min(most, cap, V)
        chosen = set(order[:K].tolist())
        assert set_of(sets, t) == sorted(chosen | {label})
        assert bool(sets.label_appended_T[t]) == (label not in chosen)
        lse = logits_V.max() + math.log(np.exp(logits_V - logits_V.max()).sum())
        inside = p_V[sorted(chosen | {label})].sum()
        assert float(sets.lse_T[t]) == pytest.approx(lse, rel=1e-6, abs=2e-6)
        assert float(sets.label_logprob_T[t]) == pytest.approx(logits_V[label] - lse, abs=4e-6)
        assert float(sets.max_logprob_T[t]) == pytest.approx(logits_V.max() - lse, abs=2e-6)
        assert float(sets.tail_mass_T[t]) == pytest.approx(1 - inside, abs=margin)
        if min(cap, V) > K:  # Corollary 1
            assert sets.tail_mass_T[t] <= torch.tensor(1 - tau)


@given(
    seed=st.integers(0, 2**31),
    V=st.integers(1, 400),
    cap=st.integers(1, 255),
    coverage=st.sampled_from([0.05, 0.5, 0.9, 0.95, 0.999]),
    scale=st.sampled_from([0.0, 0.3, 2.0, 8.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=120, deadline=None, derandomize=True)
def test_against_float64(
    seed: int, V: int, cap: int, coverage: float, scale: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_TV = (torch.randn(4, V, generator=generator) * scale).to(dtype)
    labels_T = torch.randint(V, (4,), generator=generator)
    check(logits_TV, labels_T, coverage=coverage, max_candidates=cap)


@given(seed=st.integers(0, 2**31), levels=st.integers(1, 6), cap=st.integers(1, 60))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_ties_go_to_the_smaller_id(seed: int, levels: int, cap: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_TV = torch.randint(levels, (5, 300), generator=generator).float() - 3
    negated_TV = (logits_TV == 0) & (torch.rand(5, 300, generator=generator) < 0.5)
    logits_TV[negated_TV] = -0.0
    labels_T = torch.randint(300, (5,), generator=generator)
    check(logits_TV, labels_T, coverage=0.99, max_candidates=cap)


@given(
    seed=st.integers(0, 2**31),
    V=st.sampled_from([64, 65, 1281, 1920, 4099]),
    cap=st.sampled_from([1, 2, 20, 29, 255]),
    levels=st.sampled_from([1, 2, 40, 10**6]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_first_tokens_are_found_in_few_blocks(seed: int, V: int, cap: int, levels: int) -> None:
    """More blocks than candidates and fewer; ties of maxima; rows that are -inf but for a few."""
    generator = torch.Generator().manual_seed(seed)
    logits_TV = torch.randint(-levels, levels, (3, V), generator=generator).float()
    logits_TV[1, torch.rand(V, generator=generator) < 0.99] = -math.inf
    logits_TV[1:, int(torch.randint(V, (), generator=generator))] = 3.0
    _, _, keys_TK = shard_selection.shard_tokens(logits_TV, None, vocab_start=7, count=cap)
    values_TK, ids_TK = shard_selection.values_and_ids(keys_TK)
    for t, logits_V in enumerate(logits_TV.numpy()):
        expected = first_tokens(logits_V)[:cap]
        assert np.array_equal(ids_TK[t].numpy(), expected + 7)
        assert np.array_equal(values_TK[t].numpy(), logits_V[expected])


def test_coverage_reached_exactly_counts_as_reached() -> None:
    """Four equal tokens: two hold one half, not less."""
    logits_TV, labels_T = torch.zeros(1, 4), torch.tensor([0])
    for coverage, size in [(0.25, 1), (0.5, 2), (0.5 + 1e-9, 3), (0.75, 3), (1.0, 4)]:
        sets = select_candidates(logits_TV, labels_T, coverage=coverage)
        assert int(sets.num_candidates_T) == size


def test_a_coverage_of_one_takes_all_that_has_mass() -> None:
    """exp(-26) is one unit of 2^-38; exp(-40) is none."""
    logits_TV = torch.tensor([[0.0, -26.0, -40.0, -math.inf]])
    sets = select_candidates(logits_TV, torch.tensor([0]), coverage=1.0)
    assert sets.ids.tolist() == [0, 1]
    assert float(sets.tail_mass_T) == 0.0


def test_chunks_change_nothing() -> None:
    """More logits than torch's backend handles at a time, against halves that it does not cut."""
    generator = torch.Generator().manual_seed(0)
    logits_TV = torch.randn(400, 500, generator=generator).bfloat16()
    labels_T = torch.randint(500, (400,), generator=generator)
    options = {"max_candidates": 30, "backend": shard_selection.TORCH_SELECTION}
    whole = select_candidates(logits_TV, labels_T, **options)
    halves = [
        select_candidates(logits, labels, **options)
        for logits, labels in zip(logits_TV.split(200), labels_T.split(200), strict=True)
    ]
    for name in set(SelectedCandidates.__dataclass_fields__) - {"offsets"}:
        parts = [getattr(half, name) for half in halves]
        assert torch.equal(getattr(whole, name), torch.cat(parts)), name
    sizes = torch.cat([half.offsets.diff() for half in halves])
    assert torch.equal(whole.offsets.diff(), sizes)


def test_types_and_no_positions() -> None:
    """And nothing is kept for autograd."""
    for T in (0, 3):
        logits_TV = torch.zeros(T, 7, requires_grad=True)
        sets = select_candidates(logits_TV, torch.zeros(T, dtype=torch.int64))
        assert not sets.lse_T.requires_grad
        assert (sets.ids.dtype, sets.offsets.dtype) == (torch.int32, torch.int64)
        assert len(sets.offsets) == T + 1
        for name in ("lse_T", "label_logprob_T", "max_logprob_T", "tail_mass_T"):
            assert getattr(sets, name).dtype == torch.float32
            assert getattr(sets, name).shape == (T,)
        assert sets.num_candidates_T.shape == sets.label_appended_T.shape == (T,)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_are_not_finite_are_refused_by_row(value: float, dtype: torch.dtype) -> None:
    logits_TV = torch.zeros(4, 9, dtype=dtype)
    logits_TV[2, 5] = value
    with pytest.raises(TrainingError, match=r"row 2: .*NaN or infinity.*1 such rows of 4"):
        select_candidates(logits_TV, torch.zeros(4, dtype=torch.int64))


def test_minus_infinity_is_probability_zero_but_not_for_a_label() -> None:
    logits_TV = torch.tensor([[0.0, -math.inf, 1.0]])
    assert select_candidates(logits_TV, torch.tensor([0])).ids.tolist() == [0, 2]
    with pytest.raises(TrainingError, match=r"row 0: the label's logit is -infinity.*label 1"):
        select_candidates(logits_TV, torch.tensor([1]))
    with pytest.raises(TrainingError, match=r"row 0: .*only -infinity"):
        select_candidates(torch.full((1, 3), -math.inf), torch.tensor([1]))


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_outside_the_vocabulary_is_refused(label: int) -> None:
    with pytest.raises(DataError, match=rf"row 1: a label is outside .*found {label}\)"):
        select_candidates(torch.zeros(2, 5), torch.tensor([0, label]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coverage": 0.0}, "coverage: out of range"),
        ({"coverage": 1.1}, "coverage: out of range"),
        ({"max_candidates": 0}, "max_candidates: out of range"),
        ({"max_candidates": 256}, r"max_candidates: out of range \(expected 1 to 255; found 256\)"),
        ({"vocab_start": 1 << 24}, "vocabulary is too large"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select_candidates(torch.zeros(1, 5), torch.tensor([0]), **options)


@pytest.mark.parametrize("shape", [(2, 5), (1, 0), (5,)])
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="shapes do not fit"):
        select_candidates(torch.zeros(shape), torch.zeros(1, dtype=torch.int64))
