"""Candidate sets against a float64 numpy reference; ties, bounds, limits, and what is refused.

Shapes: T positions, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_replay.errors import ConfigError, DataError, TrainingError
from megatron_replay.functional import SelectedCandidates, select_candidates
from megatron_replay.selection import shard_selection
from megatron_replay.selection.shard_selection import token_masses

#: A cut may differ from real arithmetic's only this close to the coverage (see candidates.py).
CUT_MARGIN = 2.0**-19
seeds = st.integers(0, 2**31)


def first_tokens(logits_V: np.ndarray) -> np.ndarray:
    """All ids by (logit descending, id ascending)."""
    return np.lexsort((np.arange(len(logits_V)), -logits_V))


def check(logits_TV: Tensor, labels_T: Tensor, **options: Any) -> None:
    """Every field against float64. K may differ only where a sum is at the coverage.

    Within their bounds exactly: the store refuses a tail of -1e-8.
    """
    sets = select_candidates(logits_TV, labels_T, **options)
    tau, cap = options.get("coverage", 0.95), options.get("max_candidates", 200)
    assert ((sets.tail_mass_T >= 0) & (sets.tail_mass_T <= 1)).all()
    assert (sets.label_logprob_T <= sets.max_logprob_T).all()
    assert (sets.max_logprob_T <= 0).all()
    for t, logits_V in enumerate(logits_TV.double().numpy()):
        V, label = len(logits_V), int(labels_T[t])
        order, masses_V = first_tokens(logits_V), np.exp(logits_V - logits_V.max())
        p_V = masses_V / masses_V.sum()
        cumulative = np.cumsum(p_V[order])
        margin = CUT_MARGIN + V * 2.0**-39
        fewest = int((cumulative < tau - margin).sum()) + 1
        most = int((cumulative < tau + margin).sum()) + 1
        K = int(sets.num_candidates_T[t])
        assert min(fewest, cap, V) <= K <= min(most, cap, V)
        chosen = set(order[:K].tolist())
        found = sets.ids[sets.offsets[t] : sets.offsets[t + 1]].tolist()
        assert found == sorted(chosen | {label})
        assert bool(sets.label_appended_T[t]) == (label not in chosen)
        lse = logits_V.max() + math.log(masses_V.sum())
        log_total, below = math.log(masses_V.sum()), logits_V[label] - logits_V.max()
        assert float(sets.lse_T[t]) == pytest.approx(lse, rel=1e-6, abs=2e-6)
        assert float(sets.label_logprob_T[t]) == pytest.approx(
            below - log_total, rel=1e-6, abs=4e-6
        )
        assert float(sets.max_logprob_T[t]) == pytest.approx(-log_total, abs=2e-6)
        assert float(sets.tail_mass_T[t]) == pytest.approx(1 - p_V[found].sum(), abs=margin)
        if min(cap, V) > K:  # Corollary 1
            assert sets.tail_mass_T[t] <= torch.tensor(1 - tau)


@given(
    seed=seeds,
    V=st.integers(1, 400),
    cap=st.integers(1, 255),
    coverage=st.sampled_from([1e-9, 0.05, 0.5, 0.95, 0.999, 1.0]),
    scale=st.sampled_from([0.0, 0.3, 2.0, 8.0, 1e4, 1e37]),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_against_float64(
    seed: int, V: int, cap: int, coverage: float, scale: float, masked: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = 1e4 if dtype is torch.float16 and scale > 1e4 else scale
    logits_TV = torch.randn(4, V, generator=generator) * scale
    labels_T = torch.randint(V, (4,), generator=generator)
    kept = logits_TV.gather(1, labels_T[:, None])
    logits_TV[torch.rand(4, V, generator=generator) < masked] = -math.inf
    logits_TV = logits_TV.scatter_(1, labels_T[:, None], kept).to(dtype)
    check(logits_TV, labels_T, coverage=coverage, max_candidates=cap)


@given(seed=seeds, levels=st.integers(1, 6), cap=st.integers(1, 60))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_ties_go_to_the_smaller_id(seed: int, levels: int, cap: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_TV = torch.randint(levels, (5, 300), generator=generator).float() - 3
    negated_TV = (logits_TV == 0) & (torch.rand(5, 300, generator=generator) < 0.5)
    logits_TV[negated_TV] = -0.0
    labels_T = torch.randint(300, (5,), generator=generator)
    check(logits_TV, labels_T, coverage=0.99, max_candidates=cap)


def test_a_vocabulary_of_a_real_model() -> None:
    """151,936 tokens, one of them held by half the mass: 2^-39 a token must not add up."""
    generator = torch.Generator().manual_seed(0)
    logits_TV = torch.randn(2, 151_936, generator=generator) * torch.tensor([[0.01], [3.0]])
    logits_TV[0, 77] = math.log(151_936)
    check(logits_TV, torch.tensor([5, 151_935]), coverage=0.9, max_candidates=200)


@given(
    seed=seeds,
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
    logits_TV[logits_TV == 0] = -0.0
    found = shard_selection.shard_tokens(logits_TV, None, vocab_start=7, count=cap)
    for t, logits_V in enumerate(logits_TV.numpy()):
        expected = first_tokens(logits_V)[:cap]
        assert np.array_equal(found.ids_TK[t].numpy(), expected + 7)
        # +0.0 for -0.0: a device may order bits.
        assert found.values_TK[t].numpy().tobytes() == (logits_V[expected] + 0.0).tobytes()


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


@pytest.mark.parametrize("start", [0, 1, 5, 13])
def test_a_mass_has_the_same_bits_on_every_device(start: int) -> None:
    """Computed again in numpy, one correctly rounded fp32 operation after the other; wherever a
    number lies in a vector register.
    """
    f = np.float32
    x = -np.geomspace(1e-9, 30, 100_000, dtype=f)[start:]
    t = np.maximum(x, f(-28)) * f(1.4426950216293335)
    k = np.rint(t)
    t -= k
    upper = t * f(0.001326471334323287) + f(0.009671523235738277)
    middle = t * f(0.05550733953714371) + f(0.24022242426872253)
    p = (upper * (t * t) + middle) * (t * t) + (t * f(0.6931470036506653) + f(1.0))
    expected = np.rint(np.ldexp(p, k.astype(np.int32) + 38)).astype(np.int64)
    found = token_masses(torch.from_numpy(x)[None], torch.zeros(1))[0]
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize(
    ("logits_V", "coverage", "ids"),
    [
        # Four equal tokens: two hold one half, not less.
        *(([0.0] * 4, tau, range(K)) for tau, K in [(0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)]),
        ([0.0] * 4, 0.5 + 1e-9, range(3)),
        # exp(-26) is one unit of 2^-38; exp(-40) is none.
        ([0.0, -26.0, -40.0, -math.inf], 1.0, [0, 1]),
        ([0.0, -math.inf, 1.0], 0.95, [0, 2]),
    ],
)
def test_a_coverage_reached_exactly_counts_as_reached(
    logits_V: list[float], coverage: float, ids: Any
) -> None:
    sets = select_candidates(torch.tensor([logits_V]), torch.tensor([0]), coverage=coverage)
    assert sets.ids.tolist() == list(ids)
    assert coverage < 1 or float(sets.tail_mass_T) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_decisions_are_those_of_fp32(dtype: torch.dtype) -> None:
    """Narrow logits are widened, wide ones rounded first: two doubles one fp32 apart tie."""
    logits_TV = torch.tensor([[1.0, 1.0 + 2.0**-40, 0.5, 1.0]], dtype=dtype)
    for coverage, ids in ((0.5, [0, 1]), (0.1, [0])):
        sets = select_candidates(logits_TV, torch.tensor([0]), coverage=coverage, max_candidates=2)
        assert sets.ids.tolist() == ids


def test_chunks_change_nothing() -> None:
    """More logits than torch's backend handles at a time, against halves that it does not cut."""
    generator = torch.Generator().manual_seed(0)
    logits_TV = torch.randn(400, 500, generator=generator).bfloat16()
    labels_T = torch.randint(500, (400,), generator=generator)
    options = {"max_candidates": 30, "backend": shard_selection.TORCH_SELECTION}
    whole = vars(select_candidates(logits_TV, labels_T, **options))
    parts = [logits_TV.split(200), labels_T.split(200)]
    halves = [vars(select_candidates(*half, **options)) for half in zip(*parts, strict=True)]
    for found in (whole, *halves):
        found["offsets"] = found["offsets"].diff()
    for name in whole:
        assert torch.equal(whole[name], torch.cat([half[name] for half in halves])), name


def test_types_and_no_positions() -> None:
    """And nothing is kept for autograd."""
    dtypes = {"ids": torch.int32, "offsets": torch.int64, "num_candidates_T": torch.int64}
    dtypes["label_appended_T"] = torch.bool
    for T in (0, 3):
        logits_TV = torch.zeros(T, 7, requires_grad=True)
        sets = select_candidates(logits_TV, torch.zeros(T, dtype=torch.int64))
        assert len(sets.offsets) == T + 1
        for name in SelectedCandidates.__dataclass_fields__:
            field = getattr(sets, name)
            assert field.dtype == dtypes.get(name, torch.float32)
            assert not field.requires_grad
            assert not name.endswith("_T") or field.shape == (T,)


ZEROS = torch.zeros(2, 5)


def with_one(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([[0.0] * 5, [0.0, 0.0, value, 0.0, 0.0]], dtype=dtype)


@pytest.mark.parametrize(
    ("error", "logits_TV", "label", "options", "message"),
    [
        *(
            (TrainingError, with_one(value, dtype), 0, {}, "row 1: .*NaN or inf.*1 such rows of 2")
            for value in (math.nan, math.inf)
            for dtype in (torch.float32, torch.bfloat16)
        ),
        (TrainingError, with_one(-math.inf), 2, {}, "row 1: the label's logit is -inf.*label 2"),
        (TrainingError, ZEROS - math.inf, 2, {}, "row 0: .*only -infinity"),
        (DataError, ZEROS, -1, {}, r"row 1: a label is outside .*found -1\)"),
        (DataError, ZEROS, 5, {}, r"row 1: a label is outside .*found 5\)"),
        (DataError, torch.zeros(3, 5), 0, {}, "shapes do not fit"),
        (DataError, torch.zeros(2, 0), 0, {}, "shapes do not fit"),
        (DataError, torch.zeros(2), 0, {}, "shapes do not fit"),
        (ConfigError, ZEROS, 0, {"coverage": 0.0}, "coverage: out of range"),
        (ConfigError, ZEROS, 0, {"coverage": 1.1}, "coverage: out of range"),
        (ConfigError, ZEROS, 0, {"max_candidates": 0}, "max_candidates: out of range"),
        (ConfigError, ZEROS, 0, {"max_candidates": 256}, "max_.*expected 1 to 255; found 256"),
        (ConfigError, ZEROS, 0, {"vocab_start": 1 << 24}, "vocabulary is too large"),
        (
            ConfigError,
            ZEROS,
            0,
            {"backend": "torch"},
            "backend: .*SELECTION.choose returns; found .torch",
        ),
    ],
)
def test_what_is_refused(
    error: type[Exception], logits_TV: Tensor, label: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(error, match=message):
        select_candidates(logits_TV, torch.tensor([0, label]), **options)
