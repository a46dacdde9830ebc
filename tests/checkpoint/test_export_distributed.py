"""export_hf over real ranks: the model they loaded comes out as it went in; failures reach all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from megatron_replay.checkpoint import export
from megatron_replay.checkpoint.export import export_hf
from megatron_replay.checkpoint.hf import HFReader
from megatron_replay.errors import ReplayError
from megatron_replay.model.config import ModelConfig
from tests import pool, tiny
from tests.distributed.layouts import Layout, build, join_groups
from tests.same_weights import require_equal

LAYOUTS = (Layout(tp=2, pp=2), Layout(tp=4), Layout(tp=2, dp=2))


def export_all(rank: int, world_size: int, cases: dict[str, Path], folder: Path) -> list[str]:
    """Export every layout; then fail three ways, and return the lines this rank's user reads."""
    for layout in LAYOUTS:
        groups = join_groups(layout)
        for name, source in cases.items():
            model = build(layout, groups, source)
            export_model(model, groups, folder / f"{layout}-{name}")
    layout = LAYOUTS[0]
    groups = join_groups(layout)
    model = build(layout, groups, cases["tied"])
    lines = [refusal(model, groups, folder / f"{layout}-tied")]
    save_file = export.save_file
    export.save_file = no_space if (groups.pp_rank, groups.tp_rank) == (1, 0) else save_file
    lines.append(refusal(model, groups, folder / "full"))
    export.save_file, export.publish = save_file, no_space
    lines.append(refusal(model, groups, folder / "late"))
    return lines


def export_model(model, groups, directory: Path) -> None:
    export.MAX_SHARD_BYTES = 150_000
    export_hf(model, directory, groups, dtype=torch.float32)


def refusal(model, groups, directory: Path) -> str:
    try:
        export_model(model, groups, directory)
    except ReplayError as error:
        return f"{type(error).__name__} {error.exit_code}: {error}"
    return "no error"


def no_space(*_: object, **__: object) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    raise export.output_error("shard", error)


@pytest.mark.distributed
def test_export_over_ranks(sharded_qwen3, tmp_path):
    cases = {"tied": sharded_qwen3[True], "untied": sharded_qwen3[False]}
    # Padded and in unequal stages; with biases.
    cases["odd"] = tiny.save_qwen2(
        tmp_path / "model", tied=True, num_hidden_layers=3, vocab_size=513
    )
    lines = pool.run(4, export_all, cases, tmp_path)
    for layout in LAYOUTS:
        for name, source in cases.items():
            exported = tmp_path / f"{layout}-{name}"
            require_equal(exported, source)
            HFReader(exported).check(ModelConfig.from_hf(exported))  # each tensor in one file
            stages = {path.name.split("-")[1] for path in exported.glob("model-*")}
            assert stages == {f"{stage:03d}" for stage in range(layout.pp)}
    for refused, full, late in lines:  # the same on every rank: none is left waiting
        assert refused.startswith("OutputError 6: ")
        assert "the directory is not empty" in refused
        assert full == late
        assert "OutputError 6: shard: no space left" in full
    assert not (tmp_path / "full").exists()
    assert not (tmp_path / "late").exists()
