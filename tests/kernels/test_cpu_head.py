"""What only the compiled head of the CPU can get wrong: test_head.py has the rest.

Shapes: T positions, V vocabulary, H hidden channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_replay.errors import ConfigError
from megatron_replay.functional import restricted_cross_entropy
from megatron_replay.kernels.cpu_head import BACKEND, CpuHead
from megatron_replay.loss.backends import Softmax
from megatron_replay.loss.blocks import TiledHead
from megatron_replay.loss.candidate_sets import CandidateSets
from tests.kernels.levels import LEVELS, at_level
from tests.kernels.threads import in_threads
from tests.loss.references import HeadCase, error, head_case


@pytest.fixture(params=LEVELS, autouse=True)
def level(request: pytest.FixtureRequest) -> Iterator[None]:
    with at_level(request.param):
        yield


def run(case: HeadCase, hidden_TH: Tensor, weight_VH: Tensor, out_VH: Tensor) -> list[Tensor]:
    """Loss, dH and dW, which is added to ``out_VH``."""
    hidden_TH, weight_VH = hidden_TH.requires_grad_(), weight_VH.requires_grad_()
    loss_T = restricted_cross_entropy(
        hidden_TH, weight_VH, case.ids, case.offsets, case.labels_T, backend=BACKEND,
        weight_grad_out=out_VH,
    )  # fmt: skip
    (hidden_grad,) = torch.autograd.grad((loss_T * case.upstream_T).sum(), [hidden_TH])
    return [loss_T.detach(), hidden_grad, out_VH]


def plain(case: HeadCase) -> list[Tensor]:
    out_VH = torch.zeros_like(case.weight_VH)
    return run(case, case.hidden_TH.clone(), case.weight_VH.clone(), out_VH)


def check(found: list[Tensor], case: HeadCase) -> None:
    for ours, exact, floor in zip(found, case.dense(), (1.0, *case.terms), strict=True):
        assert error(ours, exact, floor=floor) <= 1e-6


@pytest.mark.parametrize("T", range(1, 10))
def test_positions_that_are_no_multiple_of_four(T: int) -> None:
    case = head_case(T=T, V=23, H=70, seed=T, share=0.5, scale=0.1)
    check(plain(case), case)


@pytest.mark.parametrize("H", [63, 64, 65, 127, 128, 129, 193])
def test_channels_around_a_block(H: int) -> None:
    case = head_case(T=21, V=30, H=H, seed=H, share=0.3, scale=H**-0.5)
    check(plain(case), case)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_the_bits_do_not_depend_on_threads(threads: int) -> None:
    """Pairs enough for threads to take several slices each."""
    case = head_case(T=301, V=700, H=200, seed=1, share=0.15, scale=0.1)
    assert len(case.ids) > 20_000
    expected = plain(case)
    check(expected, case)
    for ours, other in zip(in_threads(threads, lambda: plain(case)), expected, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("shift", [1, 3, 7])
def test_the_bits_do_not_depend_on_where_operands_lie(shift: int) -> None:
    """In memory that is aligned to an element only, with rows any distance apart."""
    case = head_case(T=13, V=40, H=150, seed=2, share=0.3, scale=0.1)

    def moved(matrix: Tensor) -> Tensor:
        rows, columns = matrix.shape
        memory = torch.full(((columns + shift) * rows + shift,), math.nan)
        view = memory[shift:].view(rows, columns + shift)[:, :columns]
        return view.copy_(matrix)

    expected = plain(case)
    found = run(
        case, moved(case.hidden_TH), moved(case.weight_VH), moved(torch.zeros_like(case.weight_VH))
    )
    for ours, other in zip(found, expected, strict=True):
        assert torch.equal(ours, other)


def test_channels_of_the_gradient_that_are_not_consecutive() -> None:
    case = head_case(T=13, V=40, H=9, seed=3, share=0.3)
    out_VH = torch.ones(9, 40).T
    found = run(case, case.hidden_TH.clone(), case.weight_VH.clone(), out_VH)
    check([*found[:2], out_VH - 1.0], case)


def test_each_probability_is_right_to_its_last_bits() -> None:
    """With H = 1 and h = 1 the gradient in a candidate's weight is its probability."""
    logits_V = torch.linspace(-80.0, 0.0, 50_001)
    case = head_case(T=1, V=len(logits_V), H=1, seed=4, share=2.0)
    case.hidden_TH[:], case.weight_VH[:, 0] = 1.0, logits_V
    case.labels_T[:], case.upstream_T[:] = 0, 1.0
    _, _, out_VH = plain(case)
    exact_V = logits_V.double().softmax(0)
    assert ((out_VH[1:, 0] - exact_V[1:]).abs() <= 4e-7 * exact_V[1:]).all()


def test_logits_far_below_the_largest_count_for_nothing() -> None:
    case = head_case(T=4, V=20, H=1, seed=5, share=2.0)
    case.hidden_TH[:] = 1.0
    case.weight_VH[1:] = -torch.logspace(2.3, 38, 19)[:, None]
    case.weight_VH[0] = 0.0
    case.labels_T[:] = 0
    found = plain(case)
    assert not any(part.any() for part in found)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_none_stays_with_its_position(bad: float) -> None:
    case = head_case(T=12, V=30, H=20, seed=6, share=0.4)
    expected = plain(case)
    case.hidden_TH[5, 3] = bad
    loss_T, hidden_grad_TH, _ = plain(case)
    others = torch.arange(12) != 5
    assert not loss_T[5].isfinite()
    assert torch.equal(loss_T[others], expected[0][others])
    assert torch.equal(hidden_grad_TH[others], expected[1][others])


def test_a_candidate_that_is_no_number_reaches_every_position_that_has_it() -> None:
    """Also as one term of many, and not the label's: a maximum or a clamp may swallow it."""
    case = head_case(T=12, V=30, H=20, seed=6, share=0.4)
    case.labels_T = torch.where(case.labels_T == 7, 8, case.labels_T)
    case.mask_GV[torch.arange(12), case.labels_T] = True
    case.weight_VH[7, 2] = math.nan
    assert 0 < case.mask_GV[:, 7].sum() < 12
    loss_T, _, _ = plain(case)
    assert torch.equal(loss_T.isnan(), case.mask_GV[:, 7])


def test_fp16_is_refused() -> None:
    case = head_case(T=3, V=9, H=4, seed=7)
    with pytest.raises(ConfigError, match=r"expected .*torch.bfloat16.*found .*torch.float16"):
        run(case, case.hidden_TH.half(), case.weight_VH.half(), torch.zeros(9, 4))


def test_ids_of_no_row_are_never_read() -> None:
    ids, offsets, label = np.array([2, 9], np.int32), np.array([0, 2]), np.array([2])
    sets = CandidateSets.of(ids, offsets, label, vocab_size=9)
    with pytest.raises(AssertionError):
        CpuHead(sets)


def test_document_scope_is_the_matrix_product_of_torch() -> None:
    case = head_case(T=6, V=9, H=4, seed=8, groups=2)
    assert isinstance(BACKEND.bind(case.sets()), TiledHead)


def test_backward_can_be_asked_twice() -> None:
    case = head_case(T=6, V=9, H=4, seed=9)
    one = CpuHead(case.sets())
    max_T, sum_T, _ = one.forward(case.hidden_TH, case.weight_VH, hidden_grad=True)
    first, again = (
        one.backward(
            case.hidden_TH, case.weight_VH, Softmax(max_T, sum_T), case.upstream_T,
            hidden_grad=True, weight_grad_out=None,
        )
        for _ in range(2)
    )  # fmt: skip
    assert first is not None
    assert again is not None
    assert torch.equal(first, again)
