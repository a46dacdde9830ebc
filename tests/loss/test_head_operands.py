"""The heads on operands in unusual memory, and on sets of unusual size.

Shapes: T positions, V vocabulary, H hidden channels.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_replay.functional import restricted_cross_entropy, vocab_parallel_cross_entropy
from tests.loss.references import HeadCase, error, head_case


def losses_and_gradients(
    case: HeadCase, hidden_TH: Tensor, weight_VH: Tensor, *, full: bool = False
) -> list[Tensor]:
    """Loss, and the gradients in the two operands, which may be views."""
    if full:
        loss_T = vocab_parallel_cross_entropy(hidden_TH, weight_VH, case.labels_T, chunk_rows=16)
    else:
        sets = (case.ids, case.offsets, case.labels_T)
        loss_T = restricted_cross_entropy(
            hidden_TH, weight_VH, *sets, group_offsets=case.group_offsets
        )
    gradients = torch.autograd.grad((loss_T * case.upstream_T).sum(), [hidden_TH, weight_VH])
    return [loss_T.detach(), *gradients]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("groups", [0, 3])
def test_strided_operands_and_labels(groups: int, full: bool) -> None:
    """Hidden states arrive as a view of [S, B, H], tied weights as a part of a larger buffer."""
    case = head_case(T=40, V=50, H=8, seed=1, groups=groups)
    if full:
        case.mask_GV[:] = True
    hidden_TH = torch.empty(8, 40).T.copy_(case.hidden_TH).requires_grad_()
    weight_VH = torch.empty(100, 16)[::2, ::2].copy_(case.weight_VH).requires_grad_()
    case.labels_T = torch.stack([case.labels_T, case.labels_T], 1)[:, 0]
    assert not any(t.is_contiguous() for t in (hidden_TH, weight_VH, case.labels_T))
    found = losses_and_gradients(case, hidden_TH, weight_VH, full=full)
    for ours, expected in zip(found, case.dense(), strict=True):
        assert error(ours, expected) < 1e-6


def test_a_set_of_one_has_nothing_to_learn() -> None:
    """Exactly: a rounding here would push on weights that no other candidate holds back."""
    case = head_case(T=30, V=40, H=8, seed=2, share=0.0)
    assert len(case.ids) == 30
    operands = case.hidden_TH.clone().requires_grad_(), case.weight_VH.clone().requires_grad_()
    assert not any(found.any() for found in losses_and_gradients(case, *operands))


def test_sets_of_201_of_a_large_vocabulary() -> None:
    """The paper's size, over more positions than a tile, whose union is most of the vocabulary."""
    case = head_case(T=150, V=3000, H=8, seed=3, share=0.0)
    scores_TV = torch.rand(150, 3000, generator=torch.Generator().manual_seed(3))
    scores_TV[torch.arange(150), case.labels_T] = 2.0
    case.mask_GV.scatter_(1, scores_TV.topk(201, dim=1).indices, True)
    assert (case.offsets.diff() == 201).all()
    operands = case.hidden_TH.clone().requires_grad_(), case.weight_VH.clone().requires_grad_()
    found = losses_and_gradients(case, *operands)
    for ours, expected in zip(found, case.dense(), strict=True):
        assert error(ours, expected) < 1e-6


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
