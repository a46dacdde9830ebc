"""Damaged checkpoints and ruined runs: one line that names the file, and no success."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import itertools
import json
import math
import shutil
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_replay.checkpoint import training
from tests import pool
from tests.e2e import stages
from tests.e2e.stages import argv

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    save = tmp_path_factory.mktemp("run") / "run"
    stages.succeed("stage1", *argv(folder, save, "--exit-interval", 2))
    return save


def flips(path, count: int):
    """The file with one bit flipped, at ``count`` places spread over it."""
    content = path.read_bytes()
    for place in range(count):
        at = (2 * place + 1) * len(content) // (2 * count)
        yield content[:at] + bytes([content[at] ^ (1 << place % 8)]) + content[at + 1 :]


def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_refused(folder, run, tmp_path):
    """torch alone would load 13 of 13."""
    save = tmp_path / "run"
    shutil.copytree(run, save)
    iteration = training.iteration_directory(save, 2)
    names = sorted(path.name for path in iteration.iterdir())
    assert "checksums.json" in names
    assert len([name for name in names if name.endswith(".distcp")]) == 2
    for name in names:
        path = iteration / name
        whole = path.read_bytes()
        for content in flips(path, 2):
            path.write_bytes(content)
            message = stages.fail("stage1", *argv(folder, save), code=4)
            assert str(iteration) in message
            assert name in message or name == "checksums.json"
            assert "emove" not in message  # no advice costs a checkpoint
        path.write_bytes(whole)
    (iteration / names[0]).rename(iteration / "gone")
    assert "No such file" in stages.fail("stage1", *argv(folder, save), tp=2, code=4)
    (iteration / "gone").rename(iteration / names[0])
    stages.succeed("stage1", *argv(folder, save), tp=2)


DAMAGE = [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"[" * 100_000, b'"text"', b"\0" * 99]
MORE = {
    "resolved_config.yaml": [b"a: &x [*x]", b"data: 3", b"a: b: c"],
    "latest_checkpointed_iteration.txt": [b"-1", b"9", b"9" * 5000, "²".encode(), b"release"],
    "train_state.json": [b'{"iteration": 2}'],
    "skipped_batches.jsonl": [],
}


@pytest.mark.parametrize("name", MORE)
def test_a_damaged_file_of_a_run_is_one_line(folder, run, tmp_path, name):
    save = tmp_path / "run"
    shutil.copytree(run, save)
    is_lines = name.endswith(".jsonl")
    path = save / name if is_lines else next(save.rglob(name))
    for content in [*DAMAGE, *MORE[name]]:
        if is_lines and not content:
            continue  # no step was skipped
        path.write_bytes(content + b"\n" * is_lines)
        code = 6 if is_lines else 4
        line = stages.fail("stage1", *argv(folder, save, "--lr", 2e-3), code=code)
        assert name in line or "iter_" in line
        assert len(line) < 700


@pytest.mark.parametrize(
    "change",
    [
        {"iteration": "2"}, {"skipped_steps": -1}, {"identity": []}, {"model_files": {"a": 1}},
        {"new": 1}, {"iteration": True}, {"consumed_tokens": None},
    ],
)  # fmt: skip
def test_a_state_of_other_types_is_one_line(run, change):
    """As another version may have written it, checksum and all."""
    state = json.loads((run / "iter_0000002" / "train_state.json").read_text())
    with pytest.raises((TypeError, ValueError)):
        training.TrainState(**state | change)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_or_a_device_in_place_of_a_file_of_the_base(folder, tmp_path, name):
    import os

    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    (model / name).unlink(missing_ok=True)
    data = ["--load", model, "--data-path", folder / "corpus", "--seq-length", 64]
    for make in (os.mkfifo, lambda at: at.symlink_to("/dev/zero")):
        make(model / name)
        for stage, flags in (
            ("stage0", [*data, "--store", tmp_path / "store"]),
            ("stage1", argv(folder, tmp_path / "run", "--load", model, "--allow-other-store")),
        ):
            [(code, _, said)] = stages.run(stage, *flags)
            assert code in (3, 4), said
            assert f"{name}: cannot read (expected a regular file" in said
        (model / name).unlink()


def _stall(rank: int, world_size: int, argv: list[str], over: Path) -> tuple[int, str] | None:
    """Rank 1 stops in its first step; the others wait for it for a second from then on."""
    from megatron_replay import parallel
    from megatron_replay.training import train

    take_step, parallel.ANSWER_SECONDS = train.train_step, 0.1

    def step(model, optimizer, work, groups, **kwargs):
        if rank == 1:
            while not over.exists():
                time.sleep(0.01)
            raise SystemExit
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=1), groups.tp_group)
        return take_step(model, optimizer, work, groups, **kwargs)

    train.train_step = step
    said = None
    with contextlib.suppress(SystemExit):
        code, _, err = stages._main(rank, world_size, "stage1", argv, None)
        said = code, err
    over.touch()
    dist.destroy_process_group()  # with a rank that has gone: nothing can be agreed on
    return said


def test_a_rank_that_stops_is_named_by_the_one_that_waits(folder, tmp_path):
    flags = [*argv(folder, tmp_path / "run"), "--tensor-model-parallel-size", 2]
    (code, said), other = pool.run(2, _stall, list(map(str, flags)), tmp_path / "over")
    assert other is None
    assert code == 7
    [line] = [line for line in said.splitlines() if line.startswith("error")]
    assert "rank 1 does not answer; the others waited for it as long as" in line
    assert "--distributed-timeout-minutes" in line
    assert "Traceback" not in said


def _unreadable_base(module: str, rank: int) -> None:
    """Rank 0 cannot read the base's weights; the others do not even try."""
    from megatron_replay.errors import CheckpointError

    def fail(load):
        assert rank == 0
        raise CheckpointError("cannot read: Input/output error", where=load)

    importlib.import_module(module).base_fingerprint = fail


def test_a_base_that_only_rank_0_cannot_read_ends_all_ranks(folder, tmp_path):
    data = ["--data-path", folder / "corpus", "--seq-length", 64, "--load", folder / "model"]
    for stage, module, flags in (
        ("stage0", "megatron_replay.collection.run", [*data, "--store", tmp_path / "store"]),
        ("stage1", "megatron_replay.training.build", argv(folder, tmp_path / "run")),
    ):
        before = functools.partial(_unreadable_base, module)
        message = stages.fail(stage, *flags, dp=2, before=before, code=4)
        assert "cannot read: Input/output error" in message


def test_a_pipe_or_a_device_in_place_of_a_file_is_not_waited_for(folder, run, tmp_path):
    import os

    save = tmp_path / "run"
    shutil.copytree(run, save)
    for path in (
        training.iteration_directory(save, 2) / "train_state.json",
        next(training.iteration_directory(save, 2).glob("*.distcp")),
        save / "hf" / "config.json",
        save / "metrics.jsonl",
    ):
        content = path.read_bytes()
        path.unlink()
        for make in (os.mkfifo, lambda at: at.symlink_to("/dev/zero")):
            make(path)
            [(code, _, said)] = stages.run("stage1", *argv(folder, save))
            assert code in (4, 6), said
            assert "expected a regular file" in said
            path.unlink()
        path.write_bytes(content)
    stages.succeed("stage1", *argv(folder, save))


def test_other_precision_than_the_run_had_is_refused_in_a_word(folder, run):
    message = stages.fail("stage1", *argv(folder, run, "--bf16"), code=2)
    assert "this directory has a run with another --bf16 (expected False; found True)" in message
    assert len(message) < 400
    message = stages.fail("stage1", *argv(folder, run, "--loss", "full"), code=2)
    assert "a run with another --loss (expected restricted; found full)" in message


def test_weights_that_are_not_finite_are_refused_at_load(folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    extra = ["--load", model, "--allow-other-store"]
    message = stages.fail("stage1", *argv(folder, tmp_path / "run", *extra), tp=2, code=4)
    assert "the weights are not finite: decoder.layers.1.mlp.linear_fc1.weight" in message
    data = ["--data-path", folder / "corpus", "--seq-length", 64]
    store = ["--store", tmp_path / "store"]
    assert "not finite" in stages.fail("stage0", "--load", model, *data, *store, code=4)


def _ruin(rank: int) -> None:
    """Rank 1's weights are NaN after its second step, which no loss shows yet."""
    from megatron_replay.training import train

    take_step = train.train_step

    def step(model, *args, **kwargs):
        result = take_step(model, *args, **kwargs)
        step.calls += 1
        if step.calls == 2 and rank == 1:
            with torch.no_grad():
                next(model.parameters())[0, 0] = math.nan
        return result

    step.calls = 0
    train.train_step = step


def test_a_run_with_ruined_weights_publishes_nothing_and_fails(folder, tmp_path):
    save = tmp_path / "run"
    flags = argv(folder, save, "--save-interval", 1, "--probe-interval", 0)
    message = stages.fail("stage1", *flags, tp=2, before=_ruin, code=7)
    assert "the weights are not finite: embedding.word_embeddings.weight" in message
    assert training.latest_iteration(save) == 1
    stages.succeed("stage1", *flags, tp=2)


def _poison(first: int, rank: int) -> None:
    """Step ``first`` and those after it have no finite loss."""
    from megatron_replay.training import train

    take_step, steps = train.train_step, itertools.count(1)

    def step(model, optimizer, work, *args, **kwargs):
        head = work[0].head
        if next(steps) >= first:
            work = [work[0]._replace(head=lambda h, w: head(h, w) * math.nan), *work[1:]]
        return take_step(model, optimizer, work, *args, **kwargs)

    train.train_step = step


@pytest.mark.parametrize(("first", "skipped", "saved"), [(1, 5, None), (3, 3, 4), (4, 2, 5)])
def test_a_run_of_which_most_steps_were_skipped_is_no_success(
    folder, tmp_path, first, skipped, saved
):
    flags = [*argv(folder, tmp_path / "run"), "--save-interval", 2]
    before = functools.partial(_poison, first)
    if skipped == 2:
        stages.succeed("stage1", *flags, before=before)
    else:
        message = stages.fail("stage1", *flags, before=before, code=7)
        assert f"{skipped} of 5 steps were skipped for a loss or gradient" in message
    assert training.latest_iteration(tmp_path / "run") == saved


def test_a_model_of_other_sizes_than_config_json_says_is_refused_before_memory_is_taken(
    folder, tmp_path
):
    for key in ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"):
        model = tmp_path / key
        shutil.copytree(folder / "model", model)
        config = json.loads((model / "config.json").read_text())
        config[key] = 10**9 if key != "num_attention_heads" else 4 * 10**8
        (model / "config.json").write_text(json.dumps(config))
        extra = ["--load", model, "--allow-other-store"]
        message = stages.fail("stage1", *argv(folder, tmp_path / "run", *extra), code=4)
        assert str(model) in message
