"""Batches are made ahead of the step; an error in one comes up at its own step."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from megatron_replay.checkpoint import training
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.sampler import GlobalBatches
from megatron_replay.errors import StoreError
from megatron_replay.run_log import summarize_run
from megatron_replay.store import CandidateReader
from megatron_replay.training.metrics import read_metrics
from tests import tiny
from tests.e2e import stages

pytestmark = pytest.mark.distributed

SEQ_LENGTH, GLOBAL_BATCH, SEED = 64, 4, 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefetch")
    tiny.save_corpus(folder / "corpus", num_documents=60)
    tiny.save_qwen3(folder / "model", tied=True, num_hidden_layers=1)
    stages.succeed("stage0", *inputs(folder), "--store", folder / "store")
    return folder


def inputs(folder) -> list[object]:
    return [
        "--load", folder / "model", "--data-path", folder / "corpus", "--seq-length", SEQ_LENGTH,
    ]  # fmt: skip


def argv(folder, save, *extra) -> list[object]:
    return [
        *inputs(folder), "--save", save, "--lr", 1e-3,
        "--global-batch-size", GLOBAL_BATCH, "--seed", SEED, "--probe-interval", 0, *extra,
    ]  # fmt: skip


def trained(save) -> tuple[list[float], dict[str, bytes]]:
    """Losses as logged, and the files of the last checkpoint that hold tensors."""
    last = training.iteration_directory(save, training.latest_iteration(save))
    return stages.losses(save), {p.name: p.read_bytes() for p in last.glob("*.distcp")}


def report_threads(rank: int) -> None:
    """Have a loader that is there before or after training said."""
    from megatron_replay.training import train as module

    train = module.train

    def reporting(run, stop):
        try:
            train(run, stop)
        finally:
            names = [thread.name for thread in threading.enumerate()]
            print([name for name in names if name.startswith("loader")])

    module.train = reporting


@pytest.mark.parametrize("loss", ["restricted", "full"])
def test_a_run_saved_and_stopped_while_batches_are_made_goes_on_bitwise(folder, tmp_path, loss):
    """Two epochs; the second run stops in the second."""
    store = ["--store", folder / "store"] if loss == "restricted" else []
    flags = ["--loss", loss, *store, "--train-epochs", 2]
    stages.succeed("stage1", *argv(folder, tmp_path / "whole", *flags))
    losses, weights = trained(tmp_path / "whole")
    at = len(losses) * 2 // 3
    cut = argv(folder, tmp_path / "cut", *flags, "--save-interval", 2)
    stages.succeed("stage1", *cut, "--exit-interval", at)
    assert stages.losses(tmp_path / "cut") == losses[:at]
    [(code, said, _)] = stages.run("stage1", *cut, before=report_threads)
    assert (code, said.splitlines()[-1]) == (0, "[]")
    assert trained(tmp_path / "cut") == (losses, weights)


@pytest.fixture
def damaged_at_third(folder, tmp_path) -> tuple[int, object]:
    """A document of the third global batch, and a store in which it is damaged."""
    corpus, store = Corpus(folder / "corpus"), tmp_path / "store"
    batches = GlobalBatches(
        corpus.lengths, seq_length=SEQ_LENGTH, global_batch_size=GLOBAL_BATCH, micro_batch_size=1,
        seed=SEED, epochs=1, dp_rank=0, dp_size=1,
    )  # fmt: skip
    document = int(np.concatenate(batches.global_batch(2))[-1])
    stages.succeed("stage0", *inputs(folder), "--store", store)
    record = bytes(CandidateReader(store)._record(document))
    [path] = store.rglob("*.bin")
    content = path.read_bytes()
    at = content.index(record) + len(record) // 2
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    return document, store


def test_a_damaged_record_ends_the_run_at_its_step(folder, damaged_at_third, tmp_path):
    document, store = damaged_at_third
    flags = argv(folder, tmp_path / "run", "--store", store)
    [(code, said, err)] = stages.run("stage1", *flags, before=report_threads)
    assert code == StoreError.exit_code
    assert f"document {document}: damaged: the crc32 differs" in err
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["iteration"] for line in lines if "loss" in line] == [1, 2]
    assert said.splitlines()[-1] == "[]"


def test_the_wait_is_logged_and_summed_up(folder, tmp_path):
    said = stages.succeed(
        "stage1", *argv(folder, tmp_path / "run", "--store", folder / "store", "--train-iters", 3)
    )
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert all(0 <= line["data_wait_seconds"] < line["seconds"] for line in lines)
    share = summarize_run(tmp_path / "run").data_wait_share
    assert f"Steps waited for data for {100 * share:.2g} % of their time." in said
