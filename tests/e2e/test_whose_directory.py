"""Which model and which program a directory's files belong to is checked by every program."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

from megatron_replay.checkpoint import export
from megatron_replay.locks import DirectoryLock
from tests.e2e import stages
from tests.e2e.stages import argv, inputs, refused_conversion

pytestmark = pytest.mark.distributed


def test_a_refused_run_leaves_nothing_of_its_model_behind(folder, other, tmp_path):
    """One --load is refused for its data, another succeeds: the export has the latter's config."""
    save = tmp_path / "run"
    message = stages.fail(
        "stage1", *argv(folder, save), "--load", other, "--data-path", folder / "other", code=5
    )
    assert "corpus_fingerprint" in message
    assert sorted(path.name for path in save.iterdir()) == [".lock"]
    stages.succeed("stage1", *argv(folder, save, "--train-iters", 1))
    stages.convert(save, tmp_path / "exported")
    exported, base = (
        json.loads((directory / "config.json").read_text())
        for directory in (tmp_path / "exported", folder / "model")
    )
    exported.pop("torch_dtype")
    rope = {key: exported.pop(key) for key in ("rope_theta", "rope_scaling")}  # of transformers 4
    assert rope == {"rope_theta": base["rope_parameters"]["rope_theta"], "rope_scaling": None}
    assert exported == base
    name = "generation_config.json"
    assert (tmp_path / "exported" / name).read_bytes() == (folder / "model" / name).read_bytes()


def test_files_of_another_model_in_a_checkpoint_are_refused_by_every_program(
    folder, other, run, tmp_path
):
    """The same weights under another rope_theta are another model, and no shape shows it."""
    save = shutil.copytree(run, tmp_path / "run")
    shutil.copyfile(other / "config.json", save / "hf" / "config.json")
    expected = f"{save / 'hf' / 'config.json'}: not the config.json that the checkpoint"
    load = ["--load", save]
    assert expected in refused_conversion(save, tmp_path / "out")
    assert expected in stages.fail("stage1", *argv(folder, save), code=4)
    new = argv(folder, tmp_path / "new", *load, "--allow-other-store")
    assert expected in stages.fail("stage1", *new, code=4)
    new = [*inputs(folder), *load, "--store", tmp_path / "store"]
    assert expected in stages.fail("stage0", *new, code=4)
    assert not (tmp_path / "out").exists()
    (save / "hf" / "extra.json").write_text("{}")
    shutil.copyfile(folder / "model" / "config.json", save / "hf" / "config.json")
    assert "not the extra.json" in refused_conversion(save, tmp_path / "out")


def spoil_what_is_written() -> None:
    """Change a weight while it is written, which no format shows by its name."""
    save = export.save_file
    export.save_file = lambda shard, *rest: save({k: v + 1 for k, v in shard.items()}, *rest)
    write = torch.save

    def spoilt(value, *arguments, **options):
        if isinstance(value, torch.Tensor):
            value = value + 1
        return write(value, *arguments, **options)

    torch.save = spoilt


def test_what_was_written_is_read_again_before_it_is_published(folder, tmp_path):
    mcore = ["--save-model-type", "mcore"]
    stages.convert(folder / "model", tmp_path / "good", *mcore)
    for load, save, flags in (
        (folder / "model", tmp_path / "mcore", mcore),
        (tmp_path / "good", tmp_path / "hf", []),
    ):
        refused_conversion(load, save, *flags, before=spoil_what_is_written)
        assert not save.exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "hf", "iter_0000003", "resolved_config.yaml"])
def test_files_of_another_program_are_not_replaced(folder, tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious").touch()
    assert f"found {name}" in stages.fail("stage1", *argv(folder, tmp_path), code=6)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    # A lock does not make the other files a run's: a run that was refused leaves one.
    for purpose in ("this run", "this store"):
        DirectoryLock(tmp_path, purpose=purpose).release()
        assert f"found {name}" in stages.fail("stage1", *argv(folder, tmp_path), code=6)
        assert (tmp_path / name / "precious").exists()


def test_one_run_a_directory(folder, run, tmp_path):
    """The second is refused on every rank, touches nothing, and goes on once the first is gone."""
    save = shutil.copytree(run, tmp_path / "run")
    before = stages.held(save)
    lock = DirectoryLock(save, purpose="this run")
    message = stages.fail("stage1", *argv(folder, save), dp=2, code=6)
    assert f"another run is writing this run (found process {os.getpid()} on" in message
    lock.release()
    assert stages.held(save) == before
    stages.succeed("stage1", *argv(folder, save), dp=2)
    (tmp_path / "store").mkdir()
    lock = DirectoryLock(tmp_path / "store", purpose="this store")
    command = [*inputs(folder), "--store", tmp_path / "store"]
    assert "another run is writing this store" in stages.fail("stage0", *command, tp=2, code=6)
    lock.release()
    assert [path.name for path in (tmp_path / "store").iterdir()] == [".lock"]


def test_a_copied_run_goes_on_without_its_lock_and_is_not_replaced(folder, other, run, tmp_path):
    save = tmp_path / "run"
    shutil.copytree(run, save, ignore=shutil.ignore_patterns(".lock"))
    for kind in ("mcore", "mg"):
        for overwrite in ([], ["--overwrite"]):
            line = refused_conversion(other, save, "--save-model-type", kind, *overwrite)
            assert ("did not write" if overwrite else "not empty") in line
    assert "did not write" in refused_conversion(save, save / "hf", "--overwrite")
    assert "resuming" in stages.succeed("stage1", *argv(folder, save))
