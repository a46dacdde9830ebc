"""One angle for a model over TP 2 x PP 2, with duplicated and tied weights, equals one process."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_replay.errors import ConfigError
from megatron_replay.optim import MoClip
from tests import pool

pytestmark = pytest.mark.distributed

STEPS, TP, PP = 6, 2, 2


@dataclass(frozen=True)
class Weight:
    """A weight of the whole model: its shape, the dimension TP splits, the stages that hold it."""

    shape: tuple[int, ...]
    split: int | None
    stages: tuple[int, ...]


# The embedding is tied: stage 1 holds a copy for its output layer.
MODEL = {
    "embedding": Weight((32, 8), 0, (0, 1)),
    "norm_0": Weight((8,), None, (0,)),
    "qkv_0": Weight((24, 8), 0, (0,)),
    "proj_0": Weight((8, 8), 1, (0,)),
    "norm_1": Weight((8,), None, (1,)),
    "qkv_1": Weight((24, 8), 0, (1,)),
    "proj_1": Weight((8, 8), 1, (1,)),
}


def whole(seed: int) -> dict[str, Tensor]:
    """Normal tensors in the model's shapes, the norms far larger: double counting must show."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(weight.shape, generator=generator) * (5 if "norm" in name else 1)
        for name, weight in MODEL.items()
    }


def gradients() -> list[dict[str, Tensor]]:
    """Of which every second one points somewhat against the last: acute and obtuse angles."""
    drift = whole(100)
    return [
        {name: noise + (-0.8) ** k * drift[name] for name, noise in whole(101 + k).items()}
        for k in range(STEPS)
    ]


def shard(name: str, tensor: Tensor, tp_rank: int) -> Tensor:
    split = MODEL[name].split
    return tensor.clone() if split is None else tensor.chunk(TP, split)[tp_rank].contiguous()


def train(
    optimizer: MoClip, params: dict[str, nn.Parameter], tp_rank: int | None
) -> list[tuple[float, float]]:
    """Returns (a, b) of every step; ``tp_rank`` None: the whole tensors."""
    trace = []
    for grads in gradients():
        for name, param in params.items():
            param.grad = (
                grads[name].clone() if tp_rank is None else shard(name, grads[name], tp_rank)
            )
        optimizer.step()
        assert optimizer.last_angle is not None
        trace.append((optimizer.last_angle.a.item(), optimizer.last_angle.b.item()))
    return trace


def on_a_rank(rank: int, world_size: int, expected: Any) -> dict[str, Any]:
    """Train this rank's part, counting once and counting every copy; then a step with a NaN."""
    tp_rank, stage = rank % TP, rank // TP
    names = [name for name, weight in MODEL.items() if stage in weight.stages]
    result: dict[str, Any] = {}
    for counting in ("once", "every copy"):
        params = {n: nn.Parameter(shard(n, whole(0)[n], tp_rank)) for n in names}
        left_out = {
            id(param)
            for name, param in params.items()
            if (name == "embedding" and stage == 1) or (MODEL[name].split is None and tp_rank > 0)
        }
        if counting == "every copy":
            left_out = set()
        optimizer = MoClip(list(params.values()), lr=0.01, weight_decay=0.1)
        optimizer.reduce_angle_over(
            dist.group.WORLD, lambda param, out=left_out: id(param) not in out
        )
        trace = train(optimizer, params, tp_rank)
        result[counting] = {
            "angle": max(
                abs(x - y)
                for ours, theirs in zip(trace, expected["trace"], strict=True)
                for x, y in zip(ours, theirs, strict=True)
            ),
            "params": max(
                (param - shard(name, expected["params"][name], tp_rank)).abs().max().item()
                for name, param in params.items()
            ),
            "norm": params[f"norm_{stage}"].detach().clone(),
        }
    result["skipped"] = skipped(optimizer, params, bad=rank == 2)
    with pytest.raises(ConfigError, match="cannot be copied"):
        copy.deepcopy(optimizer)
    return result


def skipped(optimizer: MoClip, params: dict[str, nn.Parameter], *, bad: bool) -> bool:
    """Whether nothing moved here when one rank's gradient has a NaN."""
    before = [param.detach().clone() for param in params.values()]
    for param in params.values():
        param.grad = torch.full_like(param, math.nan if bad else 1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    unmoved = all(map(torch.equal, before, params.values()))
    return unmoved and optimizer.skipped_steps == 1 and "not finite" in str(caught[0].message)


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    params = {name: nn.Parameter(tensor) for name, tensor in whole(0).items()}
    trace = train(MoClip(list(params.values()), lr=0.01, weight_decay=0.1), params, None)
    assert sum(a != 1 for a, _ in trace) >= 3  # the run to compare with clips
    expected = {"trace": trace, "params": {name: p.detach() for name, p in params.items()}}
    return pool.run(TP * PP, on_a_rank, expected)


def test_sharded_equals_one_process(results: list[dict[str, Any]]) -> None:
    assert max(result["once"]["angle"] for result in results) < 1e-6
    assert max(result["once"]["params"] for result in results) < 1e-6


def test_counting_every_copy_would_be_seen(results: list[dict[str, Any]]) -> None:
    assert max(result["every copy"]["angle"] for result in results) > 1e-2
    assert max(result["every copy"]["params"] for result in results) > 1e-4


def test_copies_stay_bitwise_equal(results: list[dict[str, Any]]) -> None:
    for first, second in (results[:2], results[2:]):
        assert torch.equal(first["once"]["norm"], second["once"]["norm"])


def test_all_ranks_skip_together(results: list[dict[str, Any]]) -> None:
    assert all(result["skipped"] for result in results)


def only_copies(rank: int, world_size: int) -> float:
    """Rank 1 counts nothing and has nothing to count; it must join the all-reduce all the same."""
    param = nn.Parameter(torch.ones(4))
    optimizer = MoClip([param], lr=0.1)
    optimizer.reduce_angle_over(dist.group.WORLD, lambda _: rank == 0)
    for grad in (1.0, -2.0):
        param.grad = torch.full_like(param, grad)
        optimizer.step()
    with pytest.raises(ConfigError, match="angle_scope='tensor' is not available"):
        MoClip([param], lr=0.1, angle_scope="tensor").reduce_angle_over(
            dist.group.WORLD, lambda _: True
        )
    assert optimizer.last_angle is not None
    return optimizer.last_angle.grad_norm.item()


def test_a_rank_may_hold_nothing_but_copies() -> None:
    assert pool.run(2, only_copies) == [4.0, 4.0]
