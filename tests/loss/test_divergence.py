"""The divergence from stored logits against its definition in float64.

Shapes: T positions, V vocabulary, H hidden channels.
"""

from __future__ import annotations

import pytest
import torch

from megatron_replay.loss.candidate_sets import Blocks
from tests.loss import tails
from tests.loss.references import HeadCase, error, head_case

EMPTY = torch.zeros(0)


@pytest.mark.parametrize("groups", [0, 4])
@pytest.mark.parametrize("out", [False, True])
def test_equals_the_definition(groups: int, out: bool) -> None:
    """Over own sets and shared ones, which hold more than a position's own."""
    case = head_case(T=300, V=64, H=16, seed=groups, groups=groups, share=0.1, scale=0.3)
    own = tails.own_sets(case, seed=1)
    found = tails.run(case, own=own, kl_weight=0.7, out=out)
    for ours, exact in zip(found, tails.dense(case, own=own, kl_weight=0.7), strict=True):
        assert error(ours, exact) < 2e-6


def test_large_blocks_and_small_ones_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    case = head_case(T=40, V=50, H=8, seed=3)
    own = tails.own_sets(case, seed=1)
    monkeypatch.setattr(Blocks, "POSITIONS", 7)
    found = tails.run(case, own=own, kl_weight=2.0)
    for ours, exact in zip(found, tails.dense(case, own=own, kl_weight=2.0), strict=True):
        assert error(ours, exact) < 2e-6


def test_nothing_to_learn_from_the_distribution_that_the_model_has() -> None:
    """KL(p || p) = 0, and so is its gradient: what is left is the cross-entropy's."""
    case = head_case(T=20, V=30, H=8, seed=4, scale=0.3)
    z_TV = case.hidden_TH @ case.weight_VH.T
    own = case.ids, case.offsets, z_TV[case.mask_TV]
    for ours, exact in zip(tails.run(case, own=own, kl_weight=5.0), case.dense(), strict=True):
        assert error(ours, exact) < 1e-5


def test_no_positions_and_shards_without_a_candidate() -> None:
    none = torch.zeros(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int64), EMPTY
    targets = tails.soft_targets(EMPTY.long(), *none, 0, 9)
    blocks = targets.blocks
    assert (len(blocks.rows), len(targets.negentropy_N), blocks.spans) == (0, 0, [])
    nowhere = HeadCase(
        torch.ones(0, 3), torch.ones(9, 3), EMPTY.long(), EMPTY, torch.zeros(0, 9).bool(), None
    )
    loss_T, dH_TH, dW_VH = tails.run(nowhere, own=none, kl_weight=1.0)
    assert (loss_T.shape, dH_TH.shape, bool(dW_VH.any())) == ((0,), (0, 3), False)
    elsewhere = torch.tensor([1, 2]).int(), torch.tensor([0, 2]), torch.tensor([0.0, 0.0])
    targets = tails.soft_targets(torch.tensor([1]), *elsewhere, 4, 4)
    assert targets.blocks.spans == []
    assert float(targets.negentropy_N) == pytest.approx(-0.693147, abs=1e-6)


def test_bf16_operands_are_multiplied_in_fp32() -> None:
    case = head_case(T=20, V=40, H=32, seed=5, scale=0.3)
    case.hidden_TH, case.weight_VH = case.hidden_TH.bfloat16(), case.weight_VH.bfloat16()
    own = tails.own_sets(case, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tails.run(case, own=own, kl_weight=0.5, out=True, dtype=torch.bfloat16)
    exact = tails.dense(case, own=own, kl_weight=0.5)
    for part, bound in ((0, 2e-6), (1, 1e-2), (2, 2e-6)):
        assert error(found[part], exact[part]) < bound
