"""What several modules train on: made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny
from tests.e2e import stages


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint, corpus of 17 packs, or 5 iterations, and its store."""
    folder = tmp_path_factory.mktemp("stage1")
    tiny.save_corpus(folder / "corpus", num_documents=70)
    tiny.save_corpus(folder / "other", num_documents=10, seed=5)
    tiny.save_qwen3(folder / "model", tied=True, num_hidden_layers=2)
    stages.succeed("stage0", *stages.inputs(folder), "--store", folder / "store")
    return folder
