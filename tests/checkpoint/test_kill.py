"""An export that dies or fails, at any moment, leaves no directory that looks complete."""

from __future__ import annotations

import errno
import functools
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from megatron_replay.checkpoint import export
from megatron_replay.checkpoint.staging import staging_directory, start_directory
from megatron_replay.errors import OutputError
from megatron_replay.locks import LOCK_FILE, DirectoryLock
from tests import processes, tiny
from tests.checkpoint.deaths import is_killed_at
from tests.checkpoint.grid import load_grid, save_grid
from tests.same_weights import require_equal, weights

SHARD = 20_000


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Two small models that differ, of several shards each when exported."""
    folder = tmp_path_factory.mktemp("models")
    return {
        name: tiny.save_qwen3(
            folder / name, tied=True, seed=seed, num_hidden_layers=1, hidden_size=16, vocab_size=128
        )
        for seed, name in enumerate(("old", "new"))
    }


def export_model(source: Path, final: Path, *, overwrite: bool = False) -> None:
    staged = start_directory(final, overwrite=overwrite)
    export.MAX_SHARD_BYTES = SHARD
    save_grid(load_grid(source, 1, 1), source, staged, final, overwrite=overwrite)


CHANGES_OF_FILES = (  # pwrite writes a lock
    "os.fsync", "os.replace", "os.unlink", "os.rmdir", "os.pwrite",
    "megatron_replay.checkpoint.export.save_file",
)  # fmt: skip


def is_killed(step: int, source: Path, final: Path, *, overwrite: bool = False) -> bool:
    work = functools.partial(export_model, source, final, overwrite=overwrite)
    return is_killed_at(step, CHANGES_OF_FILES, work)


def embedding(directory: Path) -> torch.Tensor:
    return weights(directory)["model.embed_tokens.weight"]


def held(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != LOCK_FILE)


def test_killed_at_each_step(models, tmp_path):
    deaths, complete = 0, 0
    for step in range(1, 1000):
        folder = tmp_path / str(step)
        folder.mkdir()
        if not is_killed(step, models["new"], folder / "model"):
            break
        deaths += 1
        if (folder / "model").exists():
            complete += 1
            require_equal(folder / "model", models["new"])
            shutil.rmtree(folder / "model")
        if step % 3 == 1:  # a rerun succeeds, and clears away what the dead one left
            export_model(models["new"], folder / "model")
            require_equal(folder / "model", models["new"])
            assert held(folder) == ["model"]
    assert deaths > 15
    assert 0 < complete < 6  # after the rename: the lock goes, the directory is synced


def test_killed_at_each_step_of_replacing(models, tmp_path):
    """Under the name is the old model, or the new one, or for an instant nothing; never a half."""
    found = {"old": 0, "new": 0, "nothing": 0}
    export_model(models["old"], tmp_path / "old")
    content = held(tmp_path / "old")
    for step in range(1, 1000):
        folder = tmp_path / str(step)
        shutil.copytree(tmp_path / "old", folder / "model")
        if not is_killed(step, models["new"], folder / "model", overwrite=True):
            break
        if (folder / "model").exists():
            assert held(folder / "model") == content
            is_old = torch.equal(*(embedding(path) for path in (folder / "model", models["old"])))
            name = "old" if is_old else "new"
            require_equal(folder / "model", models[name])
            found[name] += 1
        else:
            require_equal(folder / ".model.replaced" / "old", models["old"])
            found["nothing"] += 1
        if step % 3 == 1 or not (folder / "model").exists():
            export_model(models["new"], folder / "model", overwrite=True)
            require_equal(folder / "model", models["new"])
            assert held(folder) == ["model"]
    assert found["nothing"] == 1
    assert found["old"] > 15
    assert found["new"] > 5  # the removal of the old one, file by file


def test_killed_while_clearing_away(models, tmp_path):
    """What is left is still recognised as ours, whichever file was removed last."""
    for step in range(1, 10):
        final = tmp_path / str(step) / "model"
        staged = staging_directory(final)
        staged.mkdir(parents=True)
        DirectoryLock(staged, purpose="this model").release()
        for number in range(8):
            (staged / f"model-{number}.safetensors").touch()
        assert is_killed(step, models["new"], final)
        assert staged.exists()
        start_directory(final)


def export_until_killed(source: Path, final: Path, begun: Path) -> None:
    begun.touch()
    export_model(source, final, overwrite=True)
    signal.pause()


def test_killed_at_random_moments(models, tmp_path):
    draw, final = random.Random(0), tmp_path / "model"
    for life in range(10):
        begun = tmp_path / f"begun-{life}"
        child = processes.fork(export_until_killed, models["new"], final, begun)
        processes.until(begun.exists, child)
        time.sleep(draw.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert processes.wait(child) == -signal.SIGKILL
        if final.exists():
            require_equal(final, models["new"])
    export_model(models["new"], final, overwrite=True)
    require_equal(final, models["new"])


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        # What safetensors makes of it.
        SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
    ],
)
@pytest.mark.parametrize("failing", [1, 3])
def test_disk_full(models, tmp_path, monkeypatch, error, failing):
    """The generator of tensors is drained all the same: other ranks take part in it."""
    calls, save_file = [], export.save_file

    def fill(*arguments):
        calls.append(arguments)
        if len(calls) == failing:
            raise error
        save_file(*arguments)

    monkeypatch.setattr(export, "save_file", fill)
    produced = []
    tensors = ((str(i), (produced.append(i), torch.ones(10_000))[1]) for i in range(5))
    monkeypatch.setattr(export, "MAX_SHARD_BYTES", SHARD)
    with pytest.raises(
        OutputError, match=r"safetensors: no space left on the device\. Nothing was"
    ):
        export.write_weights(tmp_path, tensors, dtype=torch.float32)
    assert produced == [0, 1, 2, 3, 4]
    assert len(calls) == failing
    calls.clear()
    with pytest.raises(OutputError, match="no space left"):
        export_model(models["new"], tmp_path / "model")
    assert not (tmp_path / "model").exists()
    monkeypatch.setattr(export, "save_file", save_file)
    export_model(models["new"], tmp_path / "model")
    require_equal(tmp_path / "model", models["new"])


def test_a_real_write_that_fails(tmp_path):
    """The file's directory is gone: safetensors says so in an error of its own."""
    with pytest.raises(OutputError, match="cannot write: No such file or directory"):
        export.write_weights(
            tmp_path / "gone", [("a", torch.ones(3))], dtype=torch.float32
        )  # fmt: skip


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_failing_to_publish(models, tmp_path, monkeypatch, step):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OutputError, match="no space left"):
        export_model(models["new"], tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_what_start_directory_accepts(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for final in (tmp_path / "empty", tmp_path / "new", tmp_path / "a" / "b" / "c"):
        assert start_directory(final) == final.parent / f".{final.name}.incomplete"
        (staging_directory(final) / "leftover").touch()
        assert held(start_directory(final)) == []  # a killed export's remains go
        assert start_directory(final, overwrite=True).is_dir()
    assert start_directory(tmp_path / "link") == tmp_path / ".real.incomplete"
    monkeypatch.chdir(tmp_path / "empty")
    assert start_directory(Path(".")) == tmp_path / ".empty.incomplete"
    assert start_directory(Path("relative")) == tmp_path / "empty" / ".relative.incomplete"


def test_what_start_directory_refuses(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "home" / "precious").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"home: the directory is not empty\. .*--overwrite"):
        start_directory(tmp_path / "home")
    with pytest.raises(OutputError, match=r"home: .* did not write.*found precious"):
        start_directory(tmp_path / "home", overwrite=True)
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        for overwrite in (False, True):
            with pytest.raises(OutputError, match=r"file.*: cannot write: Not a directory"):
                start_directory(path, overwrite=overwrite)
    assert held(tmp_path) == ["file", "home"]


def test_overwrite_replaces_all_of_it(models, tmp_path):
    final = tmp_path / "model"
    export_model(models["old"], final)
    content = held(final)
    with pytest.raises(OutputError, match="not empty"):
        export_model(models["new"], final)
    export_model(models["new"], final, overwrite=True)
    require_equal(final, models["new"])
    assert held(final) == content
    assert held(tmp_path) == ["model"]


def add(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")


def touch_up(path: Path) -> None:
    """A change that leaves the size as it is."""
    path.write_bytes(path.read_bytes().replace(b"true", b"null"))


CHANGES = {
    "thesis.tex": lambda final: add(final / "thesis.tex"),
    "run/metrics.jsonl": lambda final: add(final / "run" / "metrics.jsonl"),
    "data/": lambda final: (final / "data").mkdir(),
    "config.json": lambda final: add(final / "config.json"),
    "generation_config.json": lambda final: touch_up(final / "generation_config.json"),
    "rows.jsonl": lambda final: (final / "rows.jsonl").symlink_to("/dev/null"),
    ".written": lambda final: (final / ".written").write_text("[]"),
    "and 3 more": lambda final: (final / ".written").unlink(),
}


@pytest.mark.parametrize("found", CHANGES)
def test_overwrite_replaces_nothing_that_anybody_added_or_changed(models, tmp_path, found):
    final = tmp_path / "model"
    export_model(models["old"], final)
    CHANGES[found](final)
    before = sorted(final.rglob("*"))
    with pytest.raises(OutputError, match=re.escape(found)):
        export_model(models["new"], final, overwrite=True)
    assert sorted(final.rglob("*")) == before


def test_a_directory_filled_meanwhile_is_not_replaced(models, tmp_path):
    final = tmp_path / "model"
    staged = start_directory(final)
    final.mkdir()
    (final / "precious").touch()
    with pytest.raises(OutputError, match="Directory not empty"):
        save_grid(load_grid(models["new"], 1, 1), models["new"], staged, final)
    assert held(final) == ["precious"]
