"""Losses on shards of the vocabulary equal float64 on one process, gradients included.

Shapes: T positions, V vocabulary, H hidden channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay.errors import DataError, TrainingError
from megatron_replay.functional import restricted_cross_entropy, select_candidates
from megatron_replay.loss.sharded import outside_mass
from tests import pool
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


def head_cases() -> Iterator[tuple[HeadCase, Tensor | None, dict[str, Any]]]:
    """Case, ghost and divergence: sets of their own and shared; some miss a whole shard."""
    for groups in (0, 4):
        for seed, share in enumerate((0.3, 0.01)):
            case = head_case(T=140, V=64, H=16, seed=seed, groups=groups, share=share, scale=0.5)
            divergence = {"stored": case.stored(seed=2), "kl_weight": 0.5}
            yield case, None, divergence
            yield case, case.upstream_T * 2, divergence


def heads_on(rank: int, world_size: int, reduce_hidden_grad: bool) -> list[list[Tensor]]:
    """By case: loss, dH and dW of this rank's shard, restricted, full and with a divergence; and
    the outside mass.
    """
    found, rows = [], 64 // world_size
    start, stop = rank * rows, (rank + 1) * rows
    shard: dict[str, Any] = {"vocab_start": start, "tp_group": dist.group.WORLD}
    shard["reduce_hidden_grad"] = reduce_hidden_grad
    for case, tail_logit_T, divergence in head_cases():
        weight = case.weight_VH[start:stop]
        outside_T, _ = outside_mass(
            case.hidden_TH, weight, case.sets(start, stop), tp_group=dist.group.WORLD
        )
        found.append([
            *case.run(weight_VH=weight, tail_logit_T=tail_logit_T, **shard),
            *case.run_full(weight_VH=weight, **shard),
            *case.run(weight_VH=weight, **divergence, **shard),
            outside_T,
        ])  # fmt: skip
    return found


def dense_heads() -> Iterator[list[Tensor]]:
    for case, tail_logit_T, divergence in head_cases():
        p_TV = (case.hidden_TH.double() @ case.weight_VH.double().T).softmax(1)
        outside_T = (p_TV * ~case.mask_TV).sum(1)
        divergent = case.dense(**divergence)
        yield [*case.dense(tail_logit_T), *case.dense_full(), *divergent, outside_T]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("reduce_hidden_grad", [True, False])
def test_losses_and_gradients_equal_dense(world_size: int, reduce_hidden_grad: bool) -> None:
    ranks = pool.run(world_size, heads_on, reduce_hidden_grad)
    for case, dense in enumerate(dense_heads()):
        for part, expected in enumerate(dense):
            shards = [rank[case][part] for rank in ranks]
            if part in (2, 5, 8):  # weight: each rank has the gradient of its rows
                found = torch.cat(shards)
            elif part in (1, 4, 7) and not reduce_hidden_grad:  # the caller's region sums
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
