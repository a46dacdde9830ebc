"""Stage 1 killed twenty times: the same command ends with the weights of an undisturbed run."""

from __future__ import annotations

import math
import os
import random
import signal
import tempfile
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_replay.checkpoint import directories
from megatron_replay.training import train
from tests import pool, processes
from tests.e2e import stages

pytestmark = pytest.mark.distributed
KILLS = 20
#: What a life is killed in place of: a change of the directory, a step, or a word between ranks.
EVENTS = 48
#: Events that one who dies some time after an event lives to see at most.
LAST_EVENTS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and a corpus of some 15 packs."""
    small = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32}
    return stages.prepare(tmp_path_factory.mktemp("kill"), documents=60, store=False, **small)


def argv(folder: Path, save: Path) -> list[object]:
    """Five epochs, a checkpoint every second step."""
    flags = "--loss full --global-batch-size 2 --train-epochs 5 --save-interval 2 --keep-last 2"
    return stages.argv(folder, save, *flags.split())


def dies(
    rank: int, world_size: int, victim: int, moment: int, seconds: float, command: list[str]
) -> int:
    """Run; rank ``victim`` is killed in place of its ``moment``-th event, or that long after it.

    A negative moment counts from the first publishing of a checkpoint on.
    """
    if rank == victim:
        passed = -math.inf if moment < 0 else 0

        def mortal(name, call):
            def counted(*arguments, **options):
                nonlocal passed
                if name == "replace" and str(arguments[1]).endswith("train_state.json"):
                    passed = max(passed, 0)
                passed += 1
                if passed == abs(moment):
                    threading.Timer(seconds, os.kill, [os.getpid(), signal.SIGKILL]).start()
                if passed == abs(moment) + (LAST_EVENTS if seconds else 0):
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **options)

            return counted

        for module, names in (
            (os, ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir")),
            (dist, ("all_gather_object", "broadcast_object_list")),
            (train, ("train_step",)),
        ):
            for name in names:
                setattr(module, name, mortal(name, getattr(module, name)))
    return stages.main(rank, world_size, "stage1", command, None)[0]


def live(victim: int, moment: int, seconds: float, command: list[str]) -> list[int | None]:
    """One life of two ranks, ended as torchrun ends one; their exit codes, the victim's first."""
    with tempfile.TemporaryDirectory() as place, processes.ended():
        ranks = pool.start(2, Path(place), dies, victim, moment, seconds, command)
        codes = [processes.wait(ranks[victim])]
        if codes == [-signal.SIGKILL]:
            os.kill(ranks[1 - victim], signal.SIGTERM)
        return [*codes, processes.wait(ranks[1 - victim], 0.3)]  # then it is killed


def test_killed_twenty_times(folder, tmp_path):
    draw = random.Random(0)
    whole, save = tmp_path / "whole", tmp_path / "killed"
    stages.succeed("stage1", *argv(folder, whole), dp=2)
    command = [*map(str, argv(folder, save)), "--tensor-model-parallel-size", "1"]
    reached, saving, unnamed = [], 0, 0
    for life in range(KILLS):
        victim, moment, seconds = draw.randint(0, 1), draw.randint(1, EVENTS), 0.0
        if life % 4 == 2:  # rank 0 publishes
            victim, moment = 0, -draw.randint(7, 16)
        if life % 4 == 3:
            seconds = draw.uniform(0, 0.05)
        codes = live(victim, moment, seconds, command)
        assert codes[0] == -signal.SIGKILL, f"life {life} came to its end: {reached}"
        reached.append(directories.latest_iteration(save) or 0)
        saving += bool(directories.unfinished(save))
        unnamed += any(number > reached[-1] for number in directories.iterations(save))
    assert reached == sorted(reached)
    assert saving > 2
    assert unnamed > 0
    total = len(stages.losses(whole))
    assert total / 5 < reached[-1] < total  # beyond the first epoch
    stages.succeed("stage1", *argv(folder, save), dp=2)
    assert stages.losses(save) == stages.losses(whole)
    assert stages.weights(save) == stages.weights(whole)
    assert directories.iterations(save) == directories.iterations(whole)
    assert not list(save.glob(".iter_*"))
