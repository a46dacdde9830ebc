"""What both stages refuse: one line of error, its exit code, and nothing that was published."""

from __future__ import annotations

import json
import math
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.e2e import stages
from tests.e2e.stages import argv, inputs

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def wrong(folder, tmp_path_factory):
    """Inputs of which each has one fault or is no place to save, and another store."""
    wrong = tmp_path_factory.mktemp("wrong")
    for name in ("unfinished", "flipped", "copy"):
        shutil.copytree(folder / "store", wrong / name)
    (wrong / "unfinished" / "manifest.json").unlink()
    shard = wrong / "flipped" / "0000" / "shard-0000000.bin"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    tiny.save_qwen3(wrong / "short", tied=True, max_position_embeddings=16)
    for suffix in ("bin", "idx", "loss_mask", "json"):
        shutil.copy(folder / f"other.{suffix}", wrong / f"text.{suffix}")
    tiny.change_description(wrong / "text", tokenizer_fingerprint="another")
    stages.succeed("stage0", *inputs(folder), "--store", wrong / "again", "--coverage", 0.5)
    shutil.copytree(folder / "model", wrong / "model")
    stages.convert(folder / "model", wrong / "mcore", "--save-model-type", "mcore")
    return wrong


#: Stage, flags, the exit code, and what the line of error must have.
REFUSED = [
    ("stage1", "--data-path {folder}/other", 5, "corpus_fingerprint"),
    ("stage1", "--store {wrong}/unfinished", 5, "Rerun Stage 0"),
    ("stage1", "--store {wrong}/flipped", 5, "shard-0000000.bin"),
    ("stage1", "--load {wrong}/nothing", 4, "no such directory"),
    ("stage1", "--load {wrong}/short", 2, "at most 16 positions"),
    ("stage1", "--load {wrong}/short --dry-run", 2, "at most 16 positions"),
    ("stage0", "--load {wrong}/short --dry-run", 2, "at most 16 positions"),
    ("stage1", "--data-path {folder}/other --dry-run", 5, "corpus_fingerprint"),
    ("stage1", "--load {other}", 5,
     "with another base model than --load, by config.json, model.safetensors"),
    ("stage1", "--lr-warmup-iters 1000", 2, "--lr-warmup-iters"),
    ("stage1", "--group-prefixes 4", 2, "no two documents begin alike"),
    ("stage1", "--head-backend triton", 2, "the triton backend cannot run"),
    ("stage1", "--head-backend ascend", 2, "the ascend backend cannot run"),
    ("stage1", "--kl-weight 0.5 --store {wrong}/again", 5, "the store has no logits"),
    ("stage1", "--optimizer muonclip --qk-clip-threshold 100", 2, "QK-norm"),
    ("stage1", "--optimizer adamuon --use-distributed-optimizer", 2, "whole matrices"),
    ("stage1", "--optimizer muonclip --use-distributed-optimizer", 2, "whole matrices"),
    ("stage1", "--general-data-path {wrong}/text", 2,
     "expected 512 tokens, fingerprint random; found 512 tokens, fingerprint another"),
    ("stage1", "--save {folder}/corpus.json/run", 6, "cannot write"),
    ("stage1", "--save {wrong}/model --load {wrong}/model", 2, "also read, as --load"),
    ("stage1", "--save {wrong}/model", 6, "files that no run of Stage 1 wrote"),
    ("stage1", "--save {wrong}/copy --store {wrong}/copy", 2, "also read, as --store"),
    ("stage1", "--save {wrong}/copy", 6, "found store.json"),
    ("stage1", "--save {wrong}/mcore", 6, "a converted checkpoint belongs to --load"),
    ("stage0", "--load {wrong}/model --store {wrong}/model", 2, "also read, as --load"),
    ("stage0", "--store {wrong}/copy --store-logits fp16 --coverage 0.9", 5, "coverage"),
    ("stage0", "--seq-length 16", 3, "--long-documents"),
    *(
        ("stage0", f"--shards {shards}", 2, f"expected FIRST:STOP within 0:1; found {shards}")
        for shards in ("1:2", "0:0", "2", "a:b")
    ),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "flags", "code", "expected"), REFUSED)
def test_a_mistake_is_one_line(folder, other, wrong, tmp_path, stage, flags, code, expected):
    given = flags.format(folder=folder, other=other, wrong=wrong).split()
    stage0 = [*inputs(folder), "--store", tmp_path / "store", *given]
    command = argv(folder, tmp_path / "run", *given) if stage == "stage1" else stage0
    before = sorted(wrong.rglob("*"))
    assert expected in stages.fail(stage, *command, code=code)
    assert sorted(wrong.rglob("*")) == before


def resized(key):
    def change(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: 4 * 10**8}))

    return change


def not_finite(path):
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(weights, path, {"format": "pt"})


def replaced(make):
    """By what is no regular file: a pipe would block, and a device has no end."""

    def change(path):
        path.unlink(missing_ok=True)
        make(path)

    return change


#: What is done to a file of the model, and what the line of error must have.
FAULTS = [
    *(("config.json", resized(key), "model") for key in (
        "num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")),
    ("model.safetensors", not_finite, "not finite: decoder.layers.1.mlp.linear_fc1.weight"),
    *((name, replaced(make), f"{name}: cannot read (expected a regular file")
      for name in ("config.json", "model.safetensors", "tokenizer.json")
      for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "expected"), FAULTS)
def test_a_model_with_a_fault_is_refused_by_both_stages(folder, tmp_path, name, change, expected):
    """Sizes before memory is taken for them."""
    load = ["--load", shutil.copytree(folder / "model", tmp_path / "model")]
    change(tmp_path / "model" / name)
    code = 3 if name == "tokenizer.json" else 4
    stage0 = [*inputs(folder), *load, "--store", tmp_path / "store"]
    assert expected in stages.fail("stage0", *stage0, code=code)
    stage1 = argv(folder, tmp_path / "run", *load, "--allow-other-store")
    assert expected in stages.fail("stage1", *stage1, code=code)


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
