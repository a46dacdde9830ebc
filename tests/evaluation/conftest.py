from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_replay.evaluation import suite
from tests.evaluation.site import build_site
from tools import evaluate


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    return build_site(tmp_path_factory.mktemp("site"))


@pytest.fixture
def run(site, tmp_path, capsys):
    """Runs tools/evaluate.py on the base and general text; returns exit code and error line."""

    def run(*flags: str) -> tuple[int, str]:
        given = [f"--base={site}/base", f"--general-text={site}/text.jsonl"]
        code = evaluate.main([*given, f"--output={tmp_path}/eval.json", *flags])
        errors = [
            x
            for x in capsys.readouterr().err.splitlines()
            if x.startswith(("error: ", "interrupted: "))
        ]
        assert len(errors) == (code != 0)
        return code, "".join(errors)

    return run


class Measuring:
    """Stands in for `measure`: remembers what it measured, and is cut off at the model ``stop``."""

    def __init__(self) -> None:
        self.measured: list[str] = []
        self.stop = ""
        self.result: dict[str, Any] = {}

    def __call__(self, name: str, path: Path, *_: object) -> dict[str, Any]:
        if path.name == self.stop:
            raise KeyboardInterrupt
        self.measured.append(path.name)
        return {"general": {"perplexity": float(len(path.name))}, **self.result}


@pytest.fixture
def measuring(monkeypatch) -> Measuring:
    stub = Measuring()
    monkeypatch.setattr(suite, "measure", stub)
    return stub
