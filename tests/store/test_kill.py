"""Killed at any moment, a rerun completes the store to the bytes of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_replay.errors import StoreError
from megatron_replay.store import CandidateReader, CandidateWriter
from tests import processes
from tests.store.examples import contents, describe, require_sound, write_shard

DESCRIPTION = describe(num_documents=120, documents_per_shard=3)


def run_to_the_end(directory: Path, num_documents: int) -> None:
    description = describe(num_documents=num_documents, documents_per_shard=3)
    with CandidateWriter(directory, description, lock=True) as writer:
        for number in writer.missing_shards():
            write_shard(writer, number)
        writer.finish()


def run_and_die_at(step: int, directory: Path) -> None:
    """Run, but be killed in place of the ``step``-th fsync or rename."""
    taken = 0

    def mortal(call: Callable[..., None]) -> Callable[..., None]:
        def counted(*arguments: object) -> None:
            nonlocal taken
            taken += threading.current_thread() is threading.main_thread()  # not the lock's
            if taken == step:
                os.kill(os.getpid(), signal.SIGKILL)
            call(*arguments)

        return counted

    os.fsync, os.replace = mortal(os.fsync), mortal(os.replace)
    run_to_the_end(directory, 6)


# store.json, two shards of two files, manifest.json: each is synced, renamed, its directory synced.
# The parents of two new directories are synced, too, and who holds the lock.
NUM_STEPS = 6 * 3 + 3


def test_killed_in_place_of_each_step_on_the_file_system(tmp_path: Path) -> None:
    run_to_the_end(tmp_path / "whole", 6)
    for step in range(1, NUM_STEPS + 2):
        directory = tmp_path / f"died-at-{step}"
        code = processes.wait(processes.fork(run_and_die_at, step, directory))
        assert code == (-signal.SIGKILL if step <= NUM_STEPS else 0)
        if step < NUM_STEPS:  # at the last step the manifest is already in place
            with pytest.raises(StoreError, match=r"no candidate store|unfinished"):
                CandidateReader(directory)
        run_to_the_end(directory, 6)
        assert contents(directory) == contents(tmp_path / "whole")


def run_and_die_after(published: int, seconds: float, directory: Path) -> None:
    """Run, but be killed some time after ``published`` shards are, and before three more are."""
    begin, begun = CandidateWriter.shard, 0

    def mortal(writer: CandidateWriter, number: int) -> Any:
        nonlocal begun
        begun += 1
        if begun == published + 1:
            threading.Timer(seconds, os.kill, [os.getpid(), signal.SIGKILL]).start()
        if begun == published + 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return begin(writer, number)

    CandidateWriter.shard = mortal  # type: ignore[assignment,method-assign]
    run_to_the_end(directory, 120)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    run_to_the_end(tmp_path / "whole", 120)
    draw = random.Random(0)
    directory, progress = tmp_path / "killed", []
    for _ in range(15):
        moment = draw.randint(0, 2), draw.uniform(0, 0.004)
        code = processes.wait(processes.fork(run_and_die_after, *moment, directory))
        assert code == -signal.SIGKILL
        progress.append(len(CandidateWriter(directory, DESCRIPTION).missing_shards()))
    assert progress == sorted(progress, reverse=True)  # no shard, once there, is ever lost
    assert 0 < progress[-1] < DESCRIPTION.num_shards
    run_to_the_end(directory, 120)
    assert contents(directory) == contents(tmp_path / "whole")
    require_sound(CandidateReader(directory))
