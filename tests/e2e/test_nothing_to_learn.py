"""Where truncation, a store or a tokenizer leaves nothing to learn, or something else to."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from megatron_replay.data.corpus import Document
from megatron_replay.data.corpus_writer import CorpusWriter
from megatron_replay.data.packing import document_order
from megatron_replay.run_log import summarize_run
from megatron_replay.store import CandidateReader
from megatron_replay.training.metrics import read_metrics
from tests import tiny
from tests.e2e import stages

pytestmark = pytest.mark.distributed
SEQ_LENGTH = 16


def write_corpus(prefix, prompts: list[int], **described) -> None:
    """A document for each prompt's length, with an answer of three tokens."""
    known = {"vocab_size": tiny.VOCAB_SIZE, "files": {}, **described}
    tokenizer = SimpleNamespace(eos_id=0, pad_id=0, path="random", fingerprint="random", **known)
    rng = np.random.default_rng(0)
    with CorpusWriter(prefix, tokenizer, row_format="random", source={}) as writer:
        for length in prompts:
            tokens = rng.integers(0, tiny.VOCAB_SIZE, length + 3).astype(np.int32)
            writer.add(Document(tokens, np.arange(length + 3) >= length))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nothing")
    tiny.save_qwen3(folder / "model", tied=True, num_hidden_layers=1)
    write_corpus(folder / "every", [30, 40, 50, 60])
    write_corpus(folder / "some", [30, 4, 5, 40, 50, 6])
    return folder


def data(folder, name: str) -> list[object]:
    return [
        "--load", folder / "model", "--data-path", folder / name, "--seq-length", SEQ_LENGTH,
        "--long-documents", "truncate",
    ]  # fmt: skip


def training(save, *extra: object) -> list[object]:
    return ["--save", save, "--lr", 1e-3, "--global-batch-size", 1, *extra]


def test_truncation_that_cuts_every_answer_is_refused_by_both_stages(folder, tmp_path, capsys):
    from megatron_replay import stage0, stage1

    every, full = data(folder, "every"), ["--loss", "full"]
    store = ["--store", tmp_path / "store"]
    for stage, main, flags in (
        ("stage0", stage0.main, store),
        ("stage1", stage1.main, training(tmp_path / "run", *full)),
        ("stage1", stage1.main, training(tmp_path / "run", *full, "--train-iters", 5)),
        ("stage1", stage1.main, training(tmp_path / "run", *full, "--lr-warmup-iters", 1)),
    ):
        message = stages.fail(stage, *every, *flags, code=3)
        assert "no answer token is left: every document's prompt is as long as a pack" in message
        assert main([*map(str, [*every, *flags]), "--dry-run"]) == 3
        assert "no answer token is left" in capsys.readouterr().err
    assert not (tmp_path / "store" / "store.json").exists()


def test_steps_without_a_label_are_no_loss_of_zero(folder, tmp_path, capsys):
    """They are counted, reported, and left out of means and spikes."""
    from megatron_replay import stage1

    flags = training(tmp_path / "run", "--loss", "full", "--no-pack-documents")
    said = stages.succeed("stage1", *data(folder, "some"), *flags)
    assert "warning: 3 of them have lost every answer token" in said
    lines = [x for x in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in x]
    empty = [x for x in lines if x["positions"] == 0]
    assert len(lines) == 6
    assert len(empty) == 3
    assert all(x["loss"] is None for x in empty)
    stability = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["stability"]
    assert (stability["steps"], stability["non_finite"]) == (3, 0)
    summary = summarize_run(tmp_path / "run")
    assert (summary.non_finite, summary.iterations) == (0, 6)
    assert summary.final_loss > 1
    plan = [*data(folder, "some"), *training(tmp_path / "run", "--loss", "full"), "--dry-run"]
    assert stage1.main(list(map(str, plan))) == 0
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["without", "a", "label", "left", "3"] in said


def test_a_run_that_has_learnt_nothing_yet_saves_nothing(folder, tmp_path):
    """Only weight decay has acted: the same command fails again, until a step has a label."""
    write_corpus(tmp_path / "rare", [*[30] * 20, 4])
    late = next(s for s in range(99) if 20 not in document_order(21, seed=s, epoch=0)[:4])
    early = next(s for s in range(99) if document_order(21, seed=s, epoch=0)[1] == 20)
    flags = [*data(folder, "some"), "--loss", "full", "--no-pack-documents", "--save-interval", 1]
    flags[3] = tmp_path / "rare"
    run, one = tmp_path / "run", tmp_path / "one"
    for steps in (3, 4):  # a longer run goes on from nothing either
        message = stages.fail(
            "stage1", *flags, *training(run, "--train-iters", steps, "--seed", late), code=7
        )
        assert f"none of {steps} steps had a label: nothing was learned" in message
        assert not (run / "latest_checkpointed_iteration.txt").exists()
        assert not list(run.glob("*iter_*"))
    said = stages.succeed("stage1", *flags, *training(one, "--train-iters", 3, "--seed", early))
    assert "iteration 1: none of 1 steps had a label" in said
    assert sorted(path.name for path in one.glob("iter_*")) == ["iter_0000002", "iter_0000003"]


def test_a_store_of_longer_documents_than_the_run_reads(folder, tmp_path):
    """All its recorded positions are cut off, so that nothing is left to learn."""
    long = ["--load", folder / "model", "--data-path", folder / "some", "--seq-length", 64]
    store = ["--store", tmp_path / "store"]
    last = ["--position-strategy", "last-token"]
    stages.succeed("stage0", *long, *store, *last)
    write_corpus(tmp_path / "cut", [14, 14, 14])
    stages.succeed("stage0", "--load", folder / "model", "--data-path", tmp_path / "cut",
                   "--seq-length", 64, "--store", tmp_path / "cut-store", *last)  # fmt: skip
    flags = training(tmp_path / "run", "--store", tmp_path / "cut-store")
    message = stages.fail(
        "stage1", "--load", folder / "model", "--data-path", tmp_path / "cut", "--seq-length",
        14, "--long-documents", "truncate", *flags, code=3,
    )  # fmt: skip
    assert "records no position" in message
    # Labels are left at the start of each answer, where the store has nothing.
    write_corpus(tmp_path / "ends", [4, 4, 12, 13])
    common = ["--load", folder / "model", "--data-path", tmp_path / "ends"]
    ends = tmp_path / "ends-store"
    stages.succeed("stage0", *common, "--seq-length", 64, "--store", ends, *last)
    cut = [*common, "--store", ends, "--long-documents", "truncate", "--seq-length"]
    message = stages.fail("stage1", *cut, 4, *training(tmp_path / "run"), code=3)
    assert "4 of 4 documents have a recorded position, and none before --seq-length 4" in message
    assert not (tmp_path / "run" / "hf").exists()
    said = stages.succeed("stage1", *cut, 13, *training(tmp_path / "run"))
    assert "warning: 2 of them have lost every answer token that could be learnt" in said
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [x["positions"] for x in lines if "loss" in x] == [2]


def test_the_probes_base_is_of_the_positions_it_reads(folder, tmp_path):
    """Of a store of whole documents, truncation cuts positions off; they are in neither mean."""
    write_corpus(tmp_path / "corpus", [4, 5, 14, 14])
    shutil.copytree(folder / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 3  # decided, so positions differ in what is outside
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    common = ["--load", tmp_path / "model", "--data-path", tmp_path / "corpus"]
    stages.succeed("stage0", *common, "--seq-length", 64, "--store", tmp_path / "store",
                   "--position-strategy", "all", "--coverage", 0.3)  # fmt: skip
    flags = training(tmp_path / "run", "--store", tmp_path / "store", "--train-iters", 1)
    stages.succeed("stage1", *common, "--seq-length", 15, "--long-documents", "truncate", *flags)
    probe = next(x for x in read_metrics(tmp_path / "run" / "metrics.jsonl") if "probe" in x)
    found = probe["probe"]
    assert found["outside_mass"] == pytest.approx(found["base_outside_mass"], abs=1e-3)
    whole = np.concatenate([d.tail_mass for d in CandidateReader(tmp_path / "store")]).mean()
    assert abs(whole - found["base_outside_mass"]) > 5e-3  # positions that are not read


class TestTokenizers:
    """A corpus of another tokenizer is refused by file, also where its ids fit."""

    @pytest.fixture
    def model(self, folder, tmp_path):
        shutil.copytree(folder / "model", tmp_path / "model")
        (tmp_path / "model" / "tokenizer.json").write_text("{}")
        (tmp_path / "model" / "tokenizer_config.json").write_text("{}")
        return tmp_path / "model"

    def refused(self, model, prefix, tmp_path) -> str:
        flags = ["--load", model, "--data-path", prefix, "--seq-length", 64]
        message = stages.fail("stage0", *flags, "--store", tmp_path / "store", code=3)
        run = training(tmp_path / "run", "--loss", "full")
        assert stages.fail("stage1", *flags, *run, code=3) == message
        return message

    def test_the_files_that_differ_are_named(self, model, tmp_path):
        from megatron_replay.data.tokenizer import tokenizer_digests

        files = tokenizer_digests(model)
        write_corpus(tmp_path / "other", [4, 5], files=files | {"tokenizer_config.json": "x" * 64})
        message = self.refused(model, tmp_path / "other", tmp_path)
        assert "another tokenizer than --load has, by tokenizer_config.json" in message
        write_corpus(tmp_path / "more", [4, 5], files=files | {"merges.txt": "x" * 64})
        assert "by merges.txt" in self.refused(model, tmp_path / "more", tmp_path)
        write_corpus(tmp_path / "same", [4, 5], files=files)
        flags = ["--load", model, "--data-path", tmp_path / "same", "--seq-length", 64]
        stages.succeed("stage0", *flags, "--store", tmp_path / "store")

    def test_tokens_that_a_tokenizer_has_and_the_corpus_does_not_use(self, model, tmp_path):
        write_corpus(tmp_path / "corpus", [4, 5], vocab_size=2 * tiny.VOCAB_SIZE)
        flags = ["--load", model, "--data-path", tmp_path / "corpus", "--seq-length", 64]
        stages.succeed("stage0", *flags, "--store", tmp_path / "store")
        tiny.save_qwen3(tmp_path / "small", tied=True, num_hidden_layers=1, vocab_size=64)
        flags[1] = tmp_path / "small"
        message = stages.fail("stage0", *flags, "--store", tmp_path / "other", code=2)
        assert "a token that the model has no row for (expected tokens below 64; found" in message
        assert "embedding was resized" in message
