"""Whose files a directory holds is known, and checked at every door."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

from megatron_replay.checkpoint import training
from megatron_replay.locks import DirectoryLock
from tests import pool, tiny
from tests.e2e import stages
from tests.e2e.stages import argv, inputs

pytestmark = pytest.mark.distributed
TOKENS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Shapes and vocabulary of conftest.py's model, other weights and another rope_theta."""
    model = tmp_path_factory.mktemp("other") / "model"
    tiny.save_qwen3(model, tied=True, num_hidden_layers=2, seed=3, rope_theta=500.0)
    (model / "generation_config.json").write_text('{"temperature": 0.6}')
    return model


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A run that has taken two of its five steps."""
    save = tmp_path_factory.mktemp("run") / "run"
    stages.succeed("stage1", *argv(folder, save, "--exit-interval", 2))
    return save


def refused(*arguments: object) -> str:
    """The one line of a conversion that is refused."""
    [(code, said)] = pool.run(1, _refused, list(map(str, arguments)))
    assert code in (2, 4, 6)
    [line] = [line for line in said.splitlines() if line.startswith("error")]
    return line


def _refused(rank: int, world_size: int, argv: list[str]) -> tuple[int, str]:
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = stages._convert(rank, world_size, argv)
    return code, said.getvalue()


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
    exported, base = (json.loads((d / "config.json").read_text()) for d in
                      (tmp_path / "exported", folder / "model"))  # fmt: skip
    exported.pop("torch_dtype")
    assert exported == base
    for name in ("generation_config.json",):
        assert (tmp_path / "exported" / name).read_bytes() == (folder / "model" / name).read_bytes()


def test_another_model_never_goes_on_with_a_run(folder, other, run):
    extra = ["--load", other, "--allow-other-store"]
    message = stages.fail("stage1", *argv(folder, run, *extra), code=2)
    assert "a run from another --load: config.json, model.safetensors" in message


def test_files_of_another_model_beside_a_checkpoint_are_seen_at_every_door(
    folder, other, run, tmp_path
):
    """The same weights under another rope_theta are another model, and no shape shows it."""
    save = tmp_path / "run"
    shutil.copytree(run, save)
    shutil.copyfile(other / "config.json", save / "hf" / "config.json")
    expected = f"{save / 'hf' / 'config.json'}: not the config.json that the checkpoint"
    data = ["--data-path", folder / "corpus", "--seq-length", 64]
    assert expected in refused("--load", save, "--save", tmp_path / "out")
    assert expected in stages.fail("stage1", *argv(folder, save), code=4)
    assert expected in stages.fail(
        "stage1", *argv(folder, tmp_path / "new"), "--load", save, "--allow-other-store", code=4
    )
    assert expected in stages.fail(
        "stage0", "--load", save, *data, "--store", tmp_path / "store", code=4
    )
    assert not (tmp_path / "out").exists()
    (save / "hf" / "extra.json").write_text("{}")
    shutil.copyfile(folder / "model" / "config.json", save / "hf" / "config.json")
    assert "not the extra.json" in refused("--load", save, "--save", tmp_path / "out")


def test_two_conversions_never_share_a_directory(folder, other, run, tmp_path):
    mcore, to_mcore = tmp_path / "mcore", ["--save-model-type", "mcore"]
    stages.convert(folder / "model", mcore, *to_mcore)
    assert "not empty" in refused("--load", other, "--save", mcore, *to_mcore)
    stages.convert(other, mcore, *to_mcore, "--overwrite")
    assert sorted(path.name for path in (mcore / "hf").iterdir()) == [
        "config.json", "generation_config.json",
    ]  # fmt: skip
    stages.convert(mcore, tmp_path / "back")
    ours, theirs = (tiny.load_reference(d)(TOKENS).logits for d in (tmp_path / "back", other))
    assert torch.equal(ours, theirs)
    save = tmp_path / "finished"
    shutil.copytree(run, save)
    for flags in (to_mcore, ["--save-model-type", "mg"]):
        for overwrite in ([], ["--overwrite"]):
            line = refused("--load", other, "--save", save, *flags, *overwrite)
            assert ("did not write" if overwrite else "not empty") in line
    assert training.latest_iteration(save) == 2
    for output in (save / "hf", save.parent):  # the run's own files; what holds the run
        before = sorted(output.rglob("*"))
        assert "did not write" in refused("--load", save, "--save", output, "--overwrite")
        assert sorted(output.rglob("*")) == before
    assert "also read, as --load" in refused("--load", other, "--save", other, *to_mcore)


def test_what_was_written_is_read_again_before_it_is_published(folder, tmp_path):
    """A weight is spoilt while it is written: neither format shows that by its name."""
    mcore = ["--save-model-type", "mcore"]
    stages.convert(folder / "model", tmp_path / "good", *mcore)
    for load, save, flags in (
        (folder / "model", tmp_path / "mcore", mcore),
        (tmp_path / "good", tmp_path / "hf", []),
    ):
        assert pool.run(1, _spoilt, ["--load", str(load), "--save", str(save), *flags]) == [4]
        assert not save.exists()


def _spoilt(rank: int, world_size: int, argv: list[str]) -> int:
    from megatron_replay.checkpoint import export
    from megatron_replay.platform import checkpoint_writer

    class Spoilt(checkpoint_writer._Writer):
        def _write(self) -> None:
            for _, tensor in self._tensors:
                tensor.view(-1)[0] += 1
                break
            super()._write()

    save = export.save_file
    export.save_file = lambda shard, *rest: save({k: v + 1 for k, v in shard.items()}, *rest)
    if "mcore" in argv:
        checkpoint_writer._Writer = Spoilt  # of a copy: the model itself keeps its weights
        clone = torch.Tensor.detach
        torch.Tensor.detach = lambda self: clone(self).clone()
    return stages._convert(rank, world_size, argv)


def test_the_base_is_no_place_to_save(folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    before = sorted(path.name for path in model.iterdir())
    load = ["--load", model]
    assert "also read, as --load" in stages.fail("stage1", *argv(folder, model, *load), code=2)
    data = ["--data-path", folder / "corpus", "--seq-length", 64]
    assert "also read, as --load" in stages.fail("stage0", *load, *data, "--store", model, code=2)
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
def test_somebody_elses_files_are_not_replaced(folder, tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious").touch()
    assert f"found {name}" in stages.fail("stage1", *argv(folder, tmp_path), code=6)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    # A lock proves nothing of what lies beside it: a run that was refused leaves one.
    for purpose in ("this run", "this store"):
        DirectoryLock(tmp_path, purpose=purpose).release()
        assert f"found {name}" in stages.fail("stage1", *argv(folder, tmp_path), code=6)
        assert (tmp_path / name / "precious").exists()


HOLD = "import sys; from megatron_replay.locks import DirectoryLock; \
lock = DirectoryLock(sys.argv[1], purpose='this run'); print('held', flush=True); sys.stdin.read()"


def test_one_run_a_directory(folder, run, tmp_path):
    """The second is refused on every rank, touches nothing, and goes on once the first is gone."""
    save = tmp_path / "run"
    shutil.copytree(run, save)
    before = stages._held(save)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, save], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        message = stages.fail("stage1", *argv(folder, save), dp=2, code=6)
        assert f"another run is writing this run (found process {holder.pid} on" in message
        holder.kill()
    now = stages._held(save)
    assert {k: v for k, v in now.items() if k != ".lock"} == {
        k: v for k, v in before.items() if k != ".lock"
    }
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
    stages.convert(
        folder / "model",
        tmp_path / "rounded",
        "--save-model-type",
        "mcore",
        "--params-dtype",
        "bfloat16",
    )
    load = ["--load", tmp_path / "rounded", "--train-iters", 1]
    message = stages.fail("stage1", *argv(folder, tmp_path / "other", *load), code=5)
    assert "with another base model than --load" in message


def test_a_store_of_another_base_is_refused_by_file_and_allowed_by_a_flag(folder, other, tmp_path):
    flags = ["--load", other, "--train-iters", 1]
    message = stages.fail("stage1", *argv(folder, tmp_path / "run", *flags), code=5)
    assert "with another base model than --load, by config.json, model.safetensors" in message
    assert "--allow-other-store" in message
    stages.succeed("stage1", *argv(folder, tmp_path / "run", *flags, "--allow-other-store"))
    stages.succeed("stage1", *argv(folder, tmp_path / "full", *inputs(folder), "--loss", "full",
                                   "--train-iters", 1))  # fmt: skip
