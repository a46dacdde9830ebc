"""The figure of docs/method.md is drawn by its script, and agrees with the page's numbers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron_replay.optim import AdamW, MoClip

SCRIPT = Path(__file__).parents[1] / "docs" / "figures" / "angle_clip.py"


@pytest.fixture(scope="module")
def figure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("angle_clip", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_draws(figure, tmp_path, monkeypatch):
    output = tmp_path / "figure.png"
    few = ["--points", "2", "--size", "50", "--steps", "4", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["angle_clip", *few])
    figure.main()
    assert output.read_bytes().startswith(b"\x89PNG")


def test_the_numbers_of_the_page(figure):
    length, _ = figure.turned(np.array([80.0]), "line")
    assert length[0] == pytest.approx(0.25, abs=0.01)
    assert figure.expected_angle(np.array([1.1]))[0] == pytest.approx(45, abs=0.3)
    for snr, share in ((0.1, 0.75), (0.01, 1 / 3)):
        adamw, moclip = (
            figure.settled(rule, snr, size=20_000, steps=200)["update_rms_over_lr"]
            for rule in (AdamW, MoClip)
        )
        assert moclip / adamw == pytest.approx(share, abs=0.04)
