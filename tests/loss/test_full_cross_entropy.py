"""The full loss block by block, and the mass outside the sets, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_replay.errors import ConfigError, DataError
from megatron_replay.loss import sharded
from megatron_replay.loss.sharded import outside_mass, vocab_parallel_cross_entropy
from tests.loss.references import HeadCase, head_case

seeds = st.integers(0, 2**31)


@given(seed=seeds, N=st.integers(1, 60), V=st.integers(1, 80), chunk_rows=st.integers(1, 70))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_against_float64_autograd(seed: int, N: int, V: int, chunk_rows: int) -> None:
    case = head_case(T=N, V=V, H=8, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded, "BLOCK_ROWS", 17)  # several blocks of a small vocabulary
        case.check(case.run_full(chunk_rows=chunk_rows), case.dense_full())


@pytest.fixture
def multiplied() -> Iterator[list[set[torch.dtype]]]:
    """Lets the CPU return fp32 sums of bf16 products, as accelerators do; the operands' dtypes."""
    dtypes = []

    def mm(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
        dtypes.append({left.dtype, right.dtype})
        return left.to(out_dtype) @ right.to(out_dtype)

    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype", mm, "CPU")
    yield dtypes
    library._destroy()


@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_bf16_products_round_the_slopes_and_nothing_else(
    multiplied: list[set[torch.dtype]], monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    """Four products a tile, of bf16. Each term of a gradient is within 2^-8 of its exact value."""
    monkeypatch.setattr(sharded, "BLOCK_ROWS", 64)
    case = head_case(T=40, V=128, H=16, seed=3, scale=scale)
    case.hidden_TH, case.weight_VH = (x.bfloat16() for x in (case.hidden_TH, case.weight_VH))
    dW_VH = torch.zeros(128, 16)
    loss_T, dH_TH, _ = case.run_full(dtype=torch.bfloat16, chunk_rows=20, weight_grad_out=dW_VH)
    assert multiplied == [{torch.bfloat16}] * 4 * 4
    exact_loss_T, exact_dH_TH, exact_dW_VH = case.dense_full()
    assert (loss_T - exact_loss_T).abs().max() < 1e-5
    hidden_TH, weight_VH = case.hidden_TH.double(), case.weight_VH.double()
    slope_TV = (hidden_TH @ weight_VH.T).softmax(1)
    slope_TV[torch.arange(40), case.labels_T] -= 1
    slope_TV *= case.upstream_T.double()[:, None]
    error_TH, error_VH = (dH_TH - exact_dH_TH).abs(), (dW_VH - exact_dW_VH).abs()
    rounded_TH = exact_dH_TH.abs() * 2**-8  # dH is bf16, as H is
    assert (error_TH <= slope_TV.abs() @ weight_VH.abs() * 2**-8 + rounded_TH + 1e-5).all()
    assert (error_VH <= slope_TV.abs().T @ hidden_TH.abs() * 2**-8 + 1e-5).all()


def test_a_cpu_multiplies_bf16_in_fp32() -> None:
    case = head_case(T=40, V=128, H=16, seed=3)
    case.hidden_TH, case.weight_VH = (x.bfloat16() for x in (case.hidden_TH, case.weight_VH))
    dW_VH = torch.zeros(128, 16)
    loss_T, _, _ = case.run_full(dtype=torch.bfloat16, weight_grad_out=dW_VH)
    exact_loss_T, _, exact_dW_VH = case.dense_full()
    assert (loss_T - exact_loss_T).abs().max() < 1e-5
    assert (dW_VH - exact_dW_VH).abs().max() < 1e-5


def test_strided_operands_and_labels() -> None:
    """Hidden states arrive as a view of [S, B, H], tied weights as a part of a larger buffer."""
    case = head_case(T=40, V=50, H=8, seed=1)
    hidden_TH = torch.empty(8, 40).T.copy_(case.hidden_TH)
    weight_VH = torch.empty(100, 16)[::2, ::2].copy_(case.weight_VH)
    case.labels_T = torch.stack([case.labels_T, case.labels_T], 1)[:, 0]
    found = case.run_full(hidden_TH=hidden_TH, weight_VH=weight_VH, chunk_rows=16)
    case.check(found, case.dense_full())


def test_no_more_logits_exist_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "BLOCK_ROWS", 16)
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
    none = torch.zeros(0)
    nowhere = HeadCase(torch.ones(0, 4), torch.ones(9, 4), none.long(), none, none, None)
    loss_N, _, dW_VH = nowhere.run_full()
    assert (loss_N.shape, bool(dW_VH.any())) == ((0,), False)
    labels_N = torch.tensor([-1, 0, 9])
    loss_N = vocab_parallel_cross_entropy(torch.randn(3, 4), torch.randn(9, 4), labels_N)
    assert loss_N.isinf().tolist() == [True, False, True]


def test_wrong_arguments_are_refused() -> None:
    operands = torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0])
    with pytest.raises(ConfigError, match="chunk_rows: out of range"):
        vocab_parallel_cross_entropy(*operands, chunk_rows=0)
    with pytest.raises(DataError, match="shapes do not fit"):
        vocab_parallel_cross_entropy(torch.ones(1, 5), *operands[1:])


@given(seed=seeds, groups=st.integers(0, 4), share=st.sampled_from([0.05, 0.5, 1.0]))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_outside_mass_is_what_the_set_does_not_hold(seed: int, groups: int, share: float) -> None:
    case = head_case(T=12, V=40, H=6, seed=seed, groups=groups, share=share)
    outside_N, full_N = outside_mass(case.hidden_TH, case.weight_VH, case.sets())
    p_NV = (case.hidden_TH.double() @ case.weight_VH.double().T).softmax(1)
    assert (outside_N - (p_NV * ~case.mask_TV).sum(1)).abs().max() < 5e-6
    assert ((outside_N >= 0) & (outside_N <= 1)).all()
    assert (full_N - case.dense_full()[0]).abs().max() < 5e-6
    assert not full_N.requires_grad
