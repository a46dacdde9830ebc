"""A run that stops and goes on, on the same layout or another, is the run that never stopped."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import yaml

from megatron_replay.checkpoint import directories
from megatron_replay.checkpoint.hf import HFReader
from megatron_replay.model.config import ModelConfig
from megatron_replay.training import train
from tests import tiny
from tests.e2e import stages
from tests.e2e.stages import argv

pytestmark = pytest.mark.distributed
SHARDED = "--use-distributed-optimizer"

#: Flags and layout; tests/optim has the state of every rule. Runs of two epochs stop in the second.
RESUMED = [
    ("--candidate-scope document --tail ghost --train-epochs 2", {"tp": 2}),
    ("--bf16 --train-epochs 2", {"tp": 2}),
    ("--loss full --save-interval 2 --train-epochs 2", {}),
    ("--loss full --obtuse zero", {"tp": 2}),
    ("--loss full --optimizer mofo", {"tp": 2}),
    ("--loss full --optimizer muonclip", {"tp": 2}),
    (f"--loss full --optimizer mofo --bf16 {SHARDED}", {"dp": 2}),
]


def print_loaders(rank: int) -> None:
    """Print the loader's threads that are left when training has ended."""
    original = train.train

    def printing(run, stop):
        original(run, stop)
        print("loaders:", [t.name for t in threading.enumerate() if t.name.startswith("loader")])

    train.train = printing


@pytest.mark.parametrize(("flags", "layout"), RESUMED)
def test_resuming_is_bitwise(folder, tmp_path, flags, layout):
    """A planned stop is a success, and batches made ahead of it are made again."""
    whole, parts, flags = tmp_path / "whole", tmp_path / "parts", flags.split()
    stages.succeed("stage1", *argv(folder, whole, *flags), **layout)
    losses = stages.losses(whole)
    assert len(losses) > (5 if "--train-epochs" in flags else 4)
    stop = len(losses) * 2 // 3
    stages.succeed("stage1", *argv(folder, parts, *flags, "--exit-interval", stop), **layout)
    assert stages.losses(parts) == losses[:stop]
    out = stages.succeed("stage1", *argv(folder, parts, *flags), before=print_loaders, **layout)
    assert f"resuming {parts} after iteration {stop}" in out
    assert "loaders: []" in out
    if "document" in flags:
        assert "restricted head: cpu kernels, by dense products" in out
    assert stages.losses(parts) == losses
    assert stages.weights(parts) == stages.weights(whole)
    if flags[0] == "--bf16":
        assert losses[-1] < losses[0]  # fp32 masters move at rates below bf16's resolution


#: Flags, layouts of the first three iterations and of the rest.
MOVED = [
    ("", {"tp": 4, "pp": 2}, {"tp": 2}),
    ("--no-pack-documents", {}, {"dp": 4}),
    ("--tail ghost --kl-weight 0.5", {"tp": 2}, {"dp": 2}),
    *(
        (f"--loss full --optimizer {rule} {SHARDED}", {"tp": 4, "pp": 2}, {"tp": 2, "dp": 2})
        for rule in ("moclip", "mofo")
    ),
]


@pytest.mark.parametrize(("flags", "first", "then"), MOVED)
def test_a_checkpoint_moves_to_another_layout(folder, tmp_path, flags, first, then):
    """Every batch has the same documents, and the losses are those of one process."""
    one, many, flags = tmp_path / "one", tmp_path / "many", flags.split()
    stages.succeed("stage1", *argv(folder, one, *(flag for flag in flags if flag != SHARDED)))
    stages.succeed("stage1", *argv(folder, many, *flags, "--exit-interval", 3), **first)
    stages.succeed("stage1", *argv(folder, many, *flags), **then)
    ours, expected = (
        [(x["tokens"], x["positions"], x["loss"]) for x in stages.steps(save)]
        for save in (many, one)
    )
    assert [x[:2] for x in ours] == [x[:2] for x in expected]
    assert [x[2] for x in ours] == pytest.approx([x[2] for x in expected], abs=2e-5)


@pytest.mark.parametrize("extra", [[], [SHARDED, "--bf16"]])
def test_padding_and_stages_move_to_another_layout(tmp_path, extra):
    """Of 513 tokens, the last of 2 ranks has one row of padding, of 4 ranks three; of 3 layers, the
    first of 2 stages has two. A padding row that counted would change the loss by a part in 513.
    """
    tiny.save_corpus(tmp_path / "corpus", num_documents=70)
    tiny.save_qwen2(tmp_path / "model", tied=False, num_hidden_layers=3, vocab_size=513)
    one, many, flags = tmp_path / "one", tmp_path / "many", ["--loss", "full", *extra]
    stages.succeed("stage1", *argv(tmp_path, one, *(flag for flag in flags if flag != SHARDED)))
    for stop, layout in ((2, {"tp": 2, "pp": 2}), (4, {"tp": 4}), (5, {"dp": 2})):
        stages.succeed("stage1", *argv(tmp_path, many, *flags, "--exit-interval", stop), **layout)
    assert len(stages.losses(one)) == 5
    near = 2e-2 if "--bf16" in extra else 1e-4
    assert stages.losses(many) == pytest.approx(stages.losses(one), abs=near)
    stages.convert(many, tmp_path / "tuned")
    HFReader(tmp_path / "tuned").check(ModelConfig.from_hf(tmp_path / "model"))


#: Two epochs, and where a run stops in the second; neither 2 nor 4 divides the packs of a step.
GROUPED = ["--group-prefixes", 4, "--global-batch-size", 3, "--train-epochs", 2]
STOP = 11


@pytest.fixture(scope="module")
def grouped(tmp_path_factory) -> Path:
    """Documents that share prefixes, and a run on them that stops in its second epoch."""
    folder = stages.prepare(tmp_path_factory.mktemp("grouped"), longest=12, stems=6)
    stages.succeed("stage1", *argv(folder, folder / "whole", *GROUPED))
    stages.succeed("stage1", *argv(folder, folder / "parts", *GROUPED, "--exit-interval", STOP))
    return folder


def test_grouped_documents_resume_bitwise(grouped, tmp_path):
    save = shutil.copytree(grouped / "parts", tmp_path / "run")
    whole = stages.steps(grouped / "whole")
    assert len(whole) // 2 < STOP < len(whole)
    printed = stages.succeed("stage1", *argv(grouped, save, *GROUPED))
    computed, tokens = (sum(x[name] for x in whole) for name in ("computed_tokens", "tokens"))
    assert f"Shared prefixes: {100 * computed / tokens:.1f} % of the tokens" in printed
    assert stages.losses(save) == stages.losses(grouped / "whole")
    assert stages.weights(save) == stages.weights(grouped / "whole")


def test_steps_have_the_same_documents_wherever_and_however_they_are_computed(grouped, tmp_path):
    """On other numbers of replicas, and from the stop on with no prefix shared."""
    save, whole = tmp_path / "run", stages.steps(grouped / "whole")
    stages.succeed("stage1", *argv(grouped, save, *GROUPED, "--exit-interval", STOP), dp=2)
    alone = [*GROUPED, "--no-share-prefixes"]
    printed = stages.succeed("stage1", *argv(grouped, save, *alone), dp=4)
    assert "--share-prefixes True -> False" in printed
    ours = stages.steps(save)
    for name in ("tokens", "positions"):
        assert [line[name] for line in ours] == [line[name] for line in whole]
    assert stages.losses(save) == pytest.approx(stages.losses(grouped / "whole"), abs=2e-5)
    assert all(line["computed_tokens"] < line["tokens"] for line in ours[:STOP])
    assert all(line["computed_tokens"] == line["tokens"] for line in ours[STOP:])


def test_another_order_of_documents_is_refused(grouped):
    message = stages.fail(
        "stage1", *argv(grouped, grouped / "parts", *GROUPED, "--group-prefixes", 8), code=2
    )
    assert "--group-prefixes (expected 4; found 8)" in message


def test_exit_interval_stops_at_its_multiples(folder, tmp_path):
    """As Megatron's does, wherever the run was resumed: after 3 of 5, every 2 is after 4."""
    for interval, reached in ((3, 3), (2, 4), (2, 5)):
        stages.succeed("stage1", *argv(folder, tmp_path / "run", "--exit-interval", interval))
        assert directories.latest_iteration(tmp_path / "run") == reached
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    printed = stages.succeed("stage1", *argv(folder, tmp_path / "run", "--weight-decay", 0.5), tp=2)
    assert "is finished" in printed
    assert "-> 0.5, which has no effect" in printed
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize("extra", [[], [SHARDED]])
def test_adamws_checkpoint_continues_under_moclip_and_back(folder, tmp_path, extra):
    save, flags = tmp_path / "run", ["--loss", "full", *extra]
    for rule, stop in (("adamw", 2), ("moclip", 4), ("adamw", 5)):
        rule_flags = ["--optimizer", rule, "--exit-interval", stop]
        stages.succeed("stage1", *argv(folder, save, *flags, *rule_flags))
    assert [line["iteration"] for line in stages.steps(save)] == [1, 2, 3, 4, 5]
    ratios = [line["update"].get("momentum_over_grad_norm") for line in stages.steps(save)]
    assert [ratio is None for ratio in ratios] == [True, True, False, False, True]
    assert min(ratios[2:4]) > 0  # MoClip's first step finds AdamW's momentum: at a start it is 0
    stages.succeed("stage1", *argv(folder, tmp_path / "alone", *flags, "--optimizer", "adamw"))
    assert stages.losses(tmp_path / "alone")[:2] == stages.losses(save)[:2]


def test_a_changed_setting_is_used_and_reported(folder, tmp_path):
    """resolved_config.yaml holds what the steps were taken with; a run without steps keeps it."""
    save, flags = tmp_path / "run", ["--loss", "full", "--train-iters", 4]

    def recorded() -> float:
        return yaml.safe_load((save / "resolved_config.yaml").read_text())["optimizer"]["lr"]

    first = stages.succeed("stage1", *argv(folder, save, *flags, "--exit-interval", 3))
    assert "changed" not in first
    changed = ["--lr", 1e-5, "--max-angle", 90, "--lr-decay-style", "constant"]
    out = stages.succeed("stage1", *argv(folder, save, *flags, *changed))
    assert "--lr 0.001 -> 1e-05" in out
    assert "--max-angle 45.0 -> 90.0" in out
    last = stages.steps(save)[-1]
    assert (last["lr"], recorded()) == (1e-5, 1e-5)
    if last["update"]["degrees"] < 90:
        assert last["update"]["clipped"] == 0
    assert "iterations are done" in stages.succeed("stage1", *argv(folder, save, *flags))
    stages.fail("stage1", *argv(folder, save, *flags, "--seed", 5), code=2)
    assert recorded() == 1e-5
