"""Relative L2 over ranks against numpy on the Hugging Face tensors, each of which counts once."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from safetensors.torch import load_file, save_file

from megatron_replay.checkpoint import weight_distance
from megatron_replay.checkpoint.training import TrainState, save_checkpoint
from megatron_replay.config import OptimizerConfig
from megatron_replay.errors import CheckpointError
from megatron_replay.optim.build import build_optimizer
from megatron_replay.training import readings
from megatron_replay.training.readings import Distance
from megatron_replay.training.step import wrap_for_training
from tests import pool, tiny
from tests.distributed.layouts import Layout, build, join_groups

#: (layout, whether the optimizer is sharded)
CASES = [
    (Layout(), False),
    (Layout(bf16=True), False),
    (Layout(tp=2, pp=2), False),
    (Layout(tp=4, pp=2, bf16=True), False),
    (Layout(tp=2, dp=2, bf16=True), False),
    (Layout(pp=2, dp=2, bf16=True), True),
]


def moved(theta: torch.Tensor) -> torch.Tensor:
    """Where 'training' puts a weight: a function of its value, so that copies stay copies."""
    return theta * 1.01 + 0.002


def expected(checkpoint: Path, *, bf16: bool) -> float:
    """In float64, over the tensors on disk; a tied head is not among them."""
    total = norm = 0.0
    for tensor in load_file(checkpoint / "model.safetensors").values():
        start = tensor.to(torch.bfloat16).float() if bf16 else tensor
        theta_0, theta = (np.asarray(t, np.float64) for t in (start, moved(start)))
        total += ((theta - theta_0) ** 2).sum()
        norm += (theta_0**2).sum()
    return math.sqrt(total / norm)


def measure(
    rank: int, world_size: int, layout: Layout, sharded: bool, checkpoint: Path, folder: Path
) -> tuple[float, float, float]:
    """Relative L2 before moving, after, and after against a training checkpoint of the start."""
    weight_distance.BLOCK = 1000  # blocks that end inside tensors
    groups = join_groups(layout)
    model = build(layout, groups, checkpoint)
    wrapped = wrap_for_training(model, use_distributed_optimizer=sharded)
    settings = OptimizerConfig(optimizer="adamw", lr=1.0, use_distributed_optimizer=sharded)
    optimizer = build_optimizer(settings, model, wrapped, groups)
    save_checkpoint(folder / "mcore", TrainState(0, 0, 0, {}, {}), model.module, optimizer, groups)
    from_hf, from_mcore = (
        Distance(str(load), folder / "run", model, optimizer, groups)
        for load in (checkpoint, folder / "mcore")
    )
    before = from_hf.read()
    with torch.no_grad():
        for parameter in model.module.parameters():
            master = getattr(parameter, "main_param", parameter)
            if master is not None:  # a shard that another replica has
                master.copy_(moved(master))
    weights = [parameter.clone() for parameter in model.module.parameters()]
    found = from_hf.read(), from_mcore.read()
    for parameter, weight in zip(model.module.parameters(), weights, strict=True):
        assert torch.equal(parameter, weight)  # reading the start has left the model as it is
    return before, *found


@pytest.mark.distributed
@pytest.mark.parametrize(("layout", "sharded"), CASES, ids=str)
def test_every_layout_and_source_gives_the_number(layout, sharded, tmp_path):
    tiny.save_qwen3(tmp_path / "model", tied=layout.tp == layout.pp, num_hidden_layers=2)
    results = pool.run(layout.world_size, measure, layout, sharded, tmp_path / "model", tmp_path)
    number = expected(tmp_path / "model", bf16=layout.bf16)
    assert results == [(0.0, *[pytest.approx(number, rel=1e-9)] * 2)] * layout.world_size


def stale(*_: object) -> None:
    raise OSError("stale handle")


def unusable_starts(rank: int, world_size: int, zeros: Path, folder: Path) -> list[str]:
    """The errors of: the run's own directory, weights of zero, files that do not fit or are cut."""
    groups = join_groups(Layout(tp=2))
    model = build(Layout(tp=2), groups, zeros)
    settings = OptimizerConfig(optimizer="adamw", lr=1.0)
    optimizer = build_optimizer(settings, model, wrap_for_training(model), groups)
    mcore = folder / "mcore"
    saved = save_checkpoint(mcore, TrainState(0, 0, 0, {}, {}), model.module, optimizer, groups)

    def printed(load: Path, run: Path = folder / "run") -> str:
        with pytest.raises(CheckpointError) as caught:
            Distance(str(load), run, model, optimizer, groups).read()
        return str(caught.value)

    messages = [printed(zeros, zeros), printed(zeros)]
    described = model.module.sharded_state_dict
    model.module.sharded_state_dict = lambda metadata: {
        name: dataclasses.replace(entry, key="other." + entry.key)
        for name, entry in described(metadata=metadata).items()
        if isinstance(entry, ShardedTensor)
    }
    messages.append(printed(mcore))
    model.module.sharded_state_dict = described
    if rank == 0:
        for file in saved.glob("*.distcp"):
            file.write_bytes(file.read_bytes()[:1000])
    groups.agreed(lambda: None)
    messages.append(printed(mcore))
    if rank == 1:  # a disk that only one rank cannot read
        readings.weight_reader = stale
    return [*messages, printed(zeros)]


@pytest.mark.distributed
def test_all_ranks_report_what_one_cannot_read(tmp_path):
    path = tiny.save_qwen3(tmp_path / "model", tied=True, num_hidden_layers=2)
    file = path / "model.safetensors"
    save_file({k: v * 0 for k, v in load_file(file).items()}, file, {"format": "pt"})
    one, other = pool.run(2, unusable_starts, path, tmp_path)
    assert one == other
    for message, expected in zip(one, (
        "which no longer has its first weights", "every weight is zero",
        "no tensor other.embedding.word_embeddings.weight of the model's shape",
        "mcore: cannot read again: ", "cannot read again: OSError: stale handle",
    ), strict=True):  # fmt: skip
        assert expected in message
