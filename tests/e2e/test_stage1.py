"""Stage 1 as a program: what it logs and prints, on which layouts, and how it is stopped."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_replay import stage0, stage1
from megatron_replay.checkpoint import directories
from megatron_replay.run_log import read_metrics, summarize_run
from megatron_replay.store import CandidateReader
from tests import tiny
from tests.e2e import stages
from tests.e2e.stages import argv, inputs, weights

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> tuple[Path, str]:
    """The directory of a run on two ranks, and what it printed."""
    save = tmp_path_factory.mktemp("finished") / "run"
    return save, stages.succeed("stage1", *argv(folder, save), tp=2)


def test_a_run_logs_its_steps_its_probes_and_its_waits(folder, finished):
    save, printed = finished
    lines = stages.metrics(save)
    reader = CandidateReader(folder / "store")
    recorded = sum(len(document.positions) for document in reader)
    assert sum(line["positions"] for line in stages.steps(save)) == recorded  # once an epoch
    probes = {line["iteration"]: line["probe"] for line in lines if "probe" in line}
    assert list(probes) == [0, 3, 5]
    # Before the first step the model is the one of Stage 0, up to the store's fp16.
    assert probes[0]["outside_mass"] == pytest.approx(probes[0]["base_outside_mass"], abs=1e-3)
    assert probes[0]["full_loss"] > probes[0]["restricted_loss"]
    assert all(0 <= x["data_wait_seconds"] < x["seconds"] for x in stages.steps(save))
    summary, stability = summarize_run(save), lines[-1]["stability"]
    assert f"waited for data for {100 * summary.data_wait_share:.2g} %" in printed
    assert "last tenth of 5 logged steps" in printed
    assert printed.count("restricted head: cpu kernels\n") == 1
    assert (summary.logged, stability["steps"]) == (5, 5)
    for name in ("loss_std", "gradient_norm_cv"):
        assert getattr(summary, name) == stability[name]
    events = EventAccumulator(str(save / "tensorboard")).Reload()
    tags = "loss grad_norm lr probe/outside_mass update/degrees stability/loss_std relative_l2"
    assert set(tags.split()) <= set(events.Tags()["scalars"])
    logged = [event.value for event in events.Scalars("loss")]
    assert logged == pytest.approx(stages.losses(save), rel=1e-6)


def _without_batched_sends(_: int) -> None:
    def refuse(_: object) -> None:
        raise AssertionError("a batched call")

    torch.distributed.batch_isend_irecv = refuse


def test_stages_send_one_by_one_as_in_a_batch(folder, tmp_path):
    two = ["--train-iters", 2, "--probe-interval", 0, "--store", folder / "store"]
    stages.succeed("stage1", *argv(folder, tmp_path / "batched", *two), pp=2)
    one_by_one = argv(folder, tmp_path / "single", *two, "--no-batch-p2p-comm")
    stages.succeed("stage1", *one_by_one, pp=2, before=_without_batched_sends)
    assert weights(tmp_path / "single") == weights(tmp_path / "batched")


def test_drifting_mass_is_warned_of(folder, tmp_path):
    flags = ["--optimizer", "adamw", "--train-epochs", 6]
    out = stages.succeed("stage1", *argv(folder, tmp_path / "run", *flags))
    last = [line["probe"] for line in stages.metrics(tmp_path / "run") if "probe" in line][-1]
    drifted = last["outside_mass"] > 2 * last["base_outside_mass"]
    assert ("outside the candidate sets" in out) == drifted


def always_warn(rank: int) -> None:
    module = importlib.import_module("megatron_replay.training.monitor")  # once megatron may be
    module.drift_warning = lambda reading: "it leaks"


@pytest.mark.parametrize("loss", ["restricted", "full"])
def test_full_softmax_may_move_mass_outside_the_sets(folder, tmp_path, loss):
    flags = ["--loss", loss, "--train-iters", 1]
    out = stages.succeed("stage1", *argv(folder, tmp_path / "run", *flags), before=always_warn)
    assert ("it leaks" in out) == (loss == "restricted")
    assert any("probe" in line for line in stages.metrics(tmp_path / "run"))


def test_a_float16_base_comes_back_as_float16(folder, tmp_path):
    """Trained in fp32 and exported without a flag, in the dtype that it came in."""
    tiny.save_qwen3(tmp_path / "half", tied=True, num_hidden_layers=2)
    config = tmp_path / "half" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float16"}))
    file = tmp_path / "half" / "model.safetensors"
    save_file({name: x.half() for name, x in load_file(file).items()}, file, {"format": "pt"})
    flags = ["--load", tmp_path / "half", "--allow-other-store", "--train-iters", 1]
    stages.succeed("stage1", *argv(folder, tmp_path / "run", *flags))
    stages.convert(tmp_path / "run", tmp_path / "tuned")
    [written] = (tmp_path / "tuned").glob("*.safetensors")
    base, tuned = load_file(file), load_file(written)
    assert {x.dtype for x in tuned.values()} == {torch.float16}
    assert any(not torch.equal(tuned[name], x) for name, x in base.items())


def test_qk_clip_bounds_the_logits_of_a_model_without_qk_norm(tmp_path):
    """A learning rate that moves nothing, so that what changes is QK-Clip's work."""
    tiny.save_llama(tmp_path / "model", tied=False, num_hidden_layers=2)
    tiny.save_corpus(tmp_path / "corpus", num_documents=70)
    fixed = "--loss full --optimizer muonclip --lr 1e-30 --weight-decay 0 --exit-interval 3"
    runs = []
    for name, extra, layout in (
        ("free", "", {}),
        ("one", "--qk-clip-threshold 0.05", {}),
        ("many", "--qk-clip-threshold 0.05", {"tp": 2, "dp": 2}),
        ("bf16", "--qk-clip-threshold 0.05 --bf16", {"pp": 2}),
    ):
        command = argv(tmp_path, tmp_path / name, *fixed.split(), *extra.split())
        stages.succeed("stage1", *command, **layout)
        runs.append(stages.losses(tmp_path / name))
    free, one, many, bf16 = runs
    assert one[0] == pytest.approx(free[0], rel=1e-6)  # the last layer at all positions, or some
    assert abs(one[1] - free[1]) > 1e-5
    assert many == pytest.approx(one, abs=1e-5)
    assert bf16 == pytest.approx(one, abs=2e-2)


def terminate_at_third_step(rank: int) -> None:
    """Rank 0 gets SIGTERM while it computes its third step."""

    def step(number, take_step, *arguments):
        if number == 3 and rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(*arguments)

    stages.replace_step(step)


def test_sigterm_saves_and_the_rerun_loses_nothing(folder, finished, tmp_path):
    command, before = argv(folder, tmp_path / "run"), terminate_at_third_step
    results = stages.run("stage1", *command, tp=2, before=before)
    assert [code for code, _, _ in results] == [130, 130]
    assert "interrupted: stopped after iteration 4 of 5 (SIGTERM); saved" in results[0][2]
    # The step after the signal is the last.
    assert directories.latest_iteration(tmp_path / "run") == 4
    stages.succeed("stage1", *command, tp=2)
    assert weights(tmp_path / "run") == weights(finished[0])


@pytest.mark.parametrize("layout", [{"dp": 2}, {"pp": 2}, {"tp": 2}], ids=str)
def test_a_loss_that_is_not_finite_skips_the_step_on_all(folder, tmp_path, layout):
    """A NaN that no gradient shows, on one rank; its batch is recorded, document by document."""
    save, poison = tmp_path / "run", partial(stages.poison, first=3, last=3, what="loss", on=1)
    out = stages.succeed("stage1", *argv(folder, save), before=poison, **layout)
    assert "iteration 3: the loss of rank 1 is not finite, step skipped (1 so far)" in out
    lines = stages.steps(save)
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 1]
    assert lines[-1]["loss"] > 0
    [record] = read_metrics(save / "skipped_batches.jsonl")
    assert (record["iteration"], record["not_finite"]) == (3, "loss")
    assert [(x["rank"], x["loss"]) for x in record["losses"] if x["loss"] is None] == [(1, None)]
    micro_batches = record["micro_batches"]
    documents = [document for batch in micro_batches for document in batch["documents"]]
    assert len(set(documents)) == len(documents)
    assert CandidateReader(folder / "store").stops()[documents].sum() == lines[2]["tokens"]
    dp_ranks = [batch["dp_rank"] for batch in micro_batches]
    assert dp_ranks == list(range(layout.get("dp", 1))) * (len(dp_ranks) // layout.get("dp", 1))
    assert len(dp_ranks) >= lines[2]["tokens"] / 64


def test_an_unfinished_checkpoint_is_ignored_and_reported(folder, run, tmp_path):
    save = shutil.copytree(run, tmp_path / "run")
    unfinished, unnamed = save / ".iter_0000005.0123abcd.incomplete", save / "iter_0000005"
    unfinished.mkdir()
    (unfinished / "junk").write_text("torn")
    shutil.copytree(save / "iter_0000002", unnamed)  # whole, but not the one that is named
    (unnamed / "junk").write_text("of another life")
    out = stages.succeed("stage1", *argv(folder, save), tp=2)
    assert out.count(f"{unfinished}: ") == out.count(f"{unnamed}: ") == 1
    assert not list(save.glob(".iter_*"))
    assert directories.latest_iteration(save) == 5
    assert not (unnamed / "junk").exists()


def test_print_config_and_dry_run_need_no_ranks(folder, tmp_path, capsys):
    command = [*map(str, argv(folder, tmp_path / "run"))]
    assert stage1.main([*command, "--print-config"]) == 0
    assert "max_angle: 45.0" in capsys.readouterr().out
    store = ["--store", str(tmp_path / "new"), "--dry-run"]
    assert stage0.main([*map(str, inputs(folder)), *store]) == 0
    assert "memory per device" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [(["--no-pack-documents"], 18), (["--train-epochs", "2"], 21), ([], 10)],
)
def test_a_dry_run_predicts_the_iterations(folder, tmp_path, capsys, flags, expected):
    flags = [*flags, "--seq-length", 32]  # at which unread tokens fill a pack
    assert stage1.main([*map(str, argv(folder, tmp_path / "run", *flags)), "--dry-run"]) == 0
    [line] = [x.split() for x in capsys.readouterr().out.splitlines() if "iterations" in x]
    stages.succeed("stage1", *argv(folder, tmp_path / "run", *flags))
    assert int(line[-1]) == len(stages.losses(tmp_path / "run")) == expected


@pytest.mark.parametrize("share", ["--share-prefixes", "--no-share-prefixes"])
def test_a_dry_run_predicts_what_is_computed(folder, tmp_path, monkeypatch, capsys, share):
    """Of a run so short that every step is planned."""
    tiny.save_corpus(tmp_path / "corpus", num_documents=40, stems=3)
    flags = ["--data-path", tmp_path / "corpus", "--loss", "full", "--probe-interval", 0, share]
    command = argv(folder, tmp_path / "run", *flags)
    command[command.index("--store") : command.index("--store") + 2] = []
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        printed = stages.dry_run(capsys, "stage1", *command)
    stages.succeed("stage1", *command, dp=2)
    steps = stages.steps(tmp_path / "run")
    tokens, computed = (sum(x[name] for x in steps) for name in ("tokens", "computed_tokens"))
    assert (computed < 0.9 * tokens) == (share == "--share-prefixes")
    of_step = f"{tokens / len(steps):,.0f}, mean over {len(steps)} of {len(steps)}"
    assert printed["positions of a step"].strip() == of_step
    of_step = f"{computed / len(steps):,.0f} ({computed / tokens:.1%})"
    assert printed["computed"].strip() == of_step


def test_a_dry_run_counts_the_state_that_is_sharded(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = json.loads((folder / "model" / "config.json").read_text())
    config |= {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sizes = []
    for extra in ([], ["--use-distributed-optimizer"]):
        flags = argv(folder, tmp_path / "run", "--load", tmp_path, "--dry-run", *extra)
        assert stage1.main(list(map(str, flags))) == 0
        printed = capsys.readouterr().out
        assert "TP 1 x PP 1 x DP 4 = 4 processes" in printed
        [line] = [x for x in printed.splitlines() if "gradients, masters" in x]
        sizes.append(float(line.split()[-2]))
    # fp32: 4 bytes of gradient and 8 of state, of which a quarter stays.
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.01)
    assert sizes[0] > 0
