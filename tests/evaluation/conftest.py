from __future__ import annotations

from pathlib import Path

import pytest

from megatron_replay.evaluation import suite
from tests.evaluation.evaluation_site import Measuring, build_site
from tests.evaluation.models import save_model


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_site(tmp_path_factory.mktemp("site"))


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Measuring:
    stub = Measuring()
    monkeypatch.setattr(suite, "measure", stub)
    return stub
