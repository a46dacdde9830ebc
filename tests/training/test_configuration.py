"""resolved_config.yaml is what the run's steps were taken with."""

from __future__ import annotations

import pytest
import yaml

from tests import tiny
from tests.e2e import stages

pytestmark = pytest.mark.distributed


def test_a_changed_setting_is_reported_and_a_run_without_steps_records_nothing(tmp_path):
    tiny.save_corpus(tmp_path / "corpus", num_documents=20)
    tiny.save_qwen3(tmp_path / "model", tied=True, num_hidden_layers=1)
    common = [
        "--load", tmp_path / "model", "--data-path", tmp_path / "corpus", "--seq-length", 64,
        "--save", tmp_path / "run", "--loss", "full", "--global-batch-size", 2,
        "--train-iters", 2, "--probe-interval", 0,
    ]  # fmt: skip

    def recorded() -> float:
        return yaml.safe_load((tmp_path / "run" / "resolved_config.yaml").read_text())["optimizer"]

    first = stages.succeed("stage1", *common, "--lr", 1e-3, "--exit-interval", 1)
    assert "changed" not in first
    said = stages.succeed("stage1", *common, "--lr", 2e-3, "--optimizer", "adamw")
    assert "since the last run: --optimizer moclip -> adamw, --lr 0.001 -> 0.002\n" in said
    assert recorded()["lr"] == 2e-3
    said = stages.succeed("stage1", *common, "--lr", 3e-3)
    assert "iterations are done" in said
    stages.fail("stage1", *common, "--lr", 3e-3, "--seed", 5, code=2)
    assert recorded()["lr"] == 2e-3
