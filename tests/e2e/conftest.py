"""What several modules train on, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny
from tests.e2e import stages


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint, corpus of 17 packs (5 iterations), a store with logits, and another corpus."""
    folder = stages.prepare(tmp_path_factory.mktemp("stage1"), "--store-logits", "fp16")
    tiny.save_corpus(folder / "other", num_documents=10, seed=5)
    return folder


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of ``folder``'s shapes and vocabulary, with other weights and rope_theta."""
    model = tmp_path_factory.mktemp("other") / "model"
    tiny.save_qwen3(model, tied=True, num_hidden_layers=2, seed=3, rope_theta=500.0)
    (model / "generation_config.json").write_text('{"temperature": 0.6}')
    return model


@pytest.fixture(scope="session")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has taken two of its five steps; tests that change it copy it first."""
    save = tmp_path_factory.mktemp("run") / "run"
    stages.succeed("stage1", *stages.argv(folder, save, "--exit-interval", 2))
    return save
