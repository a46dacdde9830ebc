"""Damaged files, and faults while a run goes on: one line that names what, and no success."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import json
import math
import os
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_replay import parallel
from megatron_replay.checkpoint import directories, training
from megatron_replay.config import Stage1Config
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.loader import GlobalBatches
from megatron_replay.errors import CheckpointError
from megatron_replay.estimate import checkpoint_bytes
from megatron_replay.flags import parse
from megatron_replay.model.config import ModelConfig
from tests import pool
from tests.e2e import stages
from tests.e2e.stages import argv, inputs

pytestmark = pytest.mark.distributed


def flipped(content: bytes, place: float, bit: int) -> bytes:
    """``content`` with one bit flipped at ``place`` of its length."""
    at = int(place * len(content))
    return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]


#: Of a text; a pipe would block, and a device has no end.
DAMAGE = [b"{", b"[]", b"null", b"\xff\xfe\x00", b"[" * 100_000, b'"text"', b"\0" * 99]
SPECIAL = [os.mkfifo, lambda path: path.symlink_to("/dev/zero")]
#: By pattern of a file in a run's directory: the exit code, and what it may hold instead.
FILES = {
    "resolved_config.yaml": (4, [*DAMAGE, b"", b"a: &x [*x]", b"data: 3", b"a: b: c"]),
    "latest_checkpointed_iteration.txt": (
        4, [*DAMAGE, b"", b"-1", b"9", b"9" * 5000, "²".encode(), b"release"],
    ),
    "train_state.json": (4, [*DAMAGE, *SPECIAL, b"", b'{"iteration": 2}']),
    "skipped_batches.jsonl": (6, [text + b"\n" for text in DAMAGE]),
    "metrics.jsonl": (6, SPECIAL),
    "hf/config.json": (4, SPECIAL),
    **{f"iter_0000002/{name}": (4, []) for name in ("*.distcp", ".metadata", "*.pt", "*.json")},
}  # fmt: skip


@pytest.mark.parametrize("pattern", FILES)
def test_a_damaged_file_of_a_run_is_one_line(folder, run, tmp_path, pattern):
    """torch alone would load every file of weights with a flipped bit."""
    save, (code, contents) = shutil.copytree(run, tmp_path / "run"), FILES[pattern]
    paths = list(save.rglob(pattern)) or [save / pattern]  # no step was skipped
    for path in paths:
        whole = path.read_bytes() if path.exists() else None
        bits = (
            [flipped(whole, 0.25, 0), flipped(whole, 0.75, 1), whole[:-9]] if not contents else []
        )
        for content in [*contents, *bits, *SPECIAL * (path.suffix == ".distcp")]:
            path.unlink(missing_ok=True)
            content(path) if callable(content) else path.write_bytes(content)
            line = stages.fail("stage1", *argv(folder, save, "--lr", 2e-3), code=code)
            assert path.name in line or "iter_0000002" in line
            assert len(line) < 700
            assert "emove" not in line or not bits  # no advice costs a checkpoint
            path.unlink()
        if bits:
            assert "No such file" in stages.fail("stage1", *argv(folder, save), tp=2, code=code)
        if whole is not None:
            path.write_bytes(whole)
    stages.succeed("stage1", *argv(folder, save), tp=2)


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


def test_a_damaged_record_of_the_store_ends_the_run_at_its_step(folder, tmp_path):
    """Batches are made ahead of the step: the error comes up at its own, the third."""
    lengths = Corpus(folder / "corpus").lengths
    batches = GlobalBatches(
        lengths, seq_length=64, global_batch_size=4, seed=1234, epochs=1, pack_documents=False
    )
    store, document = tmp_path / "store", int(batches.documents(2)[1])
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


def limit_file_size(rank: int) -> None:
    """No file of this process may grow beyond 64 KiB: the kernel refuses, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))


def test_a_full_disk_publishes_nothing(folder, tmp_path):
    command = argv(folder, tmp_path / "run")
    message = stages.fail("stage1", *command, tp=2, before=limit_file_size, code=6)
    assert "nothing was published" in message
    assert "Errno 27" in message  # what a file size limit gives in place of a full disk's 28
    assert directories.latest_iteration(tmp_path / "run") is None
    stages.succeed("stage1", *command, tp=2)


def nearly_full(rank: int, *, free: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=free)
    shutil.disk_usage = lambda path: usage


@pytest.mark.parametrize(
    ("settings", "most"),
    [(["--optimizer", "moclip", "--bf16"], 1.3), (["--optimizer", "muonclip"], 1.7)],
)
def test_a_run_that_could_not_be_saved_does_not_begin(folder, tmp_path, settings, most):
    command = argv(folder, tmp_path / "run", *settings)
    config = parse(Stage1Config, list(map(str, command)), program="stage1").config
    asked = checkpoint_bytes(ModelConfig.from_hf(folder / "model"), config)
    short = partial(nearly_full, free=asked - 1)
    message = stages.fail("stage1", *command, tp=2, before=short, code=6)
    assert "run: too little disk space for a checkpoint (expected 0.00 GiB free" in message
    assert not (tmp_path / "run" / "resolved_config.yaml").exists()
    stages.succeed("stage1", *command, tp=2)
    [saved] = (tmp_path / "run").glob("iter_*")
    size = sum(path.stat().st_size for path in saved.iterdir())
    assert asked <= size < most * asked


@pytest.mark.parametrize(("what", "named"), [("both", "loss"), ("gradient", "gradient")])
def test_too_many_skipped_steps_end_the_run(folder, tmp_path, what, named):
    save = tmp_path / "run"
    command = argv(folder, save, "--train-iters", 15, "--save-interval", 2)
    poison = partial(stages.poison, first=3, what=what, on=1)
    message = stages.fail("stage1", *command, dp=2, before=poison, code=7)
    for expected in ("11 steps were skipped", "expected at most 10", "skipped_batches.jsonl"):
        assert expected in message
    assert f"the last good checkpoint is {save / 'iter_0000004'}" in message
    records = stages.read_metrics(save / "skipped_batches.jsonl")
    assert [record["iteration"] for record in records] == list(range(3, 14))
    assert {record["not_finite"] for record in records} == {named}
    # The resumed run repeats the steps after the checkpoint, and drops their records.
    stages.succeed("stage1", *command, dp=2)
    assert stages.read_metrics(save / "skipped_batches.jsonl") == records[:2]
    assert len(stages.losses(save)) == 15


@pytest.mark.parametrize(("first", "skipped", "saved"), [(1, 5, None), (3, 3, 4), (4, 2, 5)])
def test_a_run_of_which_most_steps_were_skipped_fails(folder, tmp_path, first, skipped, saved):
    command = argv(folder, tmp_path / "run", "--save-interval", 2)
    poison = partial(stages.poison, first=first)
    if skipped == 2:
        stages.succeed("stage1", *command, before=poison)
    else:
        message = stages.fail("stage1", *command, before=poison, code=7)
        assert f"{skipped} of 5 steps were skipped" in message
    assert directories.latest_iteration(tmp_path / "run") == saved
