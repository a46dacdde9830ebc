"""Where truncation, a store or a tokenizer leaves nothing to learn, or something else to."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from megatron_replay import stage0, stage1
from megatron_replay.data.corpus import Document
from megatron_replay.data.corpus_writer import CorpusWriter
from megatron_replay.data.packing import document_order
from megatron_replay.data.tokenizer import tokenizer_digests
from megatron_replay.run_log import summarize_run
from megatron_replay.store import CandidateReader
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


def data(model, prefix, seq_length: int = SEQ_LENGTH) -> list[object]:
    truncate = ["--long-documents", "truncate"]
    return ["--load", model, "--data-path", prefix, "--seq-length", seq_length, *truncate]


def training(save, *extra: object) -> list[object]:
    return ["--save", save, "--lr", 1e-3, "--global-batch-size", 1, *extra]


def test_truncation_that_cuts_every_answer_is_refused_by_both_stages(folder, tmp_path, capsys):
    every, full = data(folder / "model", folder / "every"), ["--loss", "full"]
    store = ["--store", tmp_path / "store"]
    for stage, main, flags in (
        ("stage0", stage0.main, store),
        ("stage1", stage1.main, training(tmp_path / "run", *full)),
        ("stage1", stage1.main, training(tmp_path / "run", *full, "--train-iters", 5)),
        ("stage1", stage1.main, training(tmp_path / "run", *full, "--lr-warmup-iters", 1)),
    ):
        message = stages.fail(stage, *every, *flags, code=3)
        assert "no answer token is left" in message
        assert main([*map(str, [*every, *flags]), "--dry-run"]) == 3
        assert "no answer token is left" in capsys.readouterr().err
    assert not (tmp_path / "store" / "store.json").exists()


def test_steps_without_a_label_are_no_loss_of_zero(folder, tmp_path, capsys):
    """They are counted, reported, and left out of means and spikes."""
    save, some = tmp_path / "run", data(folder / "model", folder / "some")
    flags = training(save, "--loss", "full", "--no-pack-documents")
    printed = stages.succeed("stage1", *some, *flags)
    assert "warning: 3 of them have lost every answer token" in printed
    lines = stages.steps(save)
    empty = [x for x in lines if x["positions"] == 0]
    assert len(lines) == 6
    assert len(empty) == 3
    assert all(x["loss"] is None for x in empty)
    stability = stages.metrics(save)[-1]["stability"]
    assert (stability["steps"], stability["non_finite"]) == (3, 0)
    summary = summarize_run(save)
    assert (summary.non_finite, summary.iterations) == (0, 6)
    assert summary.final_loss > 1
    plan = [*some, *training(save, "--loss", "full"), "--dry-run"]
    assert stage1.main(list(map(str, plan))) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["without", "a", "label", "left", "3"] in printed


def test_a_run_that_has_learnt_nothing_yet_saves_nothing(folder, tmp_path):
    """Only weight decay has acted: the same command fails again, until a step has a label."""
    write_corpus(tmp_path / "rare", [*[30] * 20, 4])
    late = next(s for s in range(99) if 20 not in document_order(21, seed=s, epoch=0)[:4])
    early = next(s for s in range(99) if document_order(21, seed=s, epoch=0)[1] == 20)
    flags = [*data(folder / "model", tmp_path / "rare"), "--loss", "full", "--no-pack-documents"]
    flags += ["--save-interval", 1]
    run, one = tmp_path / "run", tmp_path / "one"
    for steps in (3, 4):  # a longer run goes on from nothing either
        extra = training(run, "--train-iters", steps, "--seed", late)
        message = stages.fail("stage1", *flags, *extra, code=7)
        assert f"none of {steps} steps had a label" in message
        assert not (run / "latest_checkpointed_iteration.txt").exists()
        assert not list(run.glob("*iter_*"))
    printed = stages.succeed("stage1", *flags, *training(one, "--train-iters", 3, "--seed", early))
    assert "iteration 1: none of 1 steps had a label" in printed
    assert sorted(path.name for path in one.glob("iter_*")) == ["iter_0000002", "iter_0000003"]


def test_a_store_of_longer_documents_than_the_run_reads(folder, tmp_path):
    """Its recorded positions are cut off: labels are left where the store has nothing."""
    last = ["--position-strategy", "last-token"]
    for name, prompts in (("cut", [14, 14, 14]), ("ends", [4, 4, 12, 13])):
        write_corpus(tmp_path / name, prompts)
        whole = data(folder / "model", tmp_path / name, 64)
        stages.succeed("stage0", *whole, "--store", tmp_path / f"{name}-store", *last)

    def command(name: str, seq_length: int) -> list[object]:
        store = ["--store", tmp_path / f"{name}-store"]
        corpus = data(folder / "model", tmp_path / name, seq_length)
        return [*corpus, *store, *training(tmp_path / "run")]

    assert "records no position" in stages.fail("stage1", *command("cut", 14), code=3)
    message = stages.fail("stage1", *command("ends", 4), code=3)
    assert "4 of 4 documents have a recorded position, and none before --seq-length 4" in message
    assert not (tmp_path / "run" / "hf").exists()
    out = stages.succeed("stage1", *command("ends", 13))
    assert "warning: 2 of them have lost every answer token that could be learnt" in out
    assert [line["positions"] for line in stages.steps(tmp_path / "run")] == [2]


def test_the_probes_base_is_of_the_positions_it_reads(folder, tmp_path):
    """Of a store of whole documents, truncation cuts positions off; they are in neither mean."""
    write_corpus(tmp_path / "corpus", [4, 5, 14, 14])
    model, store = shutil.copytree(folder / "model", tmp_path / "model"), tmp_path / "store"
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 3  # decided, so positions differ in what is outside
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    every = ["--store", store, "--position-strategy", "all", "--coverage", 0.3]
    stages.succeed("stage0", *data(model, tmp_path / "corpus", 64), *every)
    flags = training(tmp_path / "run", "--store", store, "--train-iters", 1)
    stages.succeed("stage1", *data(model, tmp_path / "corpus", 15), *flags)
    found = next(x["probe"] for x in stages.metrics(tmp_path / "run") if "probe" in x)
    assert found["outside_mass"] == pytest.approx(found["base_outside_mass"], abs=1e-3)
    whole = np.concatenate([d.tail_mass for d in CandidateReader(store)]).mean()
    assert abs(whole - found["base_outside_mass"]) > 5e-3  # positions that are not read


def test_a_corpus_of_another_tokenizer_is_refused_by_file(folder, tmp_path):
    """Also where its ids fit."""
    model, store = shutil.copytree(folder / "model", tmp_path / "model"), tmp_path / "store"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_text("{}")
    files = tokenizer_digests(model)
    for name in ("tokenizer_config.json", "merges.txt"):
        write_corpus(tmp_path / name, [4, 5], files=files | {name: "x" * 64})
        flags, full = data(model, tmp_path / name, 64), ["--loss", "full"]
        message = stages.fail("stage0", *flags, "--store", store, code=3)
        assert f"another tokenizer than --load has, by {name}" in message
        run = training(tmp_path / "run", *full)
        assert stages.fail("stage1", *flags, *run, code=3) == message
    write_corpus(tmp_path / "same", [4, 5], files=files, vocab_size=2 * tiny.VOCAB_SIZE)
    stages.succeed("stage0", *data(model, tmp_path / "same", 64), "--store", store)
    small = tiny.save_qwen3(tmp_path / "small", tied=True, num_hidden_layers=1, vocab_size=64)
    flags = [*data(small, tmp_path / "same", 64), "--store", tmp_path / "other"]
    message = stages.fail("stage0", *flags, code=2)
    assert "(expected tokens below 64; found" in message
