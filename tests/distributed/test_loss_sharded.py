"""Losses on shards of the vocabulary equal float64 on one process, gradients included.

Shapes: T positions, V vocabulary, H hidden channels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay.errors import DataError, TrainingError
from megatron_replay.functional import (
    restricted_cross_entropy,
    select_candidates,
    vocab_parallel_cross_entropy,
)
from megatron_replay.kernels import HEAD
from megatron_replay.loss.full import outside_mass
from tests import pool
from tests.loss import tails
from tests.loss.references import HeadCase, error, head_case

pytestmark = pytest.mark.distributed


def refuse_on(rank: int, world_size: int) -> list[str]:
    """What each rank reports of a fault that only the last one has."""
    shard: dict[str, Any] = {"vocab_start": 8 * rank, "tp_group": dist.group.WORLD}
    messages = []
    for fault in (float("nan"), float("inf")):
        logits_TV = torch.zeros(3, 8)
        if rank == world_size - 1:
            logits_TV[1, 2] = fault
        with pytest.raises(TrainingError) as caught:
            select_candidates(logits_TV, torch.zeros(3).long(), **shard)
        messages.append(str(caught.value))
    with pytest.raises(DataError) as refused:
        select_candidates(torch.zeros(1, 8), torch.tensor([8 * world_size]), **shard)
    # The last id of the last shard is in the vocabulary, the one after it is not.
    operands, offsets = (torch.ones(1, 2), torch.ones(8, 2)), torch.tensor([0, 1])
    label = torch.tensor([8 * world_size - 1])
    restricted_cross_entropy(*operands, label.int(), offsets, label, **shard)
    with pytest.raises(DataError) as outside:
        restricted_cross_entropy(*operands, label.int() + 1, offsets, label + 1, **shard)
    return [*messages, str(refused.value), str(outside.value)]


def test_every_rank_refuses_what_one_rank_sees() -> None:
    first, second = pool.run(2, refuse_on)
    assert first == second
    nan, infinite, label, outside = first
    assert "row 1: the logits have NaN" in nan
    assert "row 1: the logits have NaN" in infinite
    assert "label is outside the vocabulary (found 16)" in label
    assert "outside the vocabulary (expected ids 0 to 15; found 16)" in outside


def head_cases() -> list[tuple[HeadCase, Tensor | None, Any]]:
    """Case, ghost and stored logits: sets of their own and shared; some miss a whole shard."""
    cases: list[tuple[HeadCase, Tensor | None, Any]] = []
    for groups in (0, 4):
        for seed, share in enumerate((0.3, 0.01)):
            case = head_case(T=140, V=64, H=16, seed=seed, groups=groups, share=share, scale=0.5)
            stored = tails.own_sets(case, seed=2)
            cases += [(case, None, stored), (case, case.upstream_T * 2, stored)]
    return cases


def heads_on(rank: int, world_size: int, reduce_hidden_grad: bool) -> list[list[Tensor]]:
    """By case: loss, dH and dW of this rank's shard, restricted and full; the outside mass; and the
    same three with a divergence.
    """
    found, rows = [], 64 // world_size
    shard: dict[str, Any] = {"vocab_start": rank * rows, "tp_group": dist.group.WORLD}
    for case, tail_logit_T, stored in head_cases():
        weight = case.weight_VH[rank * rows : (rank + 1) * rows].clone()
        options = {**shard, "reduce_hidden_grad": reduce_hidden_grad}
        restricted = partial(
            restricted_cross_entropy, candidate_ids=case.ids, candidate_offsets=case.offsets,
            labels_T=case.labels_T, group_offsets=case.group_offsets, tail_logit_T=tail_logit_T,
        )  # fmt: skip
        full = partial(vocab_parallel_cross_entropy, labels_N=case.labels_T)
        results: list[Tensor] = []
        for loss in (restricted, full):
            operands = case.hidden_TH.clone().requires_grad_(), weight.clone().requires_grad_()
            loss_T = loss(*operands, **options)
            (loss_T * case.upstream_T).sum().backward()
            results += [loss_T.detach(), *(o.grad for o in operands if o.grad is not None)]
        sets = case.sets(rank * rows, (rank + 1) * rows)
        results += outside_mass(case.hidden_TH, weight, sets, tp_group=dist.group.WORLD)[:1]
        backend = HEAD.choose("cpu", torch.empty(0))
        results += tails.run(
            case, own=stored, kl_weight=0.5, backend=backend, weight_VH=weight, **shard
        )
        found.append(results)
    return found


def dense_heads() -> list[list[Tensor]]:
    expected = []
    for case, tail_logit_T, stored in head_cases():
        p_TV = (case.hidden_TH.double() @ case.weight_VH.double().T).softmax(1)
        outside_T = (p_TV * ~case.mask_TV).sum(1)
        divergence = tails.dense(case, own=stored, kl_weight=0.5)
        expected.append([*case.dense(tail_logit_T), *case.dense_full(), outside_T, *divergence])
    return expected


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("reduce_hidden_grad", [True, False])
def test_losses_and_gradients_equal_dense(world_size: int, reduce_hidden_grad: bool) -> None:
    ranks = pool.run(world_size, heads_on, reduce_hidden_grad)
    for case, dense in enumerate(dense_heads()):
        for part, expected in enumerate(dense):
            shards = [rank[case][part] for rank in ranks]
            if part in (2, 5, 9):  # weight: each rank has the gradient of its rows
                found = torch.cat(shards)
            elif part in (1, 4) and not reduce_hidden_grad:  # partial: the caller's region sums
                found = torch.stack(shards).sum(0)
            else:
                found = shards[0]
                assert all(torch.equal(shard, found) for shard in shards)
            assert error(found, expected, floor=1e-2) < 2e-6, (case, part)


def losses_of_lost_labels_on(rank: int, world_size: int) -> list[float]:
    """Of labels that no set has: below the vocabulary, in each shard, above it."""
    lost = torch.tensor([-1, 0, 3, 7, 8, 100])
    ids = torch.tensor([1, 5], dtype=torch.int32)
    loss_T = restricted_cross_entropy(
        torch.ones(6, 2), torch.ones(4, 2), ids.repeat(6), torch.arange(0, 14, 2), lost,
        vocab_start=4 * rank, tp_group=dist.group.WORLD, validate=False,
    )  # fmt: skip
    return loss_T.tolist()


def test_a_label_that_no_rank_finds_has_an_infinite_loss() -> None:
    for losses in pool.run(2, losses_of_lost_labels_on):
        assert losses == [float("inf")] * 6
