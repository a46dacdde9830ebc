"""The sampled tail: unbiased over all draws, exact on each, and drawn as it says.

Shapes: T positions, V vocabulary, H hidden channels, R drawn ids.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.data import tail_sample
from megatron_replay.data.tail_sample import draw_ids
from megatron_replay.functional import vocab_parallel_cross_entropy
from megatron_replay.functional.tiled_head import dense_head, union_head
from megatron_replay.kernels.cpu.head import head as cpu_head
from tests.functional import tails
from tests.functional.references import error, head_case

FORMS = {"torch": dense_head, "union": union_head, "cpu": cpu_head}


@given(
    seed=st.integers(0, 2**31), V=st.integers(2, 7), groups=st.sampled_from([0, 2]), data=st.data()
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_unbiased_over_all_draws(seed: int, V: int, groups: int, data: st.DataObject) -> None:
    """The mean over all C(V, R) draws of Z^, and of its gradients, are those of the whole Z."""
    R = data.draw(st.integers(1, V))
    case = head_case(T=3, V=V, H=2, seed=seed, groups=groups, share=0.3, scale=0.7)
    z_TV = case.hidden_TH.double() @ case.weight_VH.double().T
    gold_T = z_TV.gather(1, case.labels_T[:, None]).squeeze(1)
    expected = [z_TV.exp().sum(1), z_TV.exp() @ case.weight_VH.double()]
    expected.append((z_TV.exp() * case.upstream_T[:, None]).T @ case.hidden_TH.double())
    draws, found = list(itertools.combinations(range(V), R)), [torch.zeros(()).double()] * 3
    upstream_T = case.upstream_T
    for drawn in draws:
        # dZ^ = Z^ (dL + dz[x]): dH per position, and dW with an upstream that makes it that of Z^.
        case.upstream_T = torch.ones(3)
        loss_T, dH_TH, _ = tails.run(case, drawn=np.array(drawn))
        Z_T = (loss_T.double() + gold_T).exp()
        case.upstream_T = (upstream_T * Z_T).float()
        dW_VH = tails.run(case, drawn=np.array(drawn))[2].double()
        dW_VH.index_add_(0, case.labels_T, case.upstream_T[:, None] * case.hidden_TH.double())
        dZ_TH = Z_T[:, None] * (dH_TH + case.weight_VH[case.labels_T]).double()
        found = [a + b / len(draws) for a, b in zip(found, (Z_T, dZ_TH, dW_VH), strict=True)]
    for ours, exact in zip(found, expected, strict=True):
        assert error(ours, exact, floor=0.1) < 3e-6


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("groups", [0, 4])
@pytest.mark.parametrize("R", [1, 20, 64])
def test_equals_the_definition(name: str, groups: int, R: int) -> None:
    case = head_case(T=140, V=64, H=16, seed=R, groups=groups, share=0.1, scale=0.3)
    drawn = draw_ids(64, R, seed=1, iteration=2, micro_batch=3)
    for out in (False, True):
        found = tails.run(case, drawn=drawn, form=FORMS[name], out=out)
        for ours, exact in zip(found, tails.dense(case, drawn=drawn), strict=True):
            assert error(ours, exact) < 2e-6


def test_the_whole_vocabulary_drawn_is_full_softmax() -> None:
    case = head_case(T=30, V=40, H=8, seed=1)
    loss_T = tails.run(case, drawn=np.arange(40))[0]
    full_T = vocab_parallel_cross_entropy(case.hidden_TH, case.weight_VH, case.labels_T)
    assert error(loss_T, full_T) < 1e-6


@pytest.mark.parametrize("groups", [0, 5])
def test_spans_of_any_size_agree(monkeypatch: pytest.MonkeyPatch, groups: int) -> None:
    case = head_case(T=40, V=50, H=8, seed=3, groups=groups, share=0.1)
    drawn = draw_ids(50, 30, seed=0, iteration=0, micro_batch=0)
    for limit, value in (("_SPAN_POSITIONS", 7), ("_SPAN_LOGITS", 100)):
        with monkeypatch.context() as patch:
            patch.setattr(tail_sample, limit, value)
            found = tails.run(case, drawn=drawn)
        for ours, exact in zip(found, tails.dense(case, drawn=drawn), strict=True):
            assert error(ours, exact) < 2e-6


def test_bf16_operands_are_multiplied_in_fp32() -> None:
    case = head_case(T=20, V=40, H=32, seed=5, scale=0.3)
    case.hidden_TH, case.weight_VH = case.hidden_TH.bfloat16(), case.weight_VH.bfloat16()
    drawn, own = np.arange(0, 40, 2), tails.own_sets(case, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tails.run(case, drawn=drawn, own=own, kl_weight=0.5, out=True, dtype=torch.bfloat16)
    exact = tails.dense(case, drawn=drawn, own=own, kl_weight=0.5)
    for part, bound in ((0, 2e-6), (1, 1e-2), (2, 2e-6)):
        assert error(found[part], exact[part]) < bound


def test_draws_are_uniform_distinct_and_a_function_of_their_arguments() -> None:
    def draw(seed: int = 1, iteration: int = 2, micro_batch: int = 3) -> list[int]:
        arguments = {"seed": seed, "iteration": iteration, "micro_batch": micro_batch}
        return draw_ids(1000, 50, **arguments).tolist()

    assert draw() == draw() == sorted(set(draw()))
    assert len(draw()) == 50
    assert len({tuple(draw(**change)) for change in ({}, {"seed": 2}, {"iteration": 3},
                                                     {"micro_batch": 2})}) == 4  # fmt: skip
    assert draw_ids(3, 3, seed=0, iteration=0, micro_batch=0).tolist() == [0, 1, 2]
    counts: dict[tuple[int, ...], int] = {}
    for i in range(2000):
        drawn = tuple(draw_ids(5, 2, seed=0, iteration=i, micro_batch=0).tolist())
        counts[drawn] = counts.get(drawn, 0) + 1
    # Chi-square of 10 pairs: above 27.9 once in a thousand times.
    assert len(counts) == 10
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 27.9
