"""Which iterations stay: --keep-last and --keep-best, killed or not."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from megatron_replay.checkpoint import retention
from megatron_replay.checkpoint.directories import LATEST, iteration_directory
from megatron_replay.checkpoint.retention import iterations, keep_only
from megatron_replay.errors import OutputError
from tests import processes


def save(directory: Path, losses: dict[int, float | None], newest: int) -> Path:
    """A directory of checkpoints with these losses; None: not measured."""
    for number, loss in losses.items():
        path = iteration_directory(directory, number)
        path.mkdir(parents=True)
        scores = {} if loss is None else {"loss": loss}
        (path / "train_state.json").write_text(json.dumps({"scores": scores}))
    (directory / LATEST).write_text(f"{newest}\n")
    return directory


def best(directory: Path) -> dict:
    return json.loads((directory / retention.BEST).read_text())


LOSSES = {2: 3.0, 4: 1.0, 6: None, 8: 1.0, 10: 2.0, 12: 2.0}


@pytest.mark.parametrize(
    ("last", "by", "kept"),
    [
        (0, None, [2, 4, 6, 8, 10, 12]),
        (0, "loss", [2, 4, 6, 8, 10, 12]),
        (1, None, [12]),
        (3, None, [8, 10, 12]),
        (9, None, [2, 4, 6, 8, 10, 12]),
        (2, "loss", [4, 10, 12]),
        (2, "probe", [10, 12]),  # never measured: none is the best
    ],
)
def test_what_is_kept(tmp_path, last, by, kept):
    save(tmp_path, LOSSES, 12)
    keep_only(tmp_path, last=last, best_by=by)
    assert iterations(tmp_path) == kept
    assert (tmp_path / retention.BEST).exists() == (by == "loss")
    if by == "loss":  # of two equal ones the first
        assert best(tmp_path) == {"iteration": 4, "metric": "loss", "value": 1.0}


def test_a_new_best_lets_the_old_one_go(tmp_path):
    save(tmp_path, LOSSES, 12)
    keep_only(tmp_path, last=1, best_by="loss")
    save(tmp_path, {14: 0.5}, 14)
    keep_only(tmp_path, last=1, best_by="loss")
    assert iterations(tmp_path) == [14]
    save(tmp_path, {16: 0.75}, 16)
    keep_only(tmp_path, last=1, best_by="loss")
    assert iterations(tmp_path) == [14, 16]
    assert best(tmp_path)["iteration"] == 14


def test_what_the_marker_does_not_name_is_not_touched(tmp_path):
    """A run set back to 4: what is newer is neither counted nor the best nor removed."""
    save(tmp_path, LOSSES, 4)
    shutil.rmtree(iteration_directory(tmp_path, 8))
    save(tmp_path, {8: 0.1}, 4)
    (tmp_path / "iter_x").mkdir()
    keep_only(tmp_path, last=1, best_by="loss")
    assert iterations(tmp_path) == [4, 6, 8, 10, 12]
    assert best(tmp_path)["iteration"] == 4


def test_nothing_saved_yet(tmp_path):
    keep_only(tmp_path, last=1, best_by="loss")
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
    keep_only(directory, last=2, best_by="loss")


def test_killed_at_each_step(tmp_path):
    """Whatever has a name is whole; the newest and the best stay; the next call does the rest."""
    for step in range(1, 100):
        directory = save(tmp_path / str(step), LOSSES, 12)
        code = processes.wait(processes.fork(keep_and_die_at, step, directory))
        for number in iterations(directory):
            assert (iteration_directory(directory, number) / "train_state.json").exists()
        assert {4, 10, 12} <= set(iterations(directory))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        keep_only(directory, last=2, best_by="loss")
        retention.clear_remains(directory)
        assert iterations(directory) == [4, 10, 12]
        assert best(directory)["iteration"] == 4
        held = {path.name for path in directory.iterdir()}
        assert held == {"iter_0000004", "iter_0000010", "iter_0000012", LATEST, retention.BEST}
    assert step > 12


def test_one_that_cannot_be_removed(tmp_path, monkeypatch):
    save(tmp_path, LOSSES, 12)

    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match="iter_0000002: cannot write: Permission denied"):
        keep_only(tmp_path, last=1, best_by=None)
