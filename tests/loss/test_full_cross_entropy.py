"""The full loss block by block, and the mass outside the sets, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_replay.errors import ConfigError, DataError
from megatron_replay.loss import full as full_loss
from megatron_replay.loss.full import outside_mass, vocab_parallel_cross_entropy
from tests.loss.references import HeadCase, error, head_case

seeds = st.integers(0, 2**31)


def run(case: HeadCase, **options: Any) -> list[Tensor]:
    hidden_NH = case.hidden_TH.detach().clone().requires_grad_()
    weight_VH = case.weight_VH.detach().clone().requires_grad_()
    loss_N = vocab_parallel_cross_entropy(hidden_NH, weight_VH, case.labels_T, **options)
    (loss_N * case.upstream_T).sum().backward()
    assert hidden_NH.grad is not None
    assert weight_VH.grad is not None
    return [loss_N.detach(), hidden_NH.grad, weight_VH.grad]


@given(seed=seeds, N=st.integers(1, 60), V=st.integers(1, 80), chunk_rows=st.integers(1, 70))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_against_float64_autograd(seed: int, N: int, V: int, chunk_rows: int) -> None:
    case = head_case(T=N, V=V, H=8, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(full_loss, "BLOCK_ROWS", 17)  # several blocks of a small vocabulary
        found = run(case, chunk_rows=chunk_rows)
    floors = (1.0, *case.terms)
    for ours, dense, floor in zip(found, case.dense_full(), floors, strict=True):
        assert error(ours, dense, floor=floor) < 1e-6


def test_strided_operands_and_labels() -> None:
    """Hidden states arrive as a view of [S, B, H], tied weights as a part of a larger buffer."""
    case = head_case(T=40, V=50, H=8, seed=1)
    hidden_TH = torch.empty(8, 40).T.copy_(case.hidden_TH).requires_grad_()
    weight_VH = torch.empty(100, 16)[::2, ::2].copy_(case.weight_VH).requires_grad_()
    case.labels_T = torch.stack([case.labels_T, case.labels_T], 1)[:, 0]
    loss_T = vocab_parallel_cross_entropy(hidden_TH, weight_VH, case.labels_T, chunk_rows=16)
    gradients = torch.autograd.grad((loss_T * case.upstream_T).sum(), [hidden_TH, weight_VH])
    for ours, expected in zip([loss_T, *gradients], case.dense_full(), strict=True):
        assert error(ours, expected) < 1e-6


def test_no_more_logits_exist_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_loss, "BLOCK_ROWS", 16)
    sizes = []
    matmul = Tensor.__matmul__

    def watched(left: Tensor, right: Tensor) -> Tensor:
        product = matmul(left, right)
        sizes.append(tuple(product.shape))
        return product

    monkeypatch.setattr(Tensor, "__matmul__", watched)
    case = head_case(T=30, V=64, H=3, seed=0)
    with torch.no_grad():
        vocab_parallel_cross_entropy(case.hidden_TH, case.weight_VH, case.labels_T, chunk_rows=8)
    assert len(sizes) == 16
    assert max(n for n, _ in sizes) == 8
    assert max(v for _, v in sizes) == 16


def test_no_positions_and_labels_outside() -> None:
    weight_VH = torch.randn(9, 4).requires_grad_()
    none = vocab_parallel_cross_entropy(torch.randn(0, 4), weight_VH, torch.zeros(0).long())
    assert none.shape == (0,)
    none.sum().backward()
    assert weight_VH.grad is not None
    assert (weight_VH.grad == 0).all()
    loss_N = vocab_parallel_cross_entropy(
        torch.randn(3, 4), weight_VH.detach(), torch.tensor([-1, 0, 9])
    )
    assert loss_N.isinf().tolist() == [True, False, True]


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="chunk_rows: out of range"):
        vocab_parallel_cross_entropy(
            torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]), chunk_rows=0
        )
    with pytest.raises(DataError, match="shapes do not fit"):
        vocab_parallel_cross_entropy(torch.ones(1, 2), torch.ones(3, 5), torch.tensor([0]))


@given(seed=seeds, groups=st.integers(0, 4), share=st.sampled_from([0.05, 0.5, 1.0]))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_outside_mass_is_what_the_set_does_not_hold(seed: int, groups: int, share: float) -> None:
    case = head_case(T=12, V=40, H=6, seed=seed, groups=groups, share=share)
    outside_N, full_N = outside_mass(case.hidden_TH, case.weight_VH, case.sets())
    p_NV = (case.hidden_TH.double() @ case.weight_VH.double().T).softmax(1)
    assert (outside_N - (p_NV * ~case.mask_TV).sum(1)).abs().max() < 5e-6
    assert ((outside_N >= 0) & (outside_N <= 1)).all()
    label_p_N = p_NV.gather(1, case.labels_T[:, None]).squeeze(1)
    assert (full_N + label_p_N.log()).abs().max() < 5e-6
    assert not full_N.requires_grad
