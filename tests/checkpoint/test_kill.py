"""Work that dies or fails, at any change of a file, leaves nothing that only looks complete."""

from __future__ import annotations

import errno
import importlib
import io
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import SafetensorError

from megatron_replay.checkpoint import convert_ranks, directories, export
from megatron_replay.checkpoint.convert_ranks import grid_for, hf_to_ranks, ranks_to_hf
from megatron_replay.checkpoint.directories import LATEST, iteration_directory, iterations
from megatron_replay.checkpoint.staging import staging_directory, start_directory
from megatron_replay.errors import OutputError
from megatron_replay.locks import LOCK_FILE, DirectoryLock
from megatron_replay.model.config import ModelConfig
from tests import processes, tiny
from tests.checkpoint.grid import load_grid, save_grid
from tests.same_weights import require_equal, weights

SHARD = 20_000
CHANGES_OF_FILES = (  # pwrite writes a lock
    "os.fsync", "os.replace", "os.unlink", "os.rmdir", "os.pwrite",
    "megatron_replay.checkpoint.export.save_file",
)  # fmt: skip
Models = dict[str, Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    """Two small models that differ, of several shards each when exported."""
    folder = tmp_path_factory.mktemp("models")
    return {
        name: tiny.save_qwen3(
            folder / name, tied=True, seed=seed, num_hidden_layers=1, hidden_size=16, vocab_size=128
        )
        for seed, name in enumerate(("old", "new"))
    }


def export_model(source: Path, final: Path, *, overwrite: bool = False) -> None:
    export.MAX_SHARD_BYTES = SHARD
    staged = start_directory(final, overwrite=overwrite)
    save_grid(load_grid(source, 1, 1), source, staged, final, overwrite=overwrite)


def held(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != LOCK_FILE)


def is_killed_at(step: int, work: Callable[..., object], *arguments: object) -> bool:
    """Run ``work`` in a fork; whether it was killed at its ``step``-th change of a file."""
    code = processes.wait(processes.fork(dying, step, work, *arguments))
    assert code in (0, -signal.SIGKILL)
    return code != 0


def dying(step: int, work: Callable[..., object], *arguments: object) -> None:
    taken = 0

    def mortal(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal taken
            taken += 1
            if taken == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return counted

    for call in CHANGES_OF_FILES:
        module, _, name = call.rpartition(".")
        owner = importlib.import_module(module)
        setattr(owner, name, mortal(getattr(owner, name)))
    work(*arguments)


class Work(NamedTuple):
    """Work on a folder, and what a death may leave there: at least and at most so many times."""

    prepare: Callable[[Models, Path], object]
    do: Callable[[Models, Path], object]
    found: Callable[[Models, Path], str]
    counts: dict[str, tuple[int, int]]
    most_steps: int = 1000


def empty(models: Models, folder: Path) -> None:
    folder.mkdir()


def with_old_model(models: Models, folder: Path) -> None:
    export_model(models["old"], folder / "model")


def with_remains(models: Models, folder: Path) -> None:
    """What a killed export left."""
    staged = staging_directory(folder / "model")
    staged.mkdir(parents=True)
    DirectoryLock(staged, purpose="this model").release()
    for number in range(8):
        (staged / f"model-{number}.safetensors").touch()


def with_checkpoints(models: Models, folder: Path) -> None:
    for number in range(2, 13, 2):
        path = iteration_directory(folder, number)
        path.mkdir(parents=True)
        (path / "train_state.json").write_text("{}")
    (folder / LATEST).write_text("12\n")


def replace_model(models: Models, folder: Path) -> None:
    export_model(models["new"], folder / "model", overwrite=True)


def to_ranks(models: Models, folder: Path) -> None:
    grid = grid_for(ModelConfig.from_hf(models["new"]), tp=2, pp=1)
    hf_to_ranks(models["new"], folder / "model", grid, overwrite=True)


def keep_two(models: Models, folder: Path) -> None:
    directories.keep_only(folder, last=2)
    directories.clear_remains(folder)


def exported(models: Models, folder: Path) -> str:
    """Under the name is the old model, the new one, or for an instant nothing; never a half."""
    old = folder / ".model.replaced" / "old"
    if not (folder / "model").exists():
        if old.exists():
            require_equal(old, models["old"])
        return "nothing"
    name = "model.embed_tokens.weight"
    is_old = torch.equal(weights(folder / "model")[name], weights(models["old"])[name])
    require_equal(folder / "model", models["old" if is_old else "new"])
    return "old" if is_old else "new"


def ranks(models: Models, folder: Path) -> str:
    if not (folder / "model").exists():
        return "nothing"
    ranks_to_hf(folder / "model", folder / "hf")
    require_equal(folder / "hf", models["new"])
    shutil.rmtree(folder / "hf")
    return "new"


def kept(models: Models, folder: Path) -> str:
    """Whatever has a name is whole; the newest stay."""
    for number in iterations(folder):
        assert (iteration_directory(folder, number) / "train_state.json").exists()
    assert {10, 12} <= set(iterations(folder))
    return "kept"


WORKS = {  # "new": after the rename, the lock goes and the directory is synced
    "export": Work(empty, replace_model, exported, {"nothing": (15, 99), "new": (1, 6)}),
    "export over an old model": Work(
        with_old_model, replace_model, exported,
        {"old": (15, 99), "nothing": (1, 1), "new": (6, 99)},  # the old one goes file by file
    ),
    "export over remains": Work(with_remains, replace_model, exported, {"nothing": (9, 9)}, 9),
    "files of ranks": Work(empty, to_ranks, ranks, {"nothing": (9, 99), "new": (1, 6)}),
    "retention": Work(with_checkpoints, keep_two, kept, {"kept": (12, 99)}),
}  # fmt: skip


@pytest.mark.parametrize("name", WORKS)
def test_killed_at_each_step(models, tmp_path, name):
    """Whatever has its name is whole, and a rerun succeeds and clears away what is left."""
    work, counts = WORKS[name], Counter()
    work.prepare(models, tmp_path / "whole")
    work.do(models, tmp_path / "whole")
    for step in range(1, work.most_steps + 1):
        folder = tmp_path / str(step)
        work.prepare(models, folder)
        if not is_killed_at(step, work.do, models, folder):
            break
        found = work.found(models, folder)
        counts[found] += 1
        if step % 3 == 1 or counts[found] == 1:
            work.do(models, folder)
            assert work.found(models, folder) in ("new", "kept")
            assert held(folder) == held(tmp_path / "whole")
    assert counts.keys() == work.counts.keys()
    for found, (least, most) in work.counts.items():
        assert least <= counts[found] <= most, found


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
#: What safetensors makes of it.
SAFETENSORS = SafetensorError("Error while serializing: I/O error: No space left (os error 28)")


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


def full_disk(path: Path, mode: str) -> Any:
    return open("/dev/full", mode)


class BrieflyFull(io.BytesIO):
    """A disk without space for one write: torch's zip writer fails later, with its own error."""

    is_full = True

    def write(self, data: Any, /) -> int:
        if self.is_full and len(data) > 1000:
            self.is_full = False
            raise NO_SPACE
        return super().write(data)


@pytest.mark.parametrize(
    ("work", "owner", "name", "failing"),
    [
        (replace_model, export, "save_file", raising(NO_SPACE)),
        (replace_model, export, "save_file", raising(SAFETENSORS)),
        (replace_model, os, "replace", raising(NO_SPACE)),
        (replace_model, os, "fsync", raising(NO_SPACE)),
        (to_ranks, convert_ranks, "open", full_disk),
        (to_ranks, convert_ranks, "open", lambda *_: BrieflyFull()),
    ],
)
def test_a_full_disk(models, tmp_path, monkeypatch, work, owner, name, failing):
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing, raising=False)
        with pytest.raises(OutputError, match=r"no space left on the device\. Nothing was"):
            work(models, tmp_path)
    assert not (tmp_path / "model").exists()
    work(models, tmp_path)
    assert {replace_model: exported, to_ranks: ranks}[work](models, tmp_path) == "new"


def test_after_a_failure_all_tensors_are_produced(tmp_path, monkeypatch):
    """Other ranks take part in producing them. Here the third shard's directory is gone."""
    monkeypatch.setattr(export, "MAX_SHARD_BYTES", SHARD)
    folder, produced = tmp_path / "model", []
    folder.mkdir()

    def tensors():
        for number in range(5):
            produced.append(number)
            if number == 3:
                shutil.rmtree(folder)
            yield str(number), torch.ones(10_000)

    with pytest.raises(OutputError, match="cannot write: No such file or directory"):
        export.write_weights(folder, tensors(), dtype=torch.float32)
    assert produced == [0, 1, 2, 3, 4]


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


def add_below(final: Path) -> None:
    (final / "run").mkdir()
    (final / "run" / "metrics.jsonl").write_text("mine")


def keep_size(final: Path) -> None:
    path = final / "generation_config.json"
    path.write_bytes(path.read_bytes().replace(b"true", b"null"))


#: Changes of a published directory, by what the refusal to replace it names.
CHANGES: dict[str, Callable[[Path], object]] = {
    "thesis.tex": lambda final: (final / "thesis.tex").write_text("mine"),
    "run/metrics.jsonl": add_below,
    "data/": lambda final: (final / "data").mkdir(),
    "config.json": lambda final: (final / "config.json").write_text("mine"),
    "generation_config.json": keep_size,
    "rows.jsonl": lambda final: (final / "rows.jsonl").symlink_to("/dev/null"),
    ".written": lambda final: (final / ".written").write_text("[]"),
    "and 3 more": lambda final: (final / ".written").unlink(),
}


@pytest.mark.parametrize("found", CHANGES)
def test_overwrite_replaces_nothing_that_anybody_added_or_changed(models, tmp_path, found):
    final = tmp_path / "model"
    export_model(models["old"], final)
    with pytest.raises(OutputError, match="not empty"):
        export_model(models["new"], final)
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
