"""Every update rule through Stage 1: it resumes bitwise, reshards, changes hands, is refused."""

from __future__ import annotations

import json

import pytest

from megatron_replay.training.metrics import read_metrics
from tests import tiny
from tests.e2e import stages

pytestmark = pytest.mark.distributed

RULES = {
    "moclip": [],
    "moclip zero": ["--obtuse", "zero"],
    "adamw": [],
    "mofo": [],
    "tam": [],
    "adamuon": [],
    "muonclip": [],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoint and a corpus of 6 iterations."""
    folder = tmp_path_factory.mktemp("optimizers")
    tiny.save_corpus(folder / "corpus", num_documents=84)
    tiny.save_qwen3(folder / "model", tied=True, num_hidden_layers=2)
    tiny.save_llama(folder / "llama", tied=False, num_hidden_layers=2)
    return folder


def argv(folder, save, rule, *extra) -> list[object]:
    name = rule.split()[0]
    return [
        "--load", folder / "model", "--data-path", folder / "corpus", "--seq-length", 64,
        "--save", save, "--loss", "full", "--lr", 1e-3, "--global-batch-size", 4,
        "--optimizer", name, *RULES.get(rule, []), *extra,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "extra", "layout"),
    [
        *((rule, [], {"tp": 2}) for rule in RULES if rule not in ("moclip", "adamw")),
        ("moclip", ["--bf16"], {"tp": 2}),
        ("moclip", ["--use-distributed-optimizer"], {"dp": 2}),
        ("mofo", ["--use-distributed-optimizer", "--bf16"], {"dp": 2}),
    ],
)
def test_resuming_is_bitwise(folder, tmp_path, rule, extra, layout):
    stages.succeed("stage1", *argv(folder, tmp_path / "whole", rule, *extra), **layout)
    slice_ = argv(folder, tmp_path / "parts", rule, *extra, "--exit-interval", 3)
    assert {code for code, _, _ in stages.run("stage1", *slice_, **layout)} == {0}
    stages.succeed("stage1", *argv(folder, tmp_path / "parts", rule, *extra), **layout)
    assert len(stages.losses(tmp_path / "whole")) > 4
    assert stages.losses(tmp_path / "parts") == stages.losses(tmp_path / "whole")
    assert stages.weights(tmp_path / "parts") == stages.weights(tmp_path / "whole")


@pytest.mark.parametrize("rule", ["moclip", "mofo", "tam", "adamw"])
def test_a_sharded_optimizer_moves_to_another_layout(folder, tmp_path, rule):
    """TP4 x PP2 x DP1 to TP2 x DP2, and the losses go on as on one process."""
    sharded = ["--use-distributed-optimizer"]
    stages.succeed("stage1", *argv(folder, tmp_path / "one", rule))
    first = argv(folder, tmp_path / "many", rule, *sharded, "--exit-interval", 3)
    stages.run("stage1", *first, tp=4, pp=2)
    stages.succeed("stage1", *argv(folder, tmp_path / "many", rule, *sharded), tp=2, dp=2)
    expected = stages.losses(tmp_path / "one")
    assert stages.losses(tmp_path / "many") == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("extra", [[], ["--use-distributed-optimizer"]])
def test_adamws_checkpoint_goes_on_under_moclip_and_back(folder, tmp_path, extra):
    save = tmp_path / "run"
    for rule, iterations in (("adamw", 2), ("moclip", 4), ("adamw", 6)):
        stages.succeed("stage1", *argv(folder, save, rule, *extra, "--exit-interval", iterations))
    lines = [line for line in read_metrics(save / "metrics.jsonl") if "loss" in line]
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6]
    angles = [line["update"].get("momentum_over_grad_norm") for line in lines]
    # MoClip's first step finds AdamW's momentum: not none, as it would be at a start.
    assert angles[:2] == [None, None]
    assert angles[4:] == [None, None]
    assert min(angles[2:4]) > 0
    stages.succeed("stage1", *argv(folder, tmp_path / "alone", "adamw", *extra))
    assert stages.losses(tmp_path / "alone")[:2] == stages.losses(save)[:2]


def test_what_a_resumed_run_is_given_wins(folder, tmp_path):
    save = tmp_path / "run"
    stages.succeed("stage1", *argv(folder, save, "moclip", "--exit-interval", 3))
    changed = ["--lr", 1e-5, "--max-angle", 90, "--adam-beta1", 0.5, "--lr-decay-style", "constant"]
    stages.succeed("stage1", *argv(folder, save, "moclip", *changed, "--exit-interval", 4))
    lines = [line for line in read_metrics(save / "metrics.jsonl") if "loss" in line]
    assert lines[3]["lr"] == 1e-5
    if lines[3]["update"]["degrees"] < 90:
        assert lines[3]["update"]["clipped"] == 0


class TestMistakes:
    """Each gives one line and its exit code."""

    def test_state_of_another_kind(self, folder, tmp_path):
        save = tmp_path / "run"
        stages.run("stage1", *argv(folder, save, "adamw", "--exit-interval", 1))
        message = stages.fail("stage1", *argv(folder, save, "muonclip"), code=2)
        assert "another --optimizer (expected adam; found muonclip)" in message

    def test_state_sharded_or_not(self, folder, tmp_path):
        save = tmp_path / "run"
        stages.run("stage1", *argv(folder, save, "adamw", "--exit-interval", 1))
        extra = ["--use-distributed-optimizer"]
        message = stages.fail("stage1", *argv(folder, save, "adamw", *extra), code=2)
        assert "another --use-distributed-optimizer (expected False; found True)" in message

    def test_qk_clip_of_a_model_with_qk_norm(self, folder, tmp_path):
        extra = ["--qk-clip-threshold", 100]
        message = stages.fail("stage1", *argv(folder, tmp_path / "run", "muonclip", *extra), code=2)
        assert "QK-norm undoes any scaling" in message

    @pytest.mark.parametrize(
        ("rule", "extra", "reason"),
        [
            ("adamuon", ["--use-distributed-optimizer"], "orthogonalises whole matrices"),
            ("muonclip", ["--use-distributed-optimizer"], "orthogonalises whole matrices"),
            ("adamw", ["--max-angle", 30], "45.0, as only --optimizer moclip uses it"),
            (
                "moclip",
                ["--angle-scope", "tensor", "--obtuse", "zero"],
                "obtuse steps of the whole model",
            ),
            ("sgd", [], "one of moclip, adamw, mofo, tam, adamuon, muonclip"),
        ],
    )
    def test_what_cannot_be_had_together(self, folder, tmp_path, rule, extra, reason):
        message = stages.fail("stage1", *argv(folder, tmp_path / "run", rule, *extra), code=2)
        assert reason in message


def test_qk_clip_bounds_the_logits_of_a_model_without_qk_norm(folder, tmp_path):
    """A learning rate that moves nothing, so that what changes is QK-Clip's work."""
    extra = ["--load", folder / "llama", "--lr", 1e-30, "--weight-decay", 0]
    for name, threshold, layout in (
        ("free", [], {}),
        ("one", ["--qk-clip-threshold", 0.05], {}),
        ("many", ["--qk-clip-threshold", 0.05], {"tp": 2, "dp": 2}),
        ("bf16", ["--qk-clip-threshold", 0.05, "--bf16"], {"pp": 2}),
    ):
        flags = [*extra, *threshold, "--exit-interval", 3]
        stages.succeed("stage1", *argv(folder, tmp_path / name, "muonclip", *flags), **layout)
    free, one, many, bf16 = (
        stages.losses(tmp_path / name) for name in ("free", "one", "many", "bf16")
    )
    assert one[0] == pytest.approx(free[0], rel=1e-6)  # the last layer at all positions, or some
    assert abs(one[1] - free[1]) > 1e-5
    assert many == pytest.approx(one, abs=1e-5)
    assert bf16 == pytest.approx(one, abs=2e-2)


def test_the_estimate_knows_that_state_is_sharded(folder, tmp_path, monkeypatch, capsys):
    from megatron_replay import stage1

    monkeypatch.setenv("WORLD_SIZE", "4")
    config = json.loads((folder / "model" / "config.json").read_text())
    config |= {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sizes = []
    for extra in ([], ["--use-distributed-optimizer"]):
        flags = argv(folder, tmp_path / "run", "adamw", "--load", tmp_path, "--dry-run", *extra)
        assert stage1.main(list(map(str, flags))) == 0
        [line] = [x for x in capsys.readouterr().out.splitlines() if "gradients, masters" in x]
        sizes.append(float(line.split()[-2]))
    assert sizes[0] > 0
    # fp32: 4 bytes of gradient and 8 of state, of which a quarter stays.
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.01)
