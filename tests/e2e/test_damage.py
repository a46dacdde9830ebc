"""Damaged files and weights that are not finite: one line that names what, and no success."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_replay import parallel
from megatron_replay.checkpoint import directories, training
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.loader import GlobalBatches
from megatron_replay.errors import CheckpointError
from tests import pool
from tests.e2e import stages
from tests.e2e.stages import argv, inputs

pytestmark = pytest.mark.distributed


@pytest.fixture
def save(run, tmp_path):
    """A copy of the run that has taken two steps, to be damaged."""
    return shutil.copytree(run, tmp_path / "run")


def flipped(content: bytes, place: float, bit: int) -> bytes:
    """``content`` with one bit flipped at ``place`` of its length."""
    at = int(place * len(content))
    return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]


def test_damage_in_any_file_of_a_checkpoint_is_refused(folder, save):
    """torch alone would load every one with a flipped bit."""
    iteration = directories.iteration_directory(save, 2)
    names = sorted(path.name for path in iteration.iterdir())
    shards = [name for name in names if name.endswith(".distcp")]
    assert "checksums.json" in names
    assert len(shards) == 2
    for name in names:
        path, whole = iteration / name, (iteration / name).read_bytes()
        damaged = [flipped(whole, 0.25, 0), flipped(whole, 0.75, 1)]
        for content in [*damaged, *[whole[:1000]] * (name == shards[0])]:
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
def test_a_damaged_file_of_a_run_is_one_line(folder, save, name):
    is_lines = name.endswith(".jsonl")
    path = save / name if is_lines else next(save.rglob(name))
    for content in [*DAMAGE[is_lines:], *MORE[name]]:  # without a line, no step was skipped
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
def test_a_state_of_other_types_is_refused(run, change):
    """As another version may have written it, checksum and all."""
    state = json.loads((run / "iter_0000002" / "train_state.json").read_text())
    with pytest.raises((TypeError, ValueError)):
        training.TrainState(**state | change)


#: A pipe would block, and a device has no end.
SPECIAL_FILES = (os.mkfifo, lambda at: at.symlink_to("/dev/zero"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_or_a_device_in_place_of_a_file_of_the_base(folder, tmp_path, name):
    model = shutil.copytree(folder / "model", tmp_path / "model")
    (model / name).unlink(missing_ok=True)
    for make in SPECIAL_FILES:
        make(model / name)
        for stage, flags in (
            ("stage0", [*inputs(folder), "--load", model, "--store", tmp_path / "store"]),
            ("stage1", argv(folder, tmp_path / "run", "--load", model, "--allow-other-store")),
        ):
            [(code, _, err)] = stages.run(stage, *flags)
            assert code in (3, 4), err
            assert f"{name}: cannot read (expected a regular file" in err
        (model / name).unlink()


def test_a_pipe_or_a_device_in_place_of_a_file_of_the_run(folder, save):
    iteration = directories.iteration_directory(save, 2)
    shard = next(iteration.glob("*.distcp")).relative_to(save)
    for name in (f"{iteration.name}/train_state.json", shard, "hf/config.json", "metrics.jsonl"):
        path, content = save / name, (save / name).read_bytes()
        for make in SPECIAL_FILES:
            path.unlink()
            make(path)
            [(code, _, err)] = stages.run("stage1", *argv(folder, save))
            assert code in (4, 6), err
            assert "expected a regular file" in err
        path.unlink()
        path.write_bytes(content)
    stages.succeed("stage1", *argv(folder, save))


def test_a_damaged_record_of_the_store_ends_the_run_at_its_step(folder, tmp_path):
    """Batches are made ahead of the step: the error comes up at its own, the third."""
    lengths = Corpus(folder / "corpus").lengths
    batches = GlobalBatches(
        lengths, seq_length=64, global_batch_size=len(lengths), micro_batch_size=1, seed=1234,
        epochs=1, pack_documents=False, dp_rank=0, dp_size=1,
    )  # fmt: skip
    store, document = tmp_path / "store", int(np.concatenate(batches.global_batch(0))[9])
    stages.succeed("stage0", *inputs(folder), "--store", store, "--documents-per-shard", 1)
    path = next(store.rglob(f"shard-{document:07d}.bin"))
    path.write_bytes(flipped(path.read_bytes(), 0.9, 0))
    flags = ["--store", store, "--no-pack-documents", "--probe-interval", 0]
    message = stages.fail("stage1", *argv(folder, tmp_path / "run", *flags), code=5)
    assert f"document {document}: damaged: the crc32 differs" in message
    assert [line["iteration"] for line in stages.steps(tmp_path / "run")] == [1, 2]


def stall(rank: int, world_size: int, argv: list[str], over: Path) -> tuple[int, str] | None:
    """Rank 1 stops in its first step; the others wait for it for a second from then on."""
    parallel.ANSWER_SECONDS = 0.1

    def step(number, take_step, model, optimizer, work, groups):
        if rank == 1:
            while not over.exists():
                time.sleep(0.01)
            raise SystemExit
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=1), groups.tp_group)
        return take_step(model, optimizer, work, groups)

    stages.replace_step(step)
    result = None
    with contextlib.suppress(SystemExit):
        code, _, err = stages.main(rank, world_size, "stage1", argv, None)
        result = code, err
    over.touch()
    dist.destroy_process_group()  # with a rank that has gone: nothing can be agreed on
    return result


def test_a_rank_that_stops_is_named_by_the_one_that_waits(folder, tmp_path):
    flags = [*argv(folder, tmp_path / "run"), "--tensor-model-parallel-size", 2]
    (code, err), other = pool.run(2, stall, list(map(str, flags)), tmp_path / "over")
    assert other is None
    assert code == 7
    [line] = [line for line in err.splitlines() if line.startswith("error")]
    assert "rank 1 does not answer" in line
    assert "--distributed-timeout-minutes" in line
    assert "Traceback" not in err


def unreadable_base(module: str, rank: int) -> None:
    """Rank 0 cannot read the base's weights; the others do not try."""

    def fail(load):
        assert rank == 0
        raise CheckpointError("cannot read: Input/output error", where=load)

    importlib.import_module(module).base_fingerprint = fail


def test_a_base_that_only_rank_0_cannot_read_ends_all_ranks(folder, tmp_path):
    for stage, module, flags in (
        ("stage0", "megatron_replay.collection.run",
         [*inputs(folder), "--store", tmp_path / "store"]),
        ("stage1", "megatron_replay.training.build", argv(folder, tmp_path / "run")),
    ):  # fmt: skip
        before = functools.partial(unreadable_base, module)
        message = stages.fail(stage, *flags, dp=2, before=before, code=4)
        assert "cannot read: Input/output error" in message


def test_weights_that_are_not_finite_are_refused_at_load(folder, tmp_path):
    model = shutil.copytree(folder / "model", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    for stage, flags in (
        ("stage0", [*inputs(folder), "--load", model, "--store", tmp_path / "store"]),
        ("stage1", argv(folder, tmp_path / "run", "--load", model, "--allow-other-store")),
    ):
        message = stages.fail(stage, *flags, tp=2, code=4)
        assert "not finite: decoder.layers.1.mlp.linear_fc1.weight" in message


def ruin(rank: int) -> None:
    """Rank 1's weights are NaN after its second step, which no loss shows yet."""

    def step(number, take_step, model, *rest):
        result = take_step(model, *rest)
        if number == 2 and rank == 1:
            with torch.no_grad():
                next(model.parameters())[0, 0] = math.nan
        return result

    stages.replace_step(step)


def test_a_run_with_ruined_weights_publishes_nothing_and_fails(folder, tmp_path):
    flags = argv(folder, tmp_path / "run", "--save-interval", 1, "--probe-interval", 0)
    message = stages.fail("stage1", *flags, tp=2, before=ruin, code=7)
    assert "not finite: embedding.word_embeddings.weight" in message
    assert directories.latest_iteration(tmp_path / "run") == 1
    stages.succeed("stage1", *flags, tp=2)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", 10**9), ("num_attention_heads", 4 * 10**8), ("hidden_size", 10**9),
     ("vocab_size", 10**9)],
)  # fmt: skip
def test_a_config_of_other_sizes_is_refused_before_memory_is_taken(folder, tmp_path, key, value):
    model = shutil.copytree(folder / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {key: value}
    (model / "config.json").write_text(json.dumps(config))
    extra = ["--load", model, "--allow-other-store"]
    message = stages.fail("stage1", *argv(folder, tmp_path / "run", *extra), code=4)
    assert str(model) in message
