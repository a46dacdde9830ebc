"""Every backend of the restricted head on the same cases, against autograd in float64.

Run as it is for those of the CPU and the emulated NPU; test_triton_interpreter.py runs it for
Triton, whose interpreter is a process's choice.

Shapes: T positions, V vocabulary, H hidden channels, G candidate sets.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_replay import kernels
from megatron_replay.errors import DataError
from megatron_replay.functional import restricted_cross_entropy
from megatron_replay.loss.backends import HeadBackend, Softmax, rescale
from megatron_replay.loss.blocks import DENSE, UNION
from megatron_replay.loss.pairs import pair_backend
from tests.kernels.threads import in_threads
from tests.loss.references import HeadCase, error, head_case

IN_TRITON = os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = ("triton",) if IN_TRITON else ("cpu-base", "cpu-avx2", "cpu-avx512", "ascend")
BACKENDS = COMPILED if IN_TRITON else ("torch", "union", *COMPILED)
#: Emulated or interpreted: these get smaller cases.
SLOW = ("ascend", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[HeadBackend]:
    name, _, level = request.param.partition("-")
    if name in ("torch", "union"):
        yield DENSE if name == "torch" else UNION
    elif name == "ascend":
        from megatron_replay.kernels.ascend_operators import PairOperators

        yield pair_backend(PairOperators(request.getfixturevalue("operators")))
    elif name == "triton":
        from megatron_replay.kernels.triton_head import BACKEND

        yield BACKEND
    else:
        from megatron_replay.kernels.cpu_head import BACKEND
        from tests.kernels.levels import at_level

        with at_level(level):
            yield BACKEND


@pytest.fixture
def slow(request: pytest.FixtureRequest, backend: HeadBackend) -> bool:
    return request.node.callspec.params["backend"] in SLOW


def run(
    case: HeadCase,
    backend: HeadBackend,
    *,
    dtype: torch.dtype = torch.float32,
    weight_grad_out: Tensor | None = None,
    **options: Any,
) -> list[Tensor]:
    """Loss, dH and dW."""
    hidden_TH = case.hidden_TH.detach().to(dtype).requires_grad_()
    weight_VH = case.weight_VH.detach().to(dtype).requires_grad_()
    loss_T = restricted_cross_entropy(
        hidden_TH,
        weight_VH,
        case.ids,
        case.offsets,
        case.labels_T,
        backend=backend,
        group_offsets=case.group_offsets,
        weight_grad_out=weight_grad_out,
        **options,
    )
    (loss_T * case.upstream_T).sum().backward()
    weight_grad = weight_VH.grad if weight_grad_out is None else weight_grad_out
    assert hidden_TH.grad is not None
    assert weight_grad is not None
    return [loss_T.detach(), hidden_TH.grad, weight_grad]


def check(
    found: list[Tensor], case: HeadCase, tail_logit_T: Tensor | None = None, *, bound: float = 1e-6
) -> None:
    """Relative to the largest entry, or to the terms of which a gradient is the difference."""
    floors = (1.0, *case.terms)
    for ours, exact, floor in zip(found, case.dense(tail_logit_T), floors, strict=True):
        assert error(ours, exact, floor=floor) <= bound


def ghosts(case: HeadCase) -> Tensor:
    """Tail logits, some of them none."""
    tail_logit_T = case.upstream_T * 2
    tail_logit_T[::3] = -math.inf
    return tail_logit_T


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("groups", [0, 4])
@pytest.mark.parametrize("H", [1, 7, 8, 64, 100])
def test_values_and_gradients(
    backend: HeadBackend, slow: bool, H: int, groups: int, ghost: bool
) -> None:
    T, V = (12, 37) if slow else (150, 203)
    case = head_case(T=T, V=V, H=H, seed=H, groups=groups, scale=H**-0.5)
    tail_logit_T = ghosts(case) if ghost else None
    check(run(case, backend, tail_logit_T=tail_logit_T), case, tail_logit_T)


@pytest.mark.parametrize("H", [1023, 2560, 8192])
def test_long_rows(backend: HeadBackend, slow: bool, H: int) -> None:
    case = head_case(T=3, V=11, H=H, seed=1, scale=H**-0.5)
    check(run(case, backend), case)


@pytest.mark.parametrize("groups", [0, 3])
def test_bf16_operands(backend: HeadBackend, slow: bool, groups: int) -> None:
    """Near float64 on what they were rounded from; exactly fp32's result on what they are."""
    case = head_case(T=10 if slow else 64, V=50, H=33, seed=2, groups=groups, scale=0.2)
    found = run(case, backend, dtype=torch.bfloat16)
    assert [part.dtype for part in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    check(found, case, bound=1e-2)
    case.hidden_TH, case.weight_VH = case.hidden_TH.bfloat16(), case.weight_VH.bfloat16()
    out_VH = torch.zeros(50, 33)
    loss_T, _, weight_grad = run(case, backend, dtype=torch.bfloat16, weight_grad_out=out_VH)
    check([loss_T, case.dense()[1], weight_grad], case)


def test_a_set_of_one_has_nothing_to_learn(backend: HeadBackend) -> None:
    """Exactly: a rounding here would push on weights that no other candidate holds back."""
    case = head_case(T=9, V=40, H=24, seed=2, share=0.0)
    assert len(case.ids) == 9
    assert not any(part.any() for part in run(case, backend))


def test_sets_of_201_of_a_large_vocabulary(backend: HeadBackend, slow: bool) -> None:
    """The paper's size, over more positions than a tile, whose union is most of the vocabulary."""
    T = 2 if slow else 150
    case = head_case(T=T, V=3001, H=16, seed=3, share=0.0, scale=0.25)
    scores_TV = torch.rand(T, 3001, generator=torch.Generator().manual_seed(3))
    scores_TV[torch.arange(T), case.labels_T] = 2.0
    case.mask_GV.scatter_(1, scores_TV.topk(201, dim=1).indices, True)
    assert (case.offsets.diff() == 201).all()
    check(run(case, backend), case)


@pytest.mark.parametrize("bounds", [[0, 31], [0, 13, 31], [0, 1, 2, 30, 31]])
@pytest.mark.parametrize("groups", [0, 3])
def test_shards_put_together(backend: HeadBackend, bounds: list[int], groups: int) -> None:
    """Ids outside the shard, positions without any in it, labels of another: by hand, on one
    process. The softmax is joined in float64.
    """
    case = head_case(T=11, V=31, H=16, seed=5, groups=groups, share=0.1, scale=0.25)
    shards = []
    for start, stop in itertools.pairwise(bounds):
        head = backend.bind(case.sets(start, stop))
        weight = case.weight_VH[start:stop].contiguous()
        shards.append((head, weight, head.forward(case.hidden_TH, weight, hidden_grad=True)))
    top_T = torch.stack([partials.max_N for _, _, partials in shards]).amax(0)
    total_T = torch.stack([p.sum_N * rescale(p.max_N, top_T) for _, _, p in shards]).sum(0)
    label_T = torch.stack([partials.label_logit_N for _, _, partials in shards]).amax(0)
    hidden_grad, weight_grads = torch.zeros_like(case.hidden_TH), []
    for head, weight, _ in shards:
        out_VH = torch.zeros_like(weight)
        dH_TH = head.backward(
            case.hidden_TH, weight, Softmax(top_T, total_T), case.upstream_T,
            hidden_grad=True, weight_grad_out=out_VH,
        )  # fmt: skip
        assert dH_TH is not None
        hidden_grad += dH_TH
        weight_grads.append(out_VH)
    check([top_T - label_T + total_T.log(), hidden_grad, torch.cat(weight_grads)], case)


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_only_what_is_asked_for_is_computed(backend: HeadBackend, wanted: str) -> None:
    case = head_case(T=6, V=20, H=8, seed=6)
    hidden_TH = case.hidden_TH.clone().requires_grad_(wanted == "hidden")
    weight_VH = case.weight_VH.clone().requires_grad_(wanted == "weight")
    out_VH = torch.zeros(20, 8)
    loss_T = restricted_cross_entropy(
        hidden_TH, weight_VH, case.ids, case.offsets, case.labels_T, backend=backend,
        weight_grad_out=out_VH,
    )  # fmt: skip
    (loss_T * case.upstream_T).sum().backward()
    _, dense_hidden_grad, dense_weight_grad = case.dense()
    if wanted == "hidden":
        assert hidden_TH.grad is not None
        assert error(hidden_TH.grad, dense_hidden_grad, floor=case.terms[0]) < 1e-6
        assert not out_VH.any()
    else:
        assert hidden_TH.grad is None
        assert error(out_VH, dense_weight_grad, floor=case.terms[1]) < 1e-6


@pytest.mark.parametrize("groups", [0, 3])
def test_gradients_are_added_and_other_rows_left_alone(backend: HeadBackend, groups: int) -> None:
    """What Megatron's main_grad asks for: micro-batches and tied embeddings add to it."""
    case = head_case(T=6, V=60, H=8, seed=7, groups=groups, share=0.05, scale=0.5)
    given_VH = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    given_VH[~case.mask_TV.any(0), 0] = math.nan  # would be seen if it were read and written
    out_VH = given_VH.clone()
    run(case, backend, weight_grad_out=out_VH)
    touched = case.mask_TV.any(0)
    assert not touched.all()
    assert torch.equal(out_VH[~touched].view(torch.int32), given_VH[~touched].view(torch.int32))
    added_VH = (out_VH - given_VH)[touched]
    assert error(added_VH, case.dense()[2][touched], floor=1.0) < 1e-6


@pytest.mark.parametrize("groups", [0, 3])
def test_strided_operands(backend: HeadBackend, groups: int) -> None:
    """Hidden states may be a view, tied weights a part of a larger buffer, columns strided."""
    case = head_case(T=10, V=23, H=8, seed=8, groups=groups, scale=0.4)
    hidden_TH = torch.empty(8, 10).T.copy_(case.hidden_TH).requires_grad_()
    case.labels_T = torch.stack([case.labels_T, case.labels_T], 1)[:, 0]
    for weight_VH in (torch.empty(46, 8)[::2], torch.empty(23, 16)[:, ::2]):
        weight_VH = weight_VH.copy_(case.weight_VH).requires_grad_()
        assert not any(t.is_contiguous() for t in (hidden_TH, weight_VH, case.labels_T))
        loss_T = restricted_cross_entropy(
            hidden_TH, weight_VH, case.ids, case.offsets, case.labels_T, backend=backend,
            group_offsets=case.group_offsets,
        )  # fmt: skip
        gradients = torch.autograd.grad((loss_T * case.upstream_T).sum(), [hidden_TH, weight_VH])
        check([loss_T, *gradients], case)


@pytest.mark.parametrize("groups", [0, 4])
def test_equal_bits_in_every_run(backend: HeadBackend, slow: bool, groups: int) -> None:
    case = head_case(T=6 if slow else 200, V=150, H=72, seed=9, groups=groups, scale=0.2)
    for first, second in zip(run(case, backend), run(case, backend), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", COMPILED, indirect=True)
def test_equal_bits_for_any_number_of_threads(backend: HeadBackend, slow: bool) -> None:
    """In position scope; BLAS, which the others go through, splits its sums by the threads."""
    case = head_case(T=6 if slow else 200, V=150, H=72, seed=9, scale=0.2)
    expected = run(case, backend)
    for threads in (2,) if slow else (1, 2, 3):
        found = in_threads(threads, lambda: run(case, backend))
        for ours, first in zip(found, expected, strict=True):
            assert torch.equal(ours, first)


@pytest.mark.parametrize("group_offsets", [None, torch.tensor([0]), torch.tensor([0, 0, 0])])
def test_no_positions(backend: HeadBackend, group_offsets: Tensor | None) -> None:
    hidden_TH, weight_VH = torch.randn(0, 4).requires_grad_(), torch.randn(9, 4).requires_grad_()
    sets = 0 if group_offsets is None else len(group_offsets) - 1
    loss_T = restricted_cross_entropy(
        hidden_TH, weight_VH, torch.zeros(0, dtype=torch.int32),
        torch.zeros(sets + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64),
        backend=backend, group_offsets=group_offsets,
    )  # fmt: skip
    assert loss_T.shape == (0,)
    loss_T.sum().backward()
    assert hidden_TH.grad is not None
    assert hidden_TH.grad.shape == (0, 4)
    assert weight_VH.grad is not None
    assert not weight_VH.grad.any()


def test_duplicates_are_refused(backend: HeadBackend) -> None:
    ids = torch.tensor([3, 3], dtype=torch.int32)
    with pytest.raises(DataError, match="ids must ascend, without a duplicate"):
        restricted_cross_entropy(
            torch.ones(1, 8),
            torch.ones(5, 8),
            ids,
            torch.tensor([0, 2]),
            ids[:1].long(),
            backend=backend,
        )


def test_a_label_outside_its_set_is_loud_even_unvalidated(backend: HeadBackend) -> None:
    ids = torch.tensor([0, 3], dtype=torch.int32)
    loss_T = restricted_cross_entropy(
        torch.ones(2, 8), torch.ones(5, 8), ids, torch.tensor([0, 1, 2]), torch.tensor([0, 1]),
        backend=backend, validate=False,
    )  # fmt: skip
    assert loss_T.isinf().tolist() == [False, True]


def test_a_constant_in_the_logits_changes_nothing_however_large(backend: HeadBackend) -> None:
    """Stable where exp alone overflows."""
    case = head_case(T=6, V=20, H=8, seed=7)
    case.hidden_TH[:, 0], case.weight_VH[:, 0] = 64.0, 64.0
    loss_T = run(case, backend)[0]
    assert (loss_T - case.dense()[0]).abs().max() < 1e-3  # one unit of a logit of 4096 is 2.4e-4


def test_what_is_called_without_a_choice_is_the_fast_path() -> None:
    """The compiled backend, bit for bit, and the weight's ``main_grad`` where there is one."""
    from megatron_replay import functional

    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 16), torch.randn(40, 16)
    ids = torch.arange(0, 40, 4, dtype=torch.int32).repeat(6)
    offsets, labels = torch.arange(0, 61, 10), torch.arange(0, 24, 4)
    assert kernels.HEAD.resolve("auto", weight) == "cpu"

    def run(**choice):
        operands = [x.clone().requires_grad_() for x in (hidden, weight)]
        operands[1].main_grad = torch.zeros(40, 16)
        loss = functional.restricted_cross_entropy(*operands, ids, offsets, labels, **choice)
        loss.sum().backward()
        return loss.detach(), operands[0].grad, operands[1].grad, operands[1].main_grad

    ours = run()
    assert ours[2] is None
    assert ours[3].any()
    chosen = run(backend=kernels.HEAD.choose("cpu", weight))
    assert all(torch.equal(a, b) for a, b in zip(ours, chosen, strict=True) if a is not None)
    by_autograd = run(weight_grad_out=None)
    torch.testing.assert_close(by_autograd[2], ours[3])
    assert not by_autograd[3].any()
