"""Nothing as large as the vocabulary's weights is made in a training step: peak memory, measured.

Shapes: V vocabulary, H hidden channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_replay import flags
from megatron_replay.config import Stage1Config
from megatron_replay.forward import forward_backward
from megatron_replay.training.build import build_run
from tests import pool
from tests.distributed.layouts import Layout, join_groups
from tests.e2e import stages

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
    ),
]

V, H = 400_000, 64
WEIGHT_MIB = V * H * 4 / 2**20  # 98
#: What a step of the rest of this model takes at its peak, with room.
OTHERS_MIB = 12


def resident_mib(which: str) -> float:
    """Resident memory: VmRSS now, VmHWM at its highest since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


def step_on(rank: int, world_size: int, argv: list[str], dense: bool) -> dict[str, Any]:
    """MiB that the second step's peak is above where it began; the first one warms up."""
    config = flags.parse(Stage1Config, argv, program="stage1").config
    run = build_run(config, join_groups(Layout(tp=world_size)))
    [work] = run.make_batch(0).micro_batches
    if dense:  # the head makes a tensor of the weight's size
        head = work.head
        work = work._replace(head=lambda h, weight: head(h, weight) + 0 * (weight * 1).sum())
    forward_backward(run.wrapped, [work])
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before = resident_mib("VmRSS")
    forward_backward(run.wrapped, [work])
    return {
        "mib": resident_mib("VmHWM") - before,
        "moved": bool(run.model.module.output_weight().main_grad.any()),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tied and an untied model, with a store of two documents."""
    shape = {"vocab_size": V, "num_hidden_layers": 1}
    store = ["--position-strategy", "all", "--max-candidates", 50]
    return {
        name: stages.prepare(
            tmp_path_factory.mktemp(name), *store, documents=2, tied=name == "tied", **shape
        )
        for name in ("tied", "untied")
    }


def measure(folder: Path, save: Path, tp: int, scope: str, *, dense: bool = False) -> list[Any]:
    flags = ["--probe-interval", 0, "--global-batch-size", 1, "--candidate-scope", scope]
    flags += ["--tensor-model-parallel-size", tp]
    return pool.run(tp, step_on, list(map(str, stages.argv(folder, save, *flags))), dense)


@pytest.mark.parametrize("scope", ["position", "document"])
@pytest.mark.parametrize("weights", ["tied", "untied"])
@pytest.mark.parametrize("tp", [1, 2])
def test_no_dense_weight_gradient(folders, tmp_path, tp, weights, scope):
    for found in measure(folders[weights], tmp_path / "run", tp, scope):
        assert found["moved"]
        assert found["mib"] < OTHERS_MIB


def test_the_measure_sees_a_dense_one(folders, tmp_path):
    [found] = measure(folders["untied"], tmp_path / "run", 1, "position", dense=True)
    assert found["mib"] > 0.9 * WEIGHT_MIB
