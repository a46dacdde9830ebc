"""Which model and which program a directory's files belong to is checked by every program."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from megatron_replay.checkpoint import directories, export
from megatron_replay.locks import DirectoryLock
from tests import tiny
from tests.e2e import stages
from tests.e2e.stages import argv, inputs, refused_conversion
from tests.test_locks import hold

pytestmark = pytest.mark.distributed
TOKENS = torch.arange(12)[None]


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


def test_two_conversions_never_share_a_directory(folder, other, run, tmp_path):
    mcore, to_mcore = tmp_path / "mcore", ["--save-model-type", "mcore"]
    stages.convert(folder / "model", mcore, *to_mcore)
    assert "not empty" in refused_conversion(other, mcore, *to_mcore)
    stages.convert(other, mcore, *to_mcore, "--overwrite")
    assert sorted(path.name for path in (mcore / "hf").iterdir()) == [
        "config.json", "generation_config.json",
    ]  # fmt: skip
    stages.convert(mcore, tmp_path / "back")
    ours, theirs = (tiny.load_reference(d)(TOKENS).logits for d in (tmp_path / "back", other))
    assert torch.equal(ours, theirs)
    save = shutil.copytree(run, tmp_path / "finished")
    for flags in (to_mcore, ["--save-model-type", "mg"]):
        for overwrite in ([], ["--overwrite"]):
            line = refused_conversion(other, save, *flags, *overwrite)
            assert ("did not write" if overwrite else "not empty") in line
    assert directories.latest_iteration(save) == 2
    for output in (save / "hf", save.parent):  # the run's own files; what holds the run
        before = sorted(output.rglob("*"))
        assert "did not write" in refused_conversion(save, output, "--overwrite")
        assert sorted(output.rglob("*")) == before
    assert "also read, as --load" in refused_conversion(other, other, *to_mcore)


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


def test_the_base_is_no_place_to_save(folder, tmp_path):
    model = shutil.copytree(folder / "model", tmp_path / "model")
    before = sorted(path.name for path in model.iterdir())
    load = ["--load", model]
    assert "also read, as --load" in stages.fail("stage1", *argv(folder, model, *load), code=2)
    command = [*inputs(folder), *load, "--store", model]
    assert "also read, as --load" in stages.fail("stage0", *command, code=2)
    store = tmp_path / "store"
    shutil.copytree(folder / "store", store)
    message = stages.fail("stage1", *argv(folder, store, "--store", store), code=2)
    assert "also read, as --store" in message
    full = stages.fail("stage1", *argv(folder, store, *inputs(folder), "--loss", "full"), code=6)
    assert "found store.json" in full
    other = stages.fail("stage1", *argv(folder, model), code=6)
    assert "files that no run of Stage 1 wrote" in other
    assert sorted(path.name for path in model.iterdir()) == before


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
    with hold(save) as holder:
        message = stages.fail("stage1", *argv(folder, save), dp=2, code=6)
        assert f"another run is writing this run (found process {holder.pid} on" in message
        holder.kill()
    assert stages.held(save) == before
    stages.succeed("stage1", *argv(folder, save), dp=2)
    DirectoryLock(save, purpose="this run").release()


@pytest.mark.parametrize("lock", [None, b"", b"[" * 100_000])
def test_a_copied_run_goes_on_without_its_lock(folder, run, tmp_path, lock):
    save = tmp_path / "run"
    shutil.copytree(run, save, ignore=shutil.ignore_patterns(".lock"))
    if lock is not None:
        (save / ".lock").write_bytes(lock)
    if lock:
        message = stages.fail("stage1", *argv(folder, save), code=6)
        assert "run/.lock: this name is needed for a lock" in message
        assert "Move that file" in message
    else:
        assert "resuming" in stages.succeed("stage1", *argv(folder, save))


def test_a_run_never_starts_in_a_conversion(folder, tmp_path):
    stages.convert(folder / "model", tmp_path / "mcore", "--save-model-type", "mcore")
    message = stages.fail("stage1", *argv(folder, tmp_path / "mcore"), code=6)
    assert "a converted checkpoint belongs to --load" in message
    load = ["--load", tmp_path / "mcore", "--train-iters", 1]  # the store's base, bit for bit
    stages.succeed("stage1", *argv(folder, tmp_path / "run", *load))
    rounded = ["--save-model-type", "mcore", "--params-dtype", "bfloat16"]
    stages.convert(folder / "model", tmp_path / "rounded", *rounded)
    load = ["--load", tmp_path / "rounded", "--train-iters", 1]
    message = stages.fail("stage1", *argv(folder, tmp_path / "other", *load), code=5)
    assert "with another base model than --load" in message


def test_a_store_of_another_base_is_refused_by_file_and_allowed_by_a_flag(folder, other, tmp_path):
    flags = ["--load", other, "--train-iters", 1]
    message = stages.fail("stage1", *argv(folder, tmp_path / "run", *flags), code=5)
    assert "with another base model than --load, by config.json, model.safetensors" in message
    assert "--allow-other-store" in message
    stages.succeed("stage1", *argv(folder, tmp_path / "run", *flags, "--allow-other-store"))
    full = [*inputs(folder), "--loss", "full", "--train-iters", 1]
    stages.succeed("stage1", *argv(folder, tmp_path / "full", *full))
