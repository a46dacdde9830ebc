"""Sharded equals dense: selection bitwise, losses and gradients against float64 on one process.

Shapes: T positions, V vocabulary, H hidden channels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay.errors import DataError, TrainingError
from megatron_replay.functional import (
    SelectedCandidates,
    restricted_cross_entropy,
    select_candidates,
    vocab_parallel_cross_entropy,
)
from megatron_replay.loss.full import outside_mass
from tests import pool
from tests.loss.references import HeadCase, error, head_case

pytestmark = pytest.mark.distributed

#: First ids of the shards and one past the last: even, uneven, and shards below max_candidates.
SHARDS = {
    1: [[0, 600]],
    2: [[0, 300, 600], [0, 7, 600], [0, 599, 600]],
    4: [[0, 150, 300, 450, 600], [0, 1, 3, 520, 600], [0, 590, 593, 597, 600]],
}


def logits_cases() -> dict[str, Tensor]:
    """Ordinary, tied, and coarse logits [T, 600], and logits on which the cut is a near thing."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(17, 600, generator=generator) * 2
    levels = torch.randint(4, (17, 600), generator=generator).float() - 2
    levels[levels == 0] *= torch.randn(int((levels == 0).sum()), generator=generator).sign()
    return {
        "fp32": normal,
        "bf16": normal.bfloat16(),
        "flat": normal * 1e-4,
        "ties": levels,
        "equal": torch.zeros(17, 600),
    }


def select_on(rank: int, world_size: int, bounds: list[int]) -> list[dict[str, Tensor]]:
    labels_T = torch.arange(17) * 37 % 600
    found = []
    for logits_TV in logits_cases().values():
        for coverage, cap in [(0.5, 255), (0.95, 200), (0.95, 20), (1.0, 3)]:
            sets = select_candidates(
                logits_TV[:, bounds[rank] : bounds[rank + 1]],
                labels_T,
                coverage=coverage,
                max_candidates=cap,
                vocab_start=bounds[rank],
                tp_group=dist.group.WORLD,
            )
            found.append(
                {name: getattr(sets, name) for name in SelectedCandidates.__dataclass_fields__}
            )
    return found


def select_all(rank: int, world_size: int) -> list[list[dict[str, Tensor]]]:
    return [select_on(rank, world_size, bounds) for bounds in SHARDS[world_size]]


def test_selection_is_bitwise_the_same_for_every_sharding() -> None:
    (expected,) = pool.run(1, select_all)[0]
    for world_size in (2, 4):
        for shardings in pool.run(world_size, select_all):  # every rank, every sharding
            for found in shardings:
                for ours, reference in zip(found, expected, strict=True):
                    for name, tensor in reference.items():
                        assert torch.equal(ours[name], tensor), name


def refuse_on(rank: int, world_size: int) -> list[str]:
    """What each rank says of a fault that only the last one holds."""
    messages = []
    for fault in (float("nan"), float("inf")):
        logits_TV = torch.zeros(3, 8)
        if rank == world_size - 1:
            logits_TV[1, 2] = fault
        with pytest.raises(TrainingError) as caught:
            select_candidates(
                logits_TV, torch.zeros(3).long(), vocab_start=8 * rank, tp_group=dist.group.WORLD
            )
        messages.append(str(caught.value))
    with pytest.raises(DataError) as refused:
        select_candidates(
            torch.zeros(1, 8),
            torch.tensor([8 * world_size]),
            vocab_start=8 * rank,
            tp_group=dist.group.WORLD,
        )
    return [*messages, str(refused.value)]


def test_every_rank_refuses_what_one_rank_sees() -> None:
    first, second = pool.run(2, refuse_on)
    assert first == second
    assert all("row 1: the logits have NaN" in message for message in first[:2])
    assert "label is outside the vocabulary (found 16)" in first[2]


def head_cases() -> list[tuple[HeadCase, Tensor | None]]:
    """Sets of their own and shared, with and without ghost; sets that miss a shard wholly."""
    cases: list[tuple[HeadCase, Tensor | None]] = []
    for groups in (0, 4):
        for seed, share in enumerate((0.3, 0.01)):
            case = head_case(T=140, V=64, H=16, seed=seed, groups=groups, share=share, scale=0.5)
            cases += [(case, None), (case, case.upstream_T * 2)]
    return cases


def heads_on(rank: int, world_size: int, reduce_hidden_grad: bool) -> list[list[Tensor]]:
    """Per case: restricted loss, dH, dW; full loss, dH, dW; outside mass; of this rank's shard."""
    found = []
    for case, tail_logit_T in head_cases():
        rows = 64 // world_size
        shard: dict[str, Any] = {"vocab_start": rank * rows, "tp_group": dist.group.WORLD}
        weight = case.weight_VH[rank * rows : (rank + 1) * rows].clone()
        sets = (case.ids, case.offsets, case.labels_T)

        def restricted(
            hidden: Tensor,
            weight: Tensor,
            sets: Any = sets,
            shard: Any = shard,
            groups: Tensor | None = case.group_offsets,
            tail: Tensor | None = tail_logit_T,
        ) -> Tensor:
            return restricted_cross_entropy(
                hidden, weight, *sets, **shard, group_offsets=groups, tail_logit_T=tail,
                reduce_hidden_grad=reduce_hidden_grad,
            )  # fmt: skip

        def full(hidden: Tensor, weight: Tensor, sets: Any = sets, shard: Any = shard) -> Tensor:
            return vocab_parallel_cross_entropy(
                hidden, weight, sets[2], **shard, reduce_hidden_grad=reduce_hidden_grad
            )

        results: list[Tensor] = []
        for loss in (restricted, full):
            operands = case.hidden_TH.clone().requires_grad_(), weight.clone().requires_grad_()
            loss_T = loss(*operands)
            (loss_T * case.upstream_T).sum().backward()
            results += [loss_T.detach(), *(o.grad for o in operands if o.grad is not None)]
        results.append(
            outside_mass(
                case.hidden_TH,
                weight,
                case.sets(rank * rows, (rank + 1) * rows),
                tp_group=dist.group.WORLD,
            )[0]
        )
        found.append(results)
    return found


def dense_heads() -> list[list[Tensor]]:
    expected = []
    for case, tail_logit_T in head_cases():
        everything = HeadCase(
            case.hidden_TH, case.weight_VH, case.labels_T, case.upstream_T,
            torch.ones(140, 64, dtype=torch.bool), None,
        )  # fmt: skip
        p_TV = (case.hidden_TH.double() @ case.weight_VH.double().T).softmax(1)
        outside_T = (p_TV * ~case.mask_TV).sum(1)
        expected.append([*case.dense(tail_logit_T), *everything.dense(), outside_T])
    return expected


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("reduce_hidden_grad", [True, False])
def test_losses_and_gradients_equal_dense(world_size: int, reduce_hidden_grad: bool) -> None:
    ranks = pool.run(world_size, heads_on, reduce_hidden_grad)
    for case, dense in enumerate(dense_heads()):
        results = [rank[case] for rank in ranks]
        for part, expected in enumerate(dense):
            shards = [result[part] for result in results]
            if part in (2, 5):  # weight: each rank has the gradient of its rows
                found = torch.cat(shards)
            elif part in (1, 4) and not reduce_hidden_grad:  # partial: the caller's region sums
                found = torch.stack(shards).sum(0)
            else:
                found = shards[0]
                assert all(torch.equal(shard, found) for shard in shards)
            assert error(found, expected, floor=1e-2) < 2e-6, (case, part)


def refuse_sets_on(rank: int, world_size: int) -> str:
    """The last id of the last shard is in the vocabulary, the one after it is not."""
    operands = torch.ones(1, 2), torch.ones(4, 2)
    shard: dict[str, Any] = {"vocab_start": 4 * rank, "tp_group": dist.group.WORLD}
    offsets, label = torch.tensor([0, 1]), torch.tensor([4 * world_size - 1])
    restricted_cross_entropy(*operands, label.int(), offsets, label, **shard)
    with pytest.raises(DataError) as caught:
        restricted_cross_entropy(*operands, label.int() + 1, offsets, label + 1, **shard)
    return str(caught.value)


def test_the_vocabulary_is_that_of_all_shards() -> None:
    for message in pool.run(2, refuse_sets_on):
        assert "outside the vocabulary (expected ids 0 to 7; found 8)" in message


def losses_of_lost_labels_on(rank: int, world_size: int) -> list[float]:
    """Of labels that no set has: below the vocabulary, in each shard, above it."""
    lost = torch.tensor([-1, 0, 3, 7, 8, 100])
    ids = torch.tensor([1, 5], dtype=torch.int32)
    loss_T = restricted_cross_entropy(
        torch.ones(6, 2), torch.ones(4, 2), ids.repeat(6), torch.arange(0, 14, 2), lost,
        vocab_start=4 * rank, tp_group=dist.group.WORLD, validate=False,
    )  # fmt: skip
    return loss_T.tolist()


def test_a_label_that_no_rank_finds_is_loud() -> None:
    for losses in pool.run(2, losses_of_lost_labels_on):
        assert losses == [float("inf")] * 6
