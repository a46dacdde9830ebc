"""Which iterations stay under --keep-last, killed or not."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from megatron_replay.checkpoint import directories
from megatron_replay.checkpoint.directories import (
    LATEST,
    iteration_directory,
    iterations,
    keep_only,
)
from megatron_replay.errors import OutputError
from tests import processes


def save(directory: Path, numbers: list[int], newest: int) -> Path:
    """A directory of checkpoints, of which the marker names ``newest``."""
    for number in numbers:
        path = iteration_directory(directory, number)
        path.mkdir(parents=True)
        (path / "train_state.json").write_text("{}")
    (directory / LATEST).write_text(f"{newest}\n")
    return directory


NUMBERS = [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize(
    ("last", "kept"), [(0, NUMBERS), (1, [12]), (3, [8, 10, 12]), (9, NUMBERS)]
)
def test_what_is_kept(tmp_path, last, kept):
    save(tmp_path, NUMBERS, 12)
    keep_only(tmp_path, last=last)
    assert iterations(tmp_path) == kept


def test_what_the_marker_does_not_name_is_not_touched(tmp_path):
    """A run set back to 6: what is newer is neither counted nor removed."""
    save(tmp_path, NUMBERS, 6)
    (tmp_path / "iter_x").mkdir()
    keep_only(tmp_path, last=1)
    assert iterations(tmp_path) == [6, 8, 10, 12]


def test_nothing_saved_yet(tmp_path):
    keep_only(tmp_path, last=1)
    assert list(tmp_path.iterdir()) == []


def keep_and_die_at(step: int, directory: Path) -> None:
    taken = 0

    def mortal(call):
        def counted(*arguments, **options):
            nonlocal taken
            taken += 1
            if taken == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return counted

    for name in ("fsync", "replace", "unlink", "rmdir"):  # shutil.rmtree takes the last two
        setattr(os, name, mortal(getattr(os, name)))
    keep_only(directory, last=2)


def test_killed_at_each_step(tmp_path):
    """Whatever has a name is whole; the newest stay; the next call does the rest."""
    for step in range(1, 100):
        directory = save(tmp_path / str(step), NUMBERS, 12)
        code = processes.wait(processes.fork(keep_and_die_at, step, directory))
        for number in iterations(directory):
            assert (iteration_directory(directory, number) / "train_state.json").exists()
        assert {10, 12} <= set(iterations(directory))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        keep_only(directory, last=2)
        directories.clear_remains(directory)
        held = {path.name for path in directory.iterdir()}
        assert held == {"iter_0000010", "iter_0000012", LATEST}
    assert step > 12


def test_one_that_cannot_be_removed(tmp_path, monkeypatch):
    save(tmp_path, NUMBERS, 12)

    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match="iter_0000002: cannot write: Permission denied"):
        keep_only(tmp_path, last=1)
