"""Stage 1 on many layouts: the same losses, whatever the grid, the head, and where it stopped."""

from __future__ import annotations

import pytest

from megatron_replay.run_log import summarize_run
from megatron_replay.training.metrics import read_metrics
from tests.e2e import stages
from tests.e2e.stages import argv

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("optimizer", ["moclip", "adamw"])
def test_a_checkpoint_of_eight_ranks_continues_on_two(folder, tmp_path, optimizer):
    flags = ["--optimizer", optimizer]
    stages.succeed("stage1", *argv(folder, tmp_path / "one", *flags))
    total = len(stages.losses(tmp_path / "one"))
    stages.run("stage1", *argv(folder, tmp_path / "many", *flags, "--exit-interval", 3), tp=4, pp=2)
    stages.succeed("stage1", *argv(folder, tmp_path / "many", *flags), tp=2)
    assert len(stages.losses(tmp_path / "many")) == total
    assert stages.losses(tmp_path / "many") == pytest.approx(
        stages.losses(tmp_path / "one"), abs=1e-5
    )


@pytest.mark.parametrize("flags", [[], ["--no-pack-documents"]], ids=str)
def test_another_number_of_replicas_goes_on_in_the_same_order(folder, tmp_path, flags):
    """One replica, then four: each batch has the same positions, and the same loss."""
    stages.succeed("stage1", *argv(folder, tmp_path / "one", *flags))
    stages.run("stage1", *argv(folder, tmp_path / "many", *flags, "--exit-interval", 2))
    stages.succeed("stage1", *argv(folder, tmp_path / "many", *flags), dp=4)

    def batches(save):
        lines = read_metrics(save / "metrics.jsonl")
        return [(line["tokens"], line["positions"]) for line in lines if "loss" in line]

    assert batches(tmp_path / "many") == batches(tmp_path / "one")
    reference = stages.losses(tmp_path / "one")
    assert stages.losses(tmp_path / "many") == pytest.approx(reference, abs=1e-5)


def test_layouts_agree_with_every_option(folder, tmp_path):
    """bf16 off: losses of restricted training agree over TP, PP, DP, SP and recomputation."""
    flags = ["--candidate-scope", "document", "--micro-batch-size", 2]
    said = stages.succeed("stage1", *argv(folder, tmp_path / "one", *flags))
    assert "last tenth of 5 logged steps" in said
    lines = read_metrics(tmp_path / "one" / "metrics.jsonl")
    assert lines[-1]["stability"]["steps"] == 5
    summary = summarize_run(tmp_path / "one")
    assert summary.logged == 5
    for name in ("loss_std", "gradient_norm_cv"):
        assert getattr(summary, name) == lines[-1]["stability"][name]
    reference = stages.losses(tmp_path / "one")
    for name, extra, layout in [
        ("sp", ["--sequence-parallel"], {"tp": 2, "dp": 2}),
        ("pp", ["--recompute-granularity", "full"], {"pp": 2}),
    ]:
        stages.succeed("stage1", *argv(folder, tmp_path / name, *flags, *extra), **layout)
        assert stages.losses(tmp_path / name) == pytest.approx(reference, abs=1e-5), name


@pytest.mark.parametrize("scope", ["position", "document"])
def test_every_head_backend_trains_alike(folder, tmp_path, scope):
    """The same losses, and one line that says which form it was."""
    runs = {}
    for backend, says in (
        ("torch", "torch kernels"), ("union", "union kernels"), ("cpu", "cpu kernels"),
        ("auto", "cpu kernels"),
    ):  # fmt: skip
        extra = ["--candidate-scope", scope, "--tail", "ghost", "--head-backend", backend]
        extra += ["--exit-interval", 1] if backend == "auto" else []
        said = stages.succeed("stage1", *argv(folder, tmp_path / backend, *extra), tp=2)
        assert said.count("restricted head: ") == 1
        how = ", by dense products" if scope == "document" else ""
        assert f"restricted head: {says}{how}\n" in said
        runs[backend] = stages.losses(tmp_path / backend)
    assert runs["auto"] == runs["cpu"][:1]
    for backend in ("union", "cpu"):
        # A weight whose gradient is nothing but rounding moves by the learning rate either way.
        assert runs[backend] == pytest.approx(runs["torch"], abs=3e-4), backend
