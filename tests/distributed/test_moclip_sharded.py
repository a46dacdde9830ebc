"""MoClip over a model cut into TP2 x PP2 equals MoClip on the whole of it."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay.config import OptimizerConfig
from megatron_replay.optim import MoClip
from megatron_replay.optim.build import build_optimizer, counts_once
from megatron_replay.training.step import wrap_for_training
from tests import pool, tiny
from tests.distributed import layouts
from tests.distributed.layouts import Layout

pytestmark = pytest.mark.distributed
STEPS, SETTINGS = 6, {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.1, "max_angle": 40.0}
#: A two-stage model: each stage one matrix cut over TP and one norm held whole by both TP ranks;
#: the embedding, cut over TP, is tied: the last stage holds a copy.
WHOLE = {"embedding": (8, 3), "matrix0": (4, 5), "norm0": (7,), "matrix1": (6, 4), "norm1": (7,)}
HELD = {0: ("embedding", "matrix0", "norm0"), 1: ("matrix1", "norm1", "embedding")}


def value(name: str, step: int) -> Tensor:
    """Start (step 0) or gradient: large in what is duplicated, where a double count shows."""
    seed = list(WHOLE).index(name)
    drift = torch.randn(WHOLE[name], generator=torch.Generator().manual_seed(seed))
    noise = torch.randn(WHOLE[name], generator=torch.Generator().manual_seed(1000 * step + seed))
    return (noise + 2 * math.cos(step) * drift) * (2.0 if "norm" in name else 1.0)


def shard(name: str, whole: Tensor, tp_rank: int) -> Tensor:
    return whole if "norm" in name else whole.chunk(2)[tp_rank]


def counted(name: str, tp_rank: int, pp_rank: int) -> bool:
    return (tp_rank == 0 or "norm" not in name) and not (name == "embedding" and pp_rank == 1)


def whole_run(obtuse: str) -> tuple[dict[str, Tensor], list[float]]:
    params = {name: torch.nn.Parameter(value(name, 0)) for name in WHOLE}
    optimizer, degrees = MoClip(params.values(), obtuse=obtuse, **SETTINGS), []
    for step in range(1, STEPS + 1):
        for name, param in params.items():
            param.grad = value(name, step)
        optimizer.step()
        degrees.append(optimizer.last_angle.as_floats()["degrees"])
    return {name: p.detach() for name, p in params.items()}, degrees


def sharded_run(rank: int, _: int, obtuse: str, filtered: bool) -> dict[str, Any]:
    """This rank's largest error against the whole, the angles it saw, and what it sent."""
    tp_rank, pp_rank = rank % 2, rank // 2
    params = {
        name: torch.nn.Parameter(shard(name, value(name, 0), tp_rank).clone())
        for name in HELD[pp_rank]
    }
    enters = {id(p): counted(name, tp_rank, pp_rank) for name, p in params.items()}
    optimizer = MoClip(params.values(), obtuse=obtuse, **SETTINGS)
    optimizer.reduce_angle_over(dist.group.WORLD, lambda p: enters[id(p)] or not filtered)
    sent, degrees, all_reduce = [], [], dist.all_reduce

    def recorded(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append((tuple(tensor.shape), tensor.dtype))
        return all_reduce(tensor, *args, **kwargs)

    with mock.patch.object(dist, "all_reduce", recorded):
        for step in range(1, STEPS + 1):
            for name, param in params.items():
                param.grad = shard(name, value(name, step), tp_rank).clone()
            optimizer.step()
            degrees.append(optimizer.last_angle.as_floats()["degrees"])
    expected, _ = whole_run(obtuse)
    errors = [
        (p.detach() - shard(name, expected[name], tp_rank)).abs().max().item()
        for name, p in params.items()
    ]
    return {"error": max(errors), "degrees": degrees, "sent": sent}


def both(rank: int, world_size: int) -> dict[Any, Any]:
    cases = [("line", True), ("zero", True), ("line", False)]
    return {case: sharded_run(rank, world_size, *case) for case in cases}


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    return pool.run(4, both)


@pytest.mark.parametrize("obtuse", ["line", "zero"])
def test_the_sharded_run_equals_the_whole_one(ranks, obtuse):
    _, degrees = whole_run(obtuse)
    assert min(degrees[1:]) < 90 < max(degrees), "both sides are met"
    for rank in ranks:
        assert rank[obtuse, True]["error"] < 2e-6
        assert rank[obtuse, True]["degrees"] == pytest.approx(degrees, abs=1e-3)


def test_counting_duplicates_twice_is_seen(ranks):
    assert all(rank["line", False]["error"] > 1e-3 for rank in ranks)


def test_a_step_sends_three_fp32_numbers_once(ranks):
    for rank in ranks:
        assert rank["line", True]["sent"] == [((3,), torch.float32)] * STEPS


def non_finite_on_one_rank(rank: int, _: int) -> tuple[int, bool]:
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = MoClip([param], lr=0.1)
    optimizer.reduce_angle_over(dist.group.WORLD, lambda p: True)
    param.grad = torch.full((3,), float("nan") if rank == 1 else 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        optimizer.step()
    return optimizer.skipped_steps, bool((param == 0).all())


def nothing_on_one_rank(rank: int, _: int) -> float:
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = MoClip([{"params": []}, {"params": [param]}], lr=0.1)
    optimizer.reduce_angle_over(dist.group.WORLD, lambda p: True)
    if rank == 0:
        param.grad = torch.ones(3)
    optimizer.step()
    return optimizer.last_angle.grad_norm.item()


def small_cases(rank: int, world_size: int) -> tuple[Any, Any]:
    return non_finite_on_one_rank(rank, world_size), nothing_on_one_rank(rank, world_size)


def test_ranks_decide_alike():
    """A gradient that is not finite on one rank skips all; one without gradients does not hang."""
    for skipped, norm in pool.run(2, small_cases):
        assert skipped == (1, True)
        assert norm == pytest.approx(3**0.5)


def count_parameters(rank: int, world_size: int, checkpoints: list[Path]) -> list[int]:
    """Counted parameters of this rank, as the optimizer that Stage 1 builds sees them."""
    layout = Layout(tp=2, pp=world_size // 2)
    groups = layouts.join_groups(layout)
    totals = []
    for checkpoint in checkpoints:
        for bf16 in (False, True):
            model = wrap_for_training(
                layouts.build(Layout(tp=2, pp=layout.pp, bf16=bf16), groups, checkpoint)
            )
            optimizer = build_optimizer(OptimizerConfig(lr=1e-3), model, groups, bf16=bf16)
            params = [p for group in optimizer.optimizer.param_groups for p in group["params"]]
            totals.append(
                sum(p.numel() for p in params if counts_once(p, tp_group=groups.tp_group))
            )
    return totals


def test_every_weight_of_the_model_counts_exactly_once(tmp_path):
    checkpoints = [tiny.save_qwen3(tmp_path / str(tied), tied=tied) for tied in (True, False)]
    expected = []
    for checkpoint in checkpoints:
        model = tiny.load_reference(checkpoint)
        expected += [sum(p.numel() for p in model.parameters())] * 2
    per_rank = pool.run(4, count_parameters, checkpoints)
    assert [sum(column) for column in zip(*per_rank, strict=True)] == expected
