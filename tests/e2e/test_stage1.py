"""Stage 1 as a program: it resumes bitwise, stops when asked, and says what it sees."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_replay.checkpoint import training
from megatron_replay.store import CandidateReader
from megatron_replay.training.metrics import read_metrics
from tests import tiny
from tests.e2e import stages
from tests.e2e.stages import argv, weights

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> Path:
    """The directory of a run with nothing out of the ordinary, on two ranks."""
    save = tmp_path_factory.mktemp("finished") / "run"
    stages.succeed("stage1", *argv(folder, save), tp=2)
    return save


@pytest.mark.parametrize(
    "extra",
    [
        ["--optimizer", "moclip"],
        ["--optimizer", "adamw", "--loss", "full"],
        "--candidate-scope document --tail ghost --train-epochs 2".split(),
    ],
)
def test_resuming_is_bitwise(folder, tmp_path, extra):
    """Stop in the middle (of epoch 2 in the last case), run the same command: nothing changed."""
    stages.succeed("stage1", *argv(folder, tmp_path / "whole", *extra), tp=2)
    total = len(stages.losses(tmp_path / "whole"))
    slice_ = argv(folder, tmp_path / "parts", *extra, "--exit-interval", total * 2 // 3)
    [code, *_] = [code for code, _, _ in stages.run("stage1", *slice_, tp=2)]
    assert code == 0  # a planned stop is a success
    assert len(stages.losses(tmp_path / "parts")) == total * 2 // 3
    said = stages.succeed("stage1", *argv(folder, tmp_path / "parts", *extra), tp=2)
    assert "resuming" in said
    assert stages.losses(tmp_path / "parts") == stages.losses(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_exit_interval_stops_at_its_multiples(folder, tmp_path):
    """As Megatron's does, wherever the run was resumed: after 3 of 5, every 2 is after 4."""
    for interval, reached in ((3, 3), (2, 4), (2, 5)):
        flags = argv(folder, tmp_path / "run", "--exit-interval", interval)
        stages.succeed("stage1", *flags)
        assert training.latest_iteration(tmp_path / "run") == reached


def test_a_float16_base_comes_back_as_float16(folder, tmp_path):
    """Trained in fp32 and exported without a flag, in the dtype that it came in."""
    tiny.save_qwen3(tmp_path / "half", tied=True, num_hidden_layers=2)
    config = tmp_path / "half" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float16"}))
    file = tmp_path / "half" / "model.safetensors"
    save_file({name: x.half() for name, x in load_file(file).items()}, file, {"format": "pt"})
    flags = ["--load", tmp_path / "half", "--allow-other-store"]
    stages.succeed("stage1", *argv(folder, tmp_path / "run", *flags))
    stages.convert(tmp_path / "run", tmp_path / "tuned")
    [written] = (tmp_path / "tuned").glob("*.safetensors")
    base, tuned = load_file(file), load_file(written)
    assert {x.dtype for x in tuned.values()} == {torch.float16}
    assert any(not torch.equal(tuned[name], x) for name, x in base.items())


def test_a_finished_run_is_left_alone(folder, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    said = stages.succeed("stage1", *argv(folder, tmp_path / "run"), tp=2)
    assert "is finished" in said
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_an_epoch_sees_every_recorded_position_once(folder, tmp_path):
    stages.succeed("stage1", *argv(folder, tmp_path / "run"), dp=2)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    reader = CandidateReader(folder / "store")
    recorded = sum(len(reader[i].positions) for i in range(len(reader)))
    assert sum(line.get("positions", 0) for line in lines) == recorded


def test_a_store_serves_any_packing(folder, tmp_path):
    """Packs of 64 made the store; packs of 48 and 96 train on the same sets, so start alike."""
    starts = []
    for length in (48, 64, 96):
        extra = ["--seq-length", length, "--global-batch-size", 40, "--tail", "ghost"]
        stages.succeed("stage1", *argv(folder, tmp_path / str(length), *extra))
        starts.append(read_metrics(tmp_path / str(length) / "metrics.jsonl")[1])
    assert len({line["positions"] for line in starts}) == 1  # the whole corpus in one batch
    assert [line["loss"] for line in starts] == pytest.approx([starts[0]["loss"]] * 3, abs=2e-6)


def test_bf16_trains_fp32_masters(folder, tmp_path):
    """A learning rate below bf16's resolution still moves the masters: the loss falls."""
    flags = ["--bf16", "--train-epochs", 2]
    stages.succeed("stage1", *argv(folder, tmp_path / "whole", *flags), tp=2)
    losses = stages.losses(tmp_path / "whole")
    assert losses[-1] < losses[0]
    slice_ = argv(folder, tmp_path / "parts", *flags, "--exit-interval", 3)
    stages.succeed("stage1", *slice_, tp=2)
    stages.succeed("stage1", *argv(folder, tmp_path / "parts", *flags), tp=2)
    assert stages.losses(tmp_path / "parts") == losses


def _signal_at_third_step(rank: int) -> None:
    """Rank 0 gets SIGTERM while it computes its third step."""
    from megatron_replay.training import train

    take_step, calls = train.train_step, itertools.count(1)

    def step(*args, **kwargs):
        if next(calls) == 3 and rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(*args, **kwargs)

    train.train_step = step


def test_sigterm_saves_and_the_rerun_loses_nothing(folder, finished, tmp_path):
    results = stages.run(
        "stage1", *argv(folder, tmp_path / "run"), tp=2, before=_signal_at_third_step
    )
    assert [code for code, _, _ in results] == [130, 130]
    assert "SIGTERM" in results[0][2]
    assert training.latest_iteration(tmp_path / "run") == 4  # the step after the signal is the last
    stages.succeed("stage1", *argv(folder, tmp_path / "run"), tp=2)
    assert weights(tmp_path / "run") == weights(finished)


def _poison(rank: int, what: str, last: int = 3) -> None:
    """In steps 3 to ``last`` rank 1's loss, its gradient, or both are NaN."""
    from megatron_replay.training import train

    take_step = train.train_step

    def gradient(loss):
        loss.register_hook(lambda grad: grad * math.nan)
        return loss

    poisons = {
        "both": lambda loss: loss * math.nan,
        "loss": lambda loss: loss + math.nan,
        "gradient": gradient,
    }

    def step(model, optimizer, work, *args, **kwargs):
        step.calls += 1
        if 3 <= step.calls <= last and rank == 1:
            f, poison = work[0].head, poisons[what]
            work = [work[0]._replace(head=lambda h, w: poison(f(h, w))), *work[1:]]
        return take_step(model, optimizer, work, *args, **kwargs)

    step.calls = 0
    train.train_step = step


@pytest.mark.parametrize("layout", [{"dp": 2}, {"pp": 2}, {"tp": 2}], ids=str)
def test_a_loss_that_is_not_finite_skips_the_step_on_all(folder, tmp_path, layout):
    """A NaN that no gradient shows, on one rank; its batch is recorded, document by document."""
    said = stages.succeed(
        "stage1", *argv(folder, tmp_path / "run"), before=partial(_poison, what="loss"), **layout
    )
    assert "iteration 3: the loss of rank 1 is not finite, step skipped (1 so far)" in said
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 1]
    assert lines[-1]["loss"] > 0
    [record] = read_metrics(tmp_path / "run" / "skipped_batches.jsonl")
    assert (record["iteration"], record["not_finite"]) == (3, "loss")
    assert [(x["rank"], x["loss"]) for x in record["losses"] if x["loss"] is None] == [(1, None)]
    held = [d["document"] for pack in record["packs"] for d in pack["documents"]]
    assert len(set(held)) == len(held)
    ends = [pack["documents"][-1]["positions"][1] for pack in record["packs"]]
    assert sum(ends) == lines[2]["tokens"]
    dp = layout.get("dp", 1)
    assert [pack["dp_rank"] for pack in record["packs"]] == [i % dp for i in range(4)]


@pytest.mark.parametrize(("what", "named"), [("both", "loss"), ("gradient", "gradient")])
def test_too_many_skipped_steps_end_the_run(folder, tmp_path, what, named):
    extra = ["--train-iters", 15, "--save-interval", 2]
    message = stages.fail(
        "stage1", *argv(folder, tmp_path / "run", *extra),
        dp=2, before=partial(_poison, what=what, last=99), code=7,
    )  # fmt: skip
    assert "11 steps were skipped" in message
    assert "expected at most 10" in message
    assert "skipped_batches.jsonl" in message
    assert f"the last good checkpoint is {tmp_path / 'run' / 'iter_0000004'}" in message
    records = read_metrics(tmp_path / "run" / "skipped_batches.jsonl")
    assert [record["iteration"] for record in records] == list(range(3, 14))
    assert {record["not_finite"] for record in records} == {named}
    # The resumed run repeats the steps after the checkpoint, and drops their records.
    stages.succeed("stage1", *argv(folder, tmp_path / "run", *extra), dp=2)
    assert read_metrics(tmp_path / "run" / "skipped_batches.jsonl") == records[:2]
    assert len(stages.losses(tmp_path / "run")) == 15


def test_the_probe_and_tensorboard(finished):
    lines = read_metrics(finished / "metrics.jsonl")
    probes = {line["iteration"]: line["probe"] for line in lines if "probe" in line}
    assert 0 in probes
    assert max(probes) == lines[-1]["iteration"]
    at_start = probes[0]
    # Before the first step the model is the one of Stage 0, up to the store's fp16.
    assert at_start["outside_mass"] == pytest.approx(at_start["base_outside_mass"], abs=1e-3)
    assert at_start["full_loss"] > at_start["restricted_loss"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard")).Reload()
    assert {
        "loss", "grad_norm", "lr", "probe/outside_mass", "update/degrees", "update/obtuse",
        "stability/loss_std", "relative_l2",
    } <= set(events.Tags()["scalars"])  # fmt: skip
    logged = [event.value for event in events.Scalars("loss")]
    assert logged == pytest.approx(stages.losses(finished), rel=1e-6)


def test_drifting_mass_is_warned_of(folder, tmp_path):
    said = stages.succeed(
        "stage1", *argv(folder, tmp_path / "run", "--optimizer", "adamw", "--train-epochs", 6)
    )
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    last = [line["probe"] for line in lines if "probe" in line][-1]
    drifted = last["outside_mass"] > 2 * last["base_outside_mass"]
    assert ("is outside the candidate sets" in said) == drifted


def test_an_unfinished_checkpoint_is_ignored_and_said(folder, tmp_path):
    save = tmp_path / "run"
    stages.run("stage1", *argv(folder, save, "--exit-interval", 2))
    (save / ".iter_0000005.0123abcd.incomplete").mkdir()
    (save / ".iter_0000005.0123abcd.incomplete" / "junk").write_text("torn")
    shutil.copytree(save / "iter_0000002", save / "iter_0000005")  # whole, but not named
    (save / "iter_0000005" / "junk").write_text("of another life")
    said = stages.succeed("stage1", *argv(folder, save), tp=2)
    for name, what in (
        (
            ".iter_0000005.0123abcd.incomplete",
            "an unfinished save: ignored, removed at the next",
        ),
        ("iter_0000005", "newer than latest_checkpointed_iteration.txt says: ignored, replaced"),
    ):
        assert said.count(f"{save / name}: {what}") == 1
    assert not list(save.glob(".iter_*"))
    assert training.latest_iteration(save) == 5
    assert not (save / "iter_0000005" / "junk").exists()
