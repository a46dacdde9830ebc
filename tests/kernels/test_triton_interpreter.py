"""The Triton kernels without a GPU: their numbers in Triton's interpreter, their code compiled.

Each in a process of its own: Triton decides at its import whether it interprets.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="triton has wheels for Linux only")
@pytest.mark.parametrize(("checks", "interpret"), [("interpreted", "1"), ("compiled", "0")])
@pytest.mark.parametrize(
    "kernels", ["triton", "triton_head", "triton_head_tiles", "triton_selection"]
)
def test_triton(kernels, checks, interpret, tmp_path):
    pytest_here = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*pytest_here, f"tests/kernels/{kernels}_{checks}.py"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout
