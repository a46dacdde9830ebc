"""What Stage 1 refuses: one line of error, its exit code, and nothing that was published."""

from __future__ import annotations

import resource
import shutil
import signal
from functools import partial

import pytest

from megatron_replay.checkpoint import directories
from tests import tiny
from tests.e2e import stages
from tests.e2e.stages import argv, inputs

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def wrong(folder, tmp_path_factory):
    """Inputs of which each has one fault, and another store of ``folder``'s model."""
    wrong = tmp_path_factory.mktemp("wrong")
    shutil.copytree(folder / "store", wrong / "unfinished")
    (wrong / "unfinished" / "manifest.json").unlink()
    shutil.copytree(folder / "store", wrong / "flipped")
    shard = wrong / "flipped" / "0000" / "shard-0000000.bin"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    tiny.save_qwen3(wrong / "short", tied=True, max_position_embeddings=16)
    for suffix in ("bin", "idx", "loss_mask", "json"):
        shutil.copy(folder / f"other.{suffix}", wrong / f"text.{suffix}")
    tiny.change_description(wrong / "text", tokenizer_fingerprint="another")
    stages.succeed("stage0", *inputs(folder), "--store", wrong / "again", "--coverage", 0.5)
    return wrong


#: Flags, the exit code, and what the line of error must have.
REFUSED = [
    ("--data-path {folder}/other", 5, "corpus_fingerprint"),
    ("--store {wrong}/unfinished", 5, "Rerun Stage 0"),
    ("--store {wrong}/flipped", 5, "shard-0000000.bin"),
    ("--load {wrong}/nothing", 4, "no such directory"),
    ("--load {wrong}/short", 2, "at most 16 positions"),
    ("--save {folder}/corpus.json/run", 6, "cannot write"),
    ("--lr-warmup-iters 1000", 2, "--lr-warmup-iters"),
    ("--head-backend triton", 2, "the triton backend cannot run"),
    ("--head-backend ascend", 2, "the ascend backend cannot run"),
    ("--kl-weight 0.5 --store {wrong}/again", 5, "the store has no logits"),
    ("--optimizer muonclip --qk-clip-threshold 100", 2, "QK-norm"),
    ("--optimizer adamuon --use-distributed-optimizer", 2, "whole matrices"),
    ("--optimizer muonclip --use-distributed-optimizer", 2, "whole matrices"),
    ("--general-data-path {wrong}/text", 2,
     "expected 512 tokens, fingerprint random; found 512 tokens, fingerprint another"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "code", "expected"), REFUSED)
def test_a_mistake_is_one_line(folder, wrong, tmp_path, flags, code, expected):
    given = flags.format(folder=folder, wrong=wrong).split()
    assert expected in stages.fail("stage1", *argv(folder, tmp_path / "run", *given), code=code)


def test_tensor_parallelism_must_divide_the_model(folder, tmp_path):
    message = stages.fail("stage1", *argv(folder, tmp_path / "run"), tp=3, code=2)
    assert "--tensor-model-parallel-size" in message


#: Flags with which a run of others is refused to go on, and what the line of error must have.
CHANGED = [
    ("--bf16", "--bf16 (expected False; found True)"),
    ("--loss full", "--loss (expected restricted; found full)"),
    ("--global-batch-size 8", "--global-batch-size (expected 4; found 8)"),
    ("--store {wrong}/again --allow-other-store", "another --store"),
    ("--load {other} --allow-other-store", "another --load: config.json, model.safetensors"),
    ("--optimizer muonclip", "--optimizer (expected adam; found muonclip)"),
    ("--use-distributed-optimizer", "--use-distributed-optimizer (expected False; found True)"),
    ("--general-data-path {folder}/other", "sample of general text before its first step"),
]


@pytest.mark.parametrize(("flags", "expected"), CHANGED)
def test_a_run_does_not_go_on_with_what_it_did_not_begin_with(
    folder, other, wrong, run, flags, expected
):
    given = flags.format(folder=folder, other=other, wrong=wrong).split()
    message = stages.fail("stage1", *argv(folder, run, *given), code=2)
    assert expected in message
    assert len(message) < 500


def test_the_general_sample_of_a_run_stays(folder, tmp_path):
    text = ["--general-data-path", folder / "other", "--exit-interval", 2, "--probe-documents"]
    stages.succeed("stage1", *argv(folder, tmp_path / "run", *text, 8))
    message = stages.fail("stage1", *argv(folder, tmp_path / "run", *text, 7), code=2)
    assert "of this sample of general text" in message


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
