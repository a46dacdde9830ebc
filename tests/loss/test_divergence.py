"""The divergence from stored logits against its definition in float64.

Shapes: T positions, V vocabulary, H hidden channels.
"""

from __future__ import annotations

import pytest
import torch

from megatron_replay.loss.blocks import Blocks
from tests.loss.references import HeadCase, error, head_case, soft_targets


@pytest.mark.parametrize("groups", [0, 4])
@pytest.mark.parametrize("positions", [7, 128])
def test_equals_the_definition(
    groups: int, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over own sets and shared ones, which hold more than a position's own; in blocks of any size;
    with the weight's gradient by autograd and without.
    """
    monkeypatch.setattr(Blocks, "POSITIONS", positions)
    case = head_case(T=300, V=64, H=16, seed=groups, groups=groups, share=0.1, scale=0.3)
    stored = case.stored(seed=1)
    expected = case.dense(stored=stored, kl_weight=0.7)
    for out in (None, torch.zeros(64, 16)):
        found = case.run(stored=stored, kl_weight=0.7, weight_grad_out=out)
        for ours, exact in zip(found, expected, strict=True):
            assert error(ours, exact) < 2e-6


def test_nothing_to_learn_from_the_distribution_that_the_model_has() -> None:
    """KL(p || p) = 0, and so is its gradient: what is left is the cross-entropy's."""
    case = head_case(T=20, V=30, H=8, seed=4, scale=0.3)
    z_TV = case.hidden_TH @ case.weight_VH.T
    stored = case.ids, case.offsets, z_TV[case.mask_TV]
    for ours, exact in zip(case.run(stored=stored, kl_weight=5.0), case.dense(), strict=True):
        assert error(ours, exact) < 1e-5


def test_no_positions_and_shards_without_a_candidate() -> None:
    none = torch.zeros(0)
    nowhere = HeadCase(
        torch.ones(0, 3), torch.ones(9, 3), none.long(), none, torch.zeros(0, 9).bool(), None
    )
    stored = nowhere.ids, nowhere.offsets, none
    loss_T, dH_TH, dW_VH = nowhere.run(stored=stored, kl_weight=1.0)
    assert (loss_T.shape, dH_TH.shape, bool(dW_VH.any())) == ((0,), (0, 3), False)
    elsewhere = torch.tensor([1, 2]).int(), torch.tensor([0, 2]), torch.tensor([0.0, 0.0])
    targets = soft_targets(torch.tensor([1]), *elsewhere, 4, 4)
    assert targets.blocks.spans == []
    assert float(targets.negentropy_N) == pytest.approx(-0.693147, abs=1e-6)


def test_bf16_operands_are_multiplied_in_fp32() -> None:
    case = head_case(T=20, V=40, H=32, seed=5, scale=0.3)
    case.hidden_TH, case.weight_VH = case.hidden_TH.bfloat16(), case.weight_VH.bfloat16()
    stored, out_VH = case.stored(seed=1), torch.zeros(40, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case.run(stored=stored, kl_weight=0.5, dtype=torch.bfloat16, weight_grad_out=out_VH)
    expected = case.dense(stored=stored, kl_weight=0.5)
    for ours, exact, bound in zip(found, expected, (2e-6, 1e-2, 2e-6), strict=True):
        assert error(ours, exact) < bound
