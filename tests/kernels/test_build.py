"""Building the kernels: one clear line where it cannot be done, and a way around it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext",
         "--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip


def test_without_a_compiler_one_line_says_what_to_do(tmp_path):
    run = build(tmp_path, CXX=str(tmp_path / "no-compiler"))
    assert run.returncode == 1
    (line,) = run.stderr.strip().splitlines()
    assert line.startswith("error: csrc/cpu: the kernels cannot be compiled (expected a C++17")
    assert "apt-get install g++ python3-dev" in line
    assert "MEGATRON_REPLAY_BUILD_KERNELS=0" in line


def test_a_compiler_that_fails_is_an_error_too(tmp_path):
    compiler = tmp_path / "old-compiler"
    compiler.write_text("#!/bin/sh\necho 'unknown option -std=c++17' >&2\nexit 1\n")
    compiler.chmod(0o755)
    run = build(tmp_path, CXX=str(compiler))
    assert run.returncode == 1
    assert "unknown option -std=c++17" in run.stderr
    assert "the kernels cannot be compiled" in run.stderr


def test_kernels_can_be_left_out(tmp_path):
    run = build(tmp_path, CXX=str(tmp_path / "no-compiler"), MEGATRON_REPLAY_BUILD_KERNELS="0")
    assert run.returncode == 0
    assert not list(tmp_path.rglob("*.so"))
