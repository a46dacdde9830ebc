from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluation.models import save_model


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"))
