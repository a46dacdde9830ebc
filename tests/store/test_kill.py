"""Killed at any moment, a rerun completes the store to the bytes of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from megatron_replay.errors import StoreError
from megatron_replay.store import CandidateReader, CandidateWriter
from tests.store.examples import contents, describe, require_sound, write_shard

DESCRIPTION = describe(num_documents=120, documents_per_shard=3)


def run_to_the_end(directory: Path, num_documents: int) -> None:
    description = describe(num_documents=num_documents, documents_per_shard=3)
    with CandidateWriter(directory, description, lock=True) as writer:
        for number in writer.missing_shards():
            write_shard(writer, number)
        writer.finish()


def fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def run_and_die_at(step: int, directory: Path) -> None:
    """Run, but be killed in place of the ``step``-th fsync or rename."""
    taken = 0

    def mortal(call: Callable[..., None]) -> Callable[..., None]:
        def counted(*arguments: object) -> None:
            nonlocal taken
            taken += 1
            if taken == step:
                os.kill(os.getpid(), signal.SIGKILL)
            call(*arguments)

        return counted

    os.fsync, os.replace = mortal(os.fsync), mortal(os.replace)
    run_to_the_end(directory, 6)


# store.json, two shards of two files, manifest.json: each is synced, renamed, its directory synced.
# The parents of two new directories are synced, too.
NUM_STEPS = 6 * 3 + 2


def test_killed_in_place_of_each_step_on_the_file_system(tmp_path: Path) -> None:
    run_to_the_end(tmp_path / "whole", 6)
    for step in range(1, NUM_STEPS + 2):
        directory = tmp_path / f"died-at-{step}"
        child = fork(partial(run_and_die_at, step, directory))
        died = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert died == (step <= NUM_STEPS)
        if step < NUM_STEPS:  # at the last step the manifest is already in place
            with pytest.raises(StoreError, match=r"no candidate store|unfinished"):
                CandidateReader(directory)
        run_to_the_end(directory, 6)
        assert contents(directory) == contents(tmp_path / "whole")


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """Fifteen deaths, each shortly after the run under way has published 0 to 2 more shards."""
    run_to_the_end(tmp_path / "whole", 120)
    draw = random.Random(0)
    directory = tmp_path / "killed"
    left, progress = DESCRIPTION.num_shards, []
    for _ in range(15):
        child = fork(partial(run_to_the_end, directory, 120))
        goal, deadline = max(left - draw.randint(0, 2), 0), time.monotonic() + 30
        while left > goal:
            assert time.monotonic() < deadline, "the run makes no progress"
            left = DESCRIPTION.num_shards - len(list(directory.glob("*/shard-*.idx")))
        time.sleep(draw.uniform(0, 0.004))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left = len(CandidateWriter(directory, DESCRIPTION).missing_shards())
        progress.append(left)
    assert progress == sorted(progress, reverse=True)  # no shard, once there, is ever lost
    assert any(0 < left < DESCRIPTION.num_shards for left in progress)
    run_to_the_end(directory, 120)
    assert contents(directory) == contents(tmp_path / "whole")
    require_sound(CandidateReader(directory))
