"""The Triton kernels without a GPU: their numbers in Triton's interpreter, their code compiled.

Each file in a process of its own, for Triton decides at its import whether it interprets; two at a
time, as each keeps one core busy.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ("triton", "triton_head", "triton_head_tiles", "triton_selection")
#: (file, TRITON_INTERPRET); the second is the one that every form of the head has to pass.
FILES = (
    *((f"{kernels}_interpreted.py", "1") for kernels in KERNELS),
    ("test_head.py", "1"),
    *((f"{kernels}_compiled.py", "0") for kernels in KERNELS),
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton has wheels for Linux only")


def run(file: str, interpret: str, cache: Path) -> subprocess.CompletedProcess[str]:
    pytest_here = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*pytest_here, f"tests/kernels/{file}"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """Of the files that tests were asked for."""
    wanted = {item.callspec.params["file"] for item in request.session.items if run_of(item)}
    with ThreadPoolExecutor(2) as pool:
        yield {
            file: pool.submit(run, file, interpret, tmp_path_factory.mktemp("triton"))
            for file, interpret in FILES
            if file in wanted
        }


def run_of(item: pytest.Item) -> bool:
    return getattr(item, "function", None) is test_triton


@pytest.mark.parametrize("file", [file for file, _ in FILES])
def test_triton(file: str, runs: dict[str, Future[subprocess.CompletedProcess[str]]]) -> None:
    finished = runs[file].result()
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "skipped" not in finished.stdout
