"""The restricted loss: the paper's Appendix C.2 as properties, and float64 autograd as the oracle.

tests/kernels/test_head.py runs every backend on operands and sets of unusual kinds.

Shapes: T positions, V vocabulary, H hidden channels.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_replay.errors import ConfigError, DataError
from megatron_replay.functional import (
    restricted_cross_entropy,
    restricted_cross_entropy_dense,
    select_candidates,
)
from megatron_replay.loss import blocks
from megatron_replay.loss.blocks import UNION, Blocks
from tests.loss.references import equal, error, ghosts, head_case

seeds = st.integers(0, 2**31)


def logit_gradient(logits_TV: Tensor, ids: Tensor, offsets: Tensor, labels_T: Tensor) -> Tensor:
    """dL/dz [T, V] of the sharded form: with the identity as weight, the hidden state is z."""
    logits_TV = logits_TV.clone().requires_grad_()
    weight = torch.eye(logits_TV.shape[1])
    restricted_cross_entropy(logits_TV, weight, ids, offsets, labels_T).sum().backward()
    assert logits_TV.grad is not None
    return logits_TV.grad.double()


@given(seed=seeds, V=st.integers(2, 50), share=st.floats(0.0, 1.0))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_lemma_1_proposition_1(seed: int, V: int, share: float) -> None:
    """g = p~ - y in S, 0 outside; dg against the full loss has l1 norm 2 rho, l2 at most that."""
    case = head_case(T=6, V=V, H=V, seed=seed, share=share, scale=2.0)
    logits_TV, mask_TV = case.hidden_TH, case.mask_TV
    grad_TV = logit_gradient(logits_TV, case.ids, case.offsets, case.labels_T)
    p_TV = logits_TV.double().softmax(1)
    y_TV = F.one_hot(case.labels_T, V)
    rho_T1 = (p_TV * ~mask_TV).sum(1, keepdim=True)
    expected_TV = torch.where(mask_TV, p_TV / (1 - rho_T1) - y_TV, 0.0)
    assert (grad_TV[~mask_TV] == 0).all()
    assert (grad_TV - expected_TV).abs().max() < 1e-6
    bias_TV = grad_TV - (p_TV - y_TV)
    assert (bias_TV.abs().sum(1, keepdim=True) - 2 * rho_T1).abs().max() < 5e-6
    assert (bias_TV.norm(dim=1, keepdim=True) <= 2 * rho_T1 + 1e-6).all()


@given(seed=seeds, coverage=st.sampled_from([0.5, 0.9, 0.99]))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_corollary_1_bias_is_bounded_by_coverage(seed: int, coverage: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_TV = torch.randn(8, 60, generator=generator) * 2
    labels_T = torch.randint(60, (8,), generator=generator)
    sets = select_candidates(logits_TV, labels_T, coverage=coverage)
    full_TV = logits_TV.double().softmax(1) - F.one_hot(labels_T, 60)
    bias_TV = logit_gradient(logits_TV, sets.ids, sets.offsets, labels_T) - full_TV
    assert (bias_TV.abs().sum(1) <= 2 * (1 - coverage) + 5e-6).all()


@pytest.mark.parametrize("groups", [0, 3])
def test_the_whole_vocabulary_gives_full_cross_entropy(groups: int) -> None:
    case = head_case(T=9, V=33, H=8, seed=0, share=1.0, groups=groups)
    case.mask_GV[:] = True
    for found, expected in zip(case.run(), case.dense_full(), strict=True):
        assert error(found, expected) < 1e-6


@given(seed=seeds)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_the_definition_is_cross_entropy_on_the_picked_logits(seed: int) -> None:
    case = head_case(T=5, V=20, H=3, seed=seed)
    logits_TV = (case.hidden_TH @ case.weight_VH.T).double()
    tail_T = case.upstream_T.double()
    loss_T = restricted_cross_entropy_dense(logits_TV, case.mask_TV, case.labels_T, tail_T)
    for t, logits_V in enumerate(logits_TV):
        picked = case.mask_TV[t].nonzero().squeeze(1)
        label = (picked == case.labels_T[t]).nonzero().squeeze()
        terms = torch.cat([logits_V[picked], tail_T[t, None]])
        assert float(loss_T[t]) == pytest.approx(float(F.cross_entropy(terms, label)), rel=1e-12)


@given(
    seed=seeds,
    T=st.integers(1, 300),
    V=st.integers(2, 90),
    groups=st.integers(0, 6),
    tail=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_against_float64_autograd(
    seed: int, T: int, V: int, groups: int, tail: bool, scale: float
) -> None:
    case = head_case(T=T, V=V, H=8, seed=seed, groups=groups, scale=scale)
    tail_logit_T = ghosts(case) if tail else None
    found = case.run(tail_logit_T=tail_logit_T)
    assert found[0].dtype == torch.float32
    # A logit is a sum of H products: its rounding, not the loss's own, grows with the scale.
    case.check(found, case.dense(tail_logit_T), bound=1e-6 * max(1.0, scale))


@pytest.mark.parametrize("groups", [0, 5])
@pytest.mark.parametrize("ghost", [False, True])
def test_gradients_are_within_a_millionth_of_their_largest_entry(groups: int, ghost: bool) -> None:
    for seed in range(5):
        case = head_case(T=200, V=300, H=32, seed=seed, groups=groups, scale=0.3)
        tail_logit_T = case.upstream_T * 2 if ghost else None
        found = case.run(tail_logit_T=tail_logit_T)
        for ours, dense in zip(found, case.dense(tail_logit_T), strict=True):
            assert error(ours, dense) < 1e-6


@pytest.mark.parametrize("groups", [0, 2])
def test_tiles_of_any_size(monkeypatch: pytest.MonkeyPatch, groups: int) -> None:
    case = head_case(T=40, V=50, H=4, seed=3, groups=groups)
    monkeypatch.setattr(Blocks, "POSITIONS", 7)
    monkeypatch.setattr(blocks, "SHARED_POSITIONS", 7)
    case.check(case.run(backend=UNION))


@pytest.mark.parametrize("backend", [None, UNION], ids=["compiled", "union"])
def test_bf16_operands_are_multiplied_in_fp32_also_under_autocast(backend: Any) -> None:
    """Equal to the fp32 result on the rounded operands, up to the rounding of the gradients."""
    case = head_case(T=20, V=40, H=64, seed=5)
    case.hidden_TH, case.weight_VH = case.hidden_TH.bfloat16(), case.weight_VH.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case.run(dtype=torch.bfloat16, backend=backend)
    loss_T, dH_TH, dW_VH = case.run(backend=backend)
    assert equal(found, [loss_T, dH_TH.bfloat16(), dW_VH.bfloat16()])


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels_T": torch.tensor([2, 2])}, "position 1: the label is not in .*label 2; 1 such"),
        ({"candidate_ids": ids(2, 2, 1, 5)}, "set 0: ids must ascend.*2 before 2"),
        ({"candidate_ids": ids(0, 2, 5, 1)}, "set 1: ids must ascend.*5 before 1"),
        ({"candidate_ids": ids(0, 2, 1, 6)}, "outside the vocabulary .*ids 0 to 5; found 6"),
        ({"candidate_ids": ids(-1, 2, 1, 5)}, "outside the vocabulary .*found -1"),
        ({"candidate_offsets": torch.tensor([0, 3, 2])}, "candidate_offsets: .*not decrease"),
        ({"candidate_offsets": torch.tensor([0, 2, 3])}, "expected 0 to 4; found 0 to 3"),
        ({"candidate_offsets": torch.tensor([0, 4])}, "expected 2 sets; found 1"),
        ({"group_offsets": torch.tensor([0, 2])}, "expected 1 sets; found 2"),
        ({"group_offsets": torch.tensor([0, 1, 1])}, "group_offsets: .*expected 0 to 2"),
        ({"tail_logit_T": torch.tensor([0.0, math.inf])}, "a tail logit is NaN"),
        ({"tail_logit_T": torch.tensor([math.nan, 0.0])}, "a tail logit is NaN"),
        ({"tail_logit_T": torch.zeros(3)}, r"shapes do not fit .*\[2\], \[3\]"),
        ({"weight_VH": torch.ones(6, 4)}, "shapes do not fit"),
        ({"weight_grad_out": torch.zeros(6, 4)}, "shapes do not fit"),
        ({"weight_grad_out": torch.zeros(6, 3).half()}, "summed in fp32"),
        ({"candidate_ids": ids(0, 2, 1, 5).long()}, "candidate_ids: .*expected torch.int32"),
        ({"candidate_offsets": torch.tensor([0, 2, 4]).int()}, "offsets: .*expected torch.int64"),
        ({"labels_T": torch.tensor([2.0, 1.0])}, "labels_T: .*expected torch.int64"),
        ({"labels_T": torch.tensor([2])}, "shapes do not fit"),
        ({"backend": "cpu"}, r"expected what kernels\.HEAD\.choose returns"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    """Two positions over a vocabulary of 6, with one thing changed."""
    operands: dict[str, Any] = {
        "hidden_TH": torch.ones(2, 3),
        "weight_VH": torch.ones(6, 3),
        "candidate_ids": ids(0, 2, 1, 5),
        "candidate_offsets": torch.tensor([0, 2, 4]),
        "labels_T": torch.tensor([2, 1]),
    }
    restricted_cross_entropy(**operands)
    with pytest.raises((DataError, ConfigError), match=message):
        restricted_cross_entropy(**{**operands, **changes})


def test_second_derivatives_are_refused() -> None:
    """Backward recomputes in place: a second derivative through it would be silently wrong."""
    case = head_case(T=4, V=9, H=3, seed=5)
    hidden_TH = case.hidden_TH.clone().requires_grad_()
    loss_T = restricted_cross_entropy(
        hidden_TH, case.weight_VH, case.ids, case.offsets, case.labels_T
    )
    (gradient,) = torch.autograd.grad((loss_T**2).sum(), hidden_TH, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
