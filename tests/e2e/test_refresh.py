"""A run goes on with candidates that Stage 0 made with the run's own checkpoint."""

from __future__ import annotations

import shutil

import pytest
import torch

from megatron_replay.store import CandidateReader
from megatron_replay.training.metrics import read_metrics
from tests import tiny
from tests.e2e import stages

pytestmark = pytest.mark.distributed


def steps(save) -> list[dict]:
    return [line for line in read_metrics(save / "metrics.jsonl") if "loss" in line]


def test_a_run_is_refreshed_when_told_and_its_batches_stay(tmp_path):
    corpus = tiny.save_corpus(tmp_path / "corpus", num_documents=20)
    tiny.save_qwen3(tmp_path / "model", tied=True, num_hidden_layers=1)
    data = ["--data-path", tmp_path / "corpus", "--seq-length", 64]
    draw = ["--position-strategy", "random"]
    run, other = tmp_path / "run", tmp_path / "other"

    def collect(load, name, *flags) -> CandidateReader:
        stages.succeed(
            "stage0", "--load", tmp_path / load, *data, "--store", tmp_path / name, *flags
        )
        return CandidateReader(tmp_path / name)

    def argv(save, store, *flags) -> list[object]:
        return [
            "--load", tmp_path / "model", *data, "--store", tmp_path / store, "--save", save,
            "--lr", 1e-2, "--optimizer", "adamw", "--global-batch-size", 1, "--train-iters", 4,
            "--probe-interval", 0, *flags,
        ]  # fmt: skip

    before = collect("model", "before", *draw)
    stages.succeed("stage1", *argv(run, "before", "--exit-interval", 2), tp=2)
    after = collect("run", "after", *draw)
    stages.convert(run, tmp_path / "tuned", "--no-verify")
    logits_TV = tiny.load_reference(tmp_path / "tuned")(
        torch.tensor(corpus[0].tokens[:-1]).long()[None]
    ).logits[0]
    lse_N = logits_TV.logsumexp(1)[torch.tensor(after[0].positions).long()]
    torch.testing.assert_close(torch.tensor(after[0].lse), lse_N, atol=4e-3, rtol=0)
    assert abs(before[0].lse - after[0].lse).max() > 0.02

    shutil.copytree(run, other)
    message = stages.fail("stage1", *argv(run, "after"), code=2)
    assert "another --store" in message
    assert "--allow-other-store to go on with this one" in message
    collect("model", "bucket")
    message = stages.fail("stage1", *argv(run, "bucket", "--allow-other-store"), code=2)
    assert "another last recorded positions" in message

    stages.succeed("stage1", *argv(other, "before"))
    said = stages.succeed(
        "stage1", *argv(run, "after", "--allow-other-store", "--exit-interval", 3)
    )
    assert f"candidates from iteration 3 on: {tmp_path / 'after'}\n" in said
    said = stages.succeed("stage1", *argv(run, "after"))  # its own by now
    assert "candidates from" not in said
    assert "changed" not in said
    lines = read_metrics(run / "metrics.jsonl")
    assert [(x["iteration"], x["store"]) for x in lines if "store" in x] == [
        (2, str(tmp_path / "after"))
    ]
    assert [(x["positions"], x["tokens"]) for x in steps(run)] == [
        (x["positions"], x["tokens"]) for x in steps(other)
    ]
    same = [a["loss"] == b["loss"] for a, b in zip(steps(run), steps(other), strict=True)]
    assert same == [True, True, False, False]
