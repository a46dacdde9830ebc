"""A run's readings and warnings: equal to independent measurements, unchanged by a stop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_replay.data.corpus import Corpus
from megatron_replay.run_log import summarize_run
from megatron_replay.training import metrics
from megatron_replay.training.readings import drift_warning
from tests import tiny
from tests.e2e import stages

pytestmark = pytest.mark.distributed
SEQ_LENGTH = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoint, training corpus, and general text with documents longer than a pack."""
    folder = tmp_path_factory.mktemp("watch")
    stages.prepare(folder, documents=60, longest=SEQ_LENGTH, store=False)
    tiny.save_corpus(folder / "general", num_documents=30, seed=7, longest=2 * SEQ_LENGTH)
    return folder


def argv(folder, save, *extra) -> list[object]:
    fixed = ["--seq-length", SEQ_LENGTH, "--micro-batch-size", 2, "--loss", "full", "--lr", 1e-2]
    fixed += ["--optimizer", "adamw", "--probe-interval", 500]
    return stages.argv(folder, save, *fixed, *extra)


def general(folder) -> list[object]:
    sample = ["--general-data-path", folder / "general", "--probe-documents", 30]
    return [*sample, "--probe-interval", 4]


def lines_without_time(save) -> list[dict]:
    return [
        {key: value for key, value in line.items() if not key.endswith("seconds")}
        for line in stages.metrics(save)
    ]


def perplexity(model_directory, prefix) -> float:
    """transformers' own, document by document, in float64 from the logits on."""
    model, total, count = tiny.load_reference(model_directory), 0.0, 0
    for document in (Corpus(prefix)[i] for i in range(len(Corpus(prefix)))):
        tokens = torch.from_numpy(document.tokens[: SEQ_LENGTH + 1].astype("int64"))
        carries_loss = torch.from_numpy(document.loss_mask[1 : SEQ_LENGTH + 1].copy())
        with torch.no_grad():
            logits = model(tokens[None, :-1]).logits[0].double()
        losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
        total, count = total + losses[carries_loss].sum().item(), count + int(carries_loss.sum())
    return math.exp(total / count)


def relative_l2(tuned, base) -> float:
    """numpy's, over the exported tensors; a tied head is not among them."""
    held = [load_file(next(directory.glob("*.safetensors"))) for directory in (tuned, base)]
    theta, start = (np.concatenate([x[name].ravel() for name in sorted(x)]) for x in held)
    moved = theta.astype(np.float64) - start
    return math.sqrt((moved**2).sum() / (start.astype(np.float64) ** 2).sum())


@pytest.mark.parametrize(
    ("extra", "layout"),
    [(["--sequence-parallel"], {"tp": 2}), (["--use-distributed-optimizer"], {"pp": 2, "dp": 2})],
    ids=str,
)
def test_distance_and_forgetting_are_those_of_the_exported_model(folder, tmp_path, extra, layout):
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    flags = ["--train-iters", 6, *general(folder), *extra]
    printed = stages.succeed("stage1", *argv(folder, run, *flags), **layout)
    assert "only the first 20 positions are scored" in printed
    stages.convert(run, tuned, "--no-verify")
    lines = stages.metrics(run)
    readings = {line["iteration"]: line["general"] for line in lines if "general" in line}
    assert list(readings) == [0, 4, 6]
    assert readings[0]["delta_ppl"] == 0.0
    before, after = (perplexity(d, folder / "general") for d in (folder / "model", tuned))
    assert readings[0]["perplexity"] == pytest.approx(before, rel=1e-5)
    assert readings[6]["perplexity"] == pytest.approx(after, rel=1e-5)
    assert readings[6]["delta_ppl"] == pytest.approx(after - before, abs=1e-2)
    assert abs(after - before) > 1
    [found] = [line["relative_l2"] for line in lines if "relative_l2" in line]
    assert found == pytest.approx(relative_l2(tuned, folder / "model"), rel=1e-6)
    assert f"Relative L2 from the first weights: {100 * found:.3g} %." in printed
    summary, last = summarize_run(run), readings[6]
    assert (summary.general_perplexity, summary.delta_ppl) == (
        last["perplexity"],
        last["delta_ppl"],
    )
    assert "loss_spikes" not in printed  # nothing but sentences is printed


def test_a_resumed_run_logs_what_an_uninterrupted_one_does(folder, tmp_path):
    flags = ["--train-iters", 12, "--lr-warmup-iters", 5, "--log-interval", 2, *general(folder)]
    stages.succeed("stage1", *argv(folder, tmp_path / "whole", *flags))
    stages.succeed("stage1", *argv(folder, tmp_path / "parts", *flags, "--exit-interval", 7))
    stages.succeed("stage1", *argv(folder, tmp_path / "parts", *flags))
    lines = lines_without_time(tmp_path / "whole")
    assert lines_without_time(tmp_path / "parts") == lines
    assert [x["iteration"] for x in lines if "stability" in x] == [4, 8, 12]
    assert [x["iteration"] for x in lines if "relative_l2" in x] == [12]
    assert lines[-1]["stability"]["steps"] == 6
    assert lines[-1]["general"]["delta_ppl"] != 0.0


def test_a_training_checkpoint_may_be_the_start(folder, tmp_path):
    flags = ["--train-iters", 3]
    stages.succeed("stage1", *argv(folder, tmp_path / "first", *flags))
    extra = [*flags, "--load", tmp_path / "first", "--bf16"]
    stages.succeed("stage1", *argv(folder, tmp_path / "second", *extra), tp=2)
    last = stages.metrics(tmp_path / "second")[-1]
    assert 0.001 < last["relative_l2"] < 0.5
    # A run goes on from its own directory, but the weights it started from are not there.
    extra = ["--train-iters", 5, "--load", tmp_path / "first"]
    printed = stages.succeed("stage1", *argv(folder, tmp_path / "first", *extra))
    assert "warning: iteration 5: relative L2 was not measured" in printed
    last = stages.metrics(tmp_path / "first")[-1]
    assert last["stability"]["steps"] == 5
    assert "relative_l2" not in last


def spike_at_step_135(rank: int) -> None:
    """Every update is too small, too, so that it is warned of."""
    metrics.UPDATE_LIMIT = math.inf

    def step(number, take_step, model, optimizer, work, *rest):
        if number == 135:
            work = [w._replace(head=lambda h, v, f=w.head: 1e3 * f(h, v)) for w in work]
        return take_step(model, optimizer, work, *rest)

    stages.replace_step(step)


def test_warnings_come_when_their_cause_does(folder, tmp_path):
    flags = ["--train-iters", 140, "--lr", 1e-4, "--global-batch-size", 2]
    command = argv(folder, tmp_path / "run", *flags)
    printed = stages.succeed("stage1", *command, before=spike_at_step_135)
    warned = [line for line in printed.splitlines() if line.startswith("warning:")]
    assert [" ".join(line.split()[1:6]) for line in warned] == [
        "iteration 50: the weights hardly",
        "iteration 135: loss spikes to",
        "iteration 135: gradient norm spikes",
    ]
    assert "1 loss and 1 gradient-norm spikes after the first 128 steps" in printed
    lines = stages.metrics(tmp_path / "run")
    [marked] = [line for line in lines if "spike_above" in line]
    assert marked["iteration"] == 135
    assert marked["loss"] > marked["spike_above"]["loss"] > lines[0]["loss"] / 2
    assert marked["grad_norm"] > marked["spike_above"]["gradient"] > 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("spike_above/loss")] == [135]
    summary = summarize_run(tmp_path / "run")
    assert (summary.loss_spikes, summary.loss_spike_rate) == (1, 1 / 12)
    assert (summary.gradient_spikes, summary.gradient_spike_rate) == (1, 1 / 12)


def test_mass_outside_the_sets_is_warned_of_beyond_twice_and_two_points_above_the_base():
    reading = {"restricted_loss": 0.1, "full_loss": 0.5}
    for base, outside, warns in (
        (0.001, 0.0209, False), (0.001, 0.0211, True), (0.1, 0.199, False), (0.1, 0.201, True),
    ):  # fmt: skip
        warning = drift_warning(reading | {"base_outside_mass": base, "outside_mass": outside})
        assert bool(warning) == warns
        assert not warns or f"{100 * outside:.1f} % of the probability" in warning
