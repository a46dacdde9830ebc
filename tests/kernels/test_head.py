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

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_replay.errors import ConfigError
from megatron_replay.functional import restricted_cross_entropy
from megatron_replay.kernels import HEAD
from megatron_replay.loss.backends import HeadBackend, Softmax, rescale
from megatron_replay.loss.blocks import DENSE, UNION, TiledHead
from megatron_replay.loss.candidate_sets import CandidateSets
from megatron_replay.loss.pairs import pair_backend
from tests.kernels.levels import LEVELS, at_level, in_threads
from tests.loss.references import HeadCase, equal, error, ghosts, head_case

IN_TRITON = os.environ.get("TRITON_INTERPRET") == "1"
CPU = tuple(f"cpu-{level}" for level in LEVELS)
COMPILED = ("triton",) if IN_TRITON else (*CPU, "ascend")
BACKENDS = COMPILED if IN_TRITON else ("torch", "union", *COMPILED)
#: Emulated or interpreted: these get smaller cases.
SLOW = ("ascend", "triton")
# Triton's interpreter is numpy, which warns of infinity - infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
by_compiled = pytest.mark.parametrize("backend", COMPILED, indirect=True)


def by_cpu(test: Any) -> Any:
    """On every level of the CPU; not in Triton's interpreter, see test_triton_interpreter.py."""
    test = pytest.mark.parametrize("backend", CPU, indirect=True)(test)
    return pytest.mark.cpu_backend(test)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[HeadBackend]:
    name, _, level = request.param.partition("-")
    if name in ("torch", "union"):
        yield DENSE if name == "torch" else UNION
    elif name == "ascend":
        from megatron_replay.kernels.ascend_head import PairOperators

        pairs = PairOperators(request.getfixturevalue("operators"))
        yield pair_backend(pairs.gather_dot, pairs.segment_axpy_)
    elif name == "triton":
        from megatron_replay.kernels import triton_head

        yield triton_head.backend()
    else:
        with at_level(level):
            yield HEAD.choose("cpu", torch.empty(0))


@pytest.fixture
def slow(request: pytest.FixtureRequest, backend: HeadBackend) -> bool:
    return request.node.callspec.params["backend"] in SLOW


@pytest.mark.parametrize("groups", [0, 4])
@pytest.mark.parametrize("H", [1, 7, 8, 63, 64, 65, 100, 129])
def test_values_and_gradients(backend: HeadBackend, slow: bool, H: int, groups: int) -> None:
    T, V = (12, 37) if slow else (150, 203)
    case = head_case(T=T, V=V, H=H, seed=H, groups=groups, scale=H**-0.5)
    case.check(case.run(backend=backend))
    case.check(case.run(backend=backend, tail_logit_T=ghosts(case)), case.dense(ghosts(case)))


@pytest.mark.parametrize(("T", "H"), [(3, 1023), (3, 2560), (3, 8192), (1, 70), (2, 70), (9, 70)])
def test_long_rows_and_few_positions(backend: HeadBackend, T: int, H: int) -> None:
    """Positions that are no multiple of those that are computed at one time."""
    case = head_case(T=T, V=11, H=H, seed=1, share=0.5, scale=H**-0.5)
    case.check(case.run(backend=backend))


def test_sets_of_201_of_a_large_vocabulary(backend: HeadBackend, slow: bool) -> None:
    """The paper's size, over more positions than a tile, whose union is most of the vocabulary."""
    T = 2 if slow else 150
    case = head_case(T=T, V=3001, H=16, seed=3, share=0.0, scale=0.25)
    scores_TV = torch.rand(T, 3001, generator=torch.Generator().manual_seed(3))
    scores_TV[torch.arange(T), case.labels_T] = 2.0
    case.mask_GV.scatter_(1, scores_TV.topk(201, dim=1).indices, True)
    assert (case.offsets.diff() == 201).all()
    case.check(case.run(backend=backend))


@pytest.mark.parametrize("groups", [0, 3])
def test_bf16_operands(backend: HeadBackend, slow: bool, groups: int) -> None:
    """Near float64 on what they were rounded from; exactly fp32's result on what they are."""
    case = head_case(T=10 if slow else 64, V=50, H=33, seed=2, groups=groups, scale=0.2)
    found = case.run(backend=backend, dtype=torch.bfloat16)
    assert [part.dtype for part in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    case.check(found, bound=1e-2)
    case.hidden_TH, case.weight_VH = case.hidden_TH.bfloat16(), case.weight_VH.bfloat16()
    out_VH = torch.zeros(50, 33)
    loss_T, _, dW_VH = case.run(backend=backend, dtype=torch.bfloat16, weight_grad_out=out_VH)
    case.check([loss_T, case.dense()[1], dW_VH])


@pytest.mark.parametrize("groups", [0, 3])
@pytest.mark.parametrize("bounds", [[0, 31], [0, 13, 31], [0, 1, 2, 30, 31]])
def test_shards_put_together(backend: HeadBackend, bounds: list[int], groups: int) -> None:
    """Ids outside the shard, positions without any in it, labels of another: by hand, on one
    process; tests/distributed does it over ranks.
    """
    case = head_case(T=11, V=31, H=9, seed=5, groups=groups, share=0.1)
    shards = []
    for start, stop in itertools.pairwise(bounds):
        head = backend.bind(case.sets(start, stop))
        weight = case.weight_VH[start:stop].contiguous()
        shards.append((head, weight, head.forward(case.hidden_TH, weight)))
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
    case.check([top_T - label_T + total_T.log(), hidden_grad, torch.cat(weight_grads)])


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
    _, dense_dH_TH, dense_dW_VH = case.dense()
    if wanted == "hidden":
        assert hidden_TH.grad is not None
        assert not out_VH.any()
        case.check([loss_T, hidden_TH.grad, dense_dW_VH])
    else:
        assert hidden_TH.grad is None
        case.check([loss_T, dense_dH_TH, out_VH])


@pytest.mark.parametrize("groups", [0, 3])
def test_gradients_are_added_and_other_rows_left_alone(backend: HeadBackend, groups: int) -> None:
    """What Megatron's main_grad asks for: micro-batches and tied embeddings add to it."""
    case = head_case(T=6, V=60, H=8, seed=7, groups=groups, share=0.05, scale=0.5)
    given_VH = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    given_VH[~case.mask_TV.any(0), 0] = math.nan  # would be seen if it were read and written
    out_VH = given_VH.clone()
    case.run(backend=backend, weight_grad_out=out_VH)
    touched = case.mask_TV.any(0)
    assert not touched.all()
    assert torch.equal(out_VH[~touched].view(torch.int32), given_VH[~touched].view(torch.int32))
    added_VH = (out_VH - given_VH)[touched]
    assert error(added_VH, case.dense()[2][touched], floor=1.0) < 1e-6


@pytest.mark.parametrize("groups", [0, 3])
def test_strided_operands(backend: HeadBackend, groups: int) -> None:
    """Hidden states may be a view, tied weights a part of a larger buffer, columns strided."""
    case = head_case(T=10, V=23, H=8, seed=8, groups=groups, scale=0.4)
    case.labels_T = torch.stack([case.labels_T, case.labels_T], 1)[:, 0]
    hidden_TH = torch.empty(8, 10).T.copy_(case.hidden_TH)
    for weight_VH in (torch.empty(46, 8)[::2], torch.empty(23, 16)[:, ::2]):
        weight_VH.copy_(case.weight_VH)
        assert not any(t.is_contiguous() for t in (hidden_TH, weight_VH, case.labels_T))
        case.check(case.run(backend=backend, hidden_TH=hidden_TH, weight_VH=weight_VH))


@by_cpu
def test_the_bits_do_not_depend_on_where_operands_lie(backend: HeadBackend) -> None:
    """In memory that is aligned to an element only, with rows any distance apart."""
    case = head_case(T=13, V=40, H=150, seed=2, share=0.3, scale=0.1)
    expected = case.run(backend=backend, weight_grad_out=torch.zeros(40, 150))
    for shift in (1, 3, 7):

        def moved(matrix: Tensor, shift: int = shift) -> Tensor:
            rows, columns = matrix.shape
            memory = torch.full(((columns + shift) * rows + shift,), math.nan)
            return memory[shift:].view(rows, -1)[:, :columns].copy_(matrix)

        found = case.run(
            backend=backend, hidden_TH=moved(case.hidden_TH), weight_VH=moved(case.weight_VH),
            weight_grad_out=moved(torch.zeros(40, 150)),
        )  # fmt: skip
        assert equal(found, expected)
    out_VH = torch.zeros(150, 40).T  # channels that are not consecutive
    assert equal(case.run(backend=backend, weight_grad_out=out_VH), expected)


@pytest.mark.parametrize("groups", [0, 4])
def test_equal_bits_in_every_run(backend: HeadBackend, slow: bool, groups: int) -> None:
    case = head_case(T=6 if slow else 200, V=150, H=72, seed=9, groups=groups, scale=0.2)
    assert equal(case.run(backend=backend), case.run(backend=backend))


@by_compiled
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_equal_bits_for_any_number_of_threads(
    backend: HeadBackend, slow: bool, threads: int
) -> None:
    """In position scope; BLAS, which the others go through, splits its sums by the threads.

    There are pairs enough for threads to take several slices each.
    """
    T, V, H = (6, 50, 12) if slow else (301, 700, 200)
    case = head_case(T=T, V=V, H=H, seed=1, share=0.15, scale=0.1)
    assert slow or len(case.ids) > 20_000
    found = in_threads(threads, lambda: case.run(backend=backend))
    assert equal(found, case.run(backend=backend))
    case.check(found)


@pytest.mark.parametrize("groups", [None, 0, 2])
def test_no_positions(backend: HeadBackend, groups: int | None) -> None:
    none, sets = torch.zeros(0), groups or 0
    shared = None if groups is None else torch.zeros(sets + 1, dtype=torch.int64)
    case = HeadCase(
        torch.zeros(0, 4), torch.ones(9, 4), none.long(), none, torch.zeros(sets, 9).bool(), shared
    )
    loss_T, dH_TH, dW_VH = case.run(backend=backend)
    assert (loss_T.shape, dH_TH.shape, bool(dW_VH.any())) == ((0,), (0, 4), False)


def test_a_set_of_one_has_nothing_to_learn(backend: HeadBackend) -> None:
    """Exactly: a rounding here would push on weights that no other candidate holds back."""
    case = head_case(T=9, V=40, H=24, seed=2, share=0.0)
    assert len(case.ids) == 9
    assert not any(part.any() for part in case.run(backend=backend))


def test_logits_far_below_the_largest_count_for_nothing(backend: HeadBackend) -> None:
    case = head_case(T=4, V=20, H=1, seed=5, share=2.0)
    case.hidden_TH[:] = 1.0
    case.weight_VH[1:] = -torch.logspace(2.3, 38, 19)[:, None]
    case.weight_VH[0] = 0.0
    case.labels_T[:] = 0
    assert not any(part.any() for part in case.run(backend=backend))


def test_a_constant_in_the_logits_changes_nothing_however_large(backend: HeadBackend) -> None:
    """Stable where exp alone overflows."""
    case = head_case(T=6, V=20, H=8, seed=7)
    case.hidden_TH[:, 0], case.weight_VH[:, 0] = 64.0, 64.0
    loss_T = case.run(backend=backend)[0]
    assert (loss_T - case.dense()[0]).abs().max() < 1e-3  # one unit of a logit of 4096 is 2.4e-4


@by_cpu
def test_each_probability_is_right_to_its_last_bits(backend: HeadBackend) -> None:
    """With H = 1 and h = 1 the gradient in a candidate's weight is its probability."""
    logits_V = torch.linspace(-80.0, 0.0, 50_001)
    case = head_case(T=1, V=len(logits_V), H=1, seed=4, share=2.0)
    case.hidden_TH[:], case.weight_VH[:, 0] = 1.0, logits_V
    case.labels_T[:], case.upstream_T[:] = 0, 1.0
    dW_V = case.run(backend=backend)[2][:, 0]
    exact_V = logits_V.double().softmax(0)
    assert ((dW_V[1:] - exact_V[1:]).abs() <= 4e-7 * exact_V[1:]).all()


def test_a_label_outside_its_set_is_loud_even_unvalidated(backend: HeadBackend) -> None:
    ids = torch.tensor([0, 3], dtype=torch.int32)
    loss_T = restricted_cross_entropy(
        torch.ones(2, 8), torch.ones(5, 8), ids, torch.tensor([0, 1, 2]), torch.tensor([0, 1]),
        backend=backend, validate=False,
    )  # fmt: skip
    assert loss_T.isinf().tolist() == [False, True]


@by_compiled
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_none_stays_with_its_position(backend: HeadBackend, bad: float) -> None:
    case = head_case(T=12, V=30, H=20, seed=6, share=0.4)
    expected = case.run(backend=backend)
    case.hidden_TH[5, 3] = bad
    found, others = case.run(backend=backend), torch.arange(12) != 5
    assert not found[0][5].isfinite()
    assert equal([part[others] for part in found[:2]], [part[others] for part in expected[:2]])


@by_compiled
def test_a_candidate_that_is_no_number_reaches_its_positions(backend: HeadBackend) -> None:
    """Also as one term of many, and not the label's: a maximum or a clamp may swallow it."""
    case = head_case(T=12, V=30, H=20, seed=6, share=0.4)
    case.labels_T = torch.where(case.labels_T == 7, 8, case.labels_T)
    case.mask_GV[torch.arange(12), case.labels_T] = True
    case.weight_VH[7, 2] = math.nan
    assert 0 < case.mask_GV[:, 7].sum() < 12
    assert torch.equal(case.run(backend=backend)[0].isnan(), case.mask_GV[:, 7])


@by_compiled
def test_shared_sets_are_matrix_products_of_torch(backend: HeadBackend) -> None:
    case = head_case(T=6, V=9, H=4, seed=8, groups=2)
    assert isinstance(backend.bind(case.sets()), TiledHead)


@by_cpu
def test_what_the_compiled_code_cannot_read_is_refused(backend: HeadBackend) -> None:
    case = head_case(T=3, V=9, H=4, seed=7)
    with pytest.raises(ConfigError, match=r"expected .*torch.bfloat16.*found .*torch.float16"):
        case.run(backend=backend, dtype=torch.float16)
    sets = (np.array([2, 9], np.int32), np.array([0, 2]), np.array([2]))
    with pytest.raises(AssertionError):  # an id of no row
        backend.bind(CandidateSets.of(*sets, vocab_size=9))


@pytest.mark.cpu_backend
def test_what_is_called_without_a_choice_is_the_fast_path() -> None:
    """The compiled backend, bit for bit, and the weight's ``main_grad`` where there is one."""
    case = head_case(T=6, V=40, H=16, seed=0)
    assert HEAD.resolve("auto", case.weight_VH) == "cpu"

    def run(**choice: Any) -> list[Tensor | None]:
        hidden, weight = (x.clone().requires_grad_() for x in (case.hidden_TH, case.weight_VH))
        weight.main_grad = torch.zeros(40, 16)  # type: ignore[attr-defined]
        sets = case.ids, case.offsets, case.labels_T
        loss = restricted_cross_entropy(hidden, weight, *sets, **choice)
        loss.sum().backward()
        return [loss.detach(), hidden.grad, weight.main_grad, weight.grad]  # type: ignore

    *ours, by_autograd = run()
    assert by_autograd is None
    assert ours[2].any()
    assert equal(run(backend=HEAD.choose("cpu", case.weight_VH))[:3], ours)
    *_, main_grad, by_autograd = run(weight_grad_out=None)
    torch.testing.assert_close(by_autograd, ours[2])
    assert not main_grad.any()
