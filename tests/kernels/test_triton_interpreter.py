"""The Triton kernels without a GPU: their numbers in Triton's interpreter, their code compiled.

In processes of their own, for Triton decides at its import whether it interprets; two at a time, as
each keeps one core busy.
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
#: (files, TRITON_INTERPRET) of a process; the second are what every form of the head has to pass.
PROCESSES = {
    "interpreted": ([f"{kernels}_interpreted.py" for kernels in KERNELS], "1"),
    "head": (["test_head.py"], "1"),
    "compiled": ([f"{kernels}_compiled.py" for kernels in KERNELS], "0"),
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton has wheels for Linux only")


def run(files: list[str], interpret: str, cache: Path) -> subprocess.CompletedProcess[str]:
    pytest_here = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*pytest_here, *(f"tests/kernels/{file}" for file in files)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """Of the processes that tests were asked for."""
    wanted = {item.callspec.params["process"] for item in request.session.items if run_of(item)}
    with ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(run, *PROCESSES[name], tmp_path_factory.mktemp("triton"))
            for name in PROCESSES
            if name in wanted
        }


def run_of(item: pytest.Item) -> bool:
    return getattr(item, "function", None) is test_triton


@pytest.mark.parametrize("process", PROCESSES)
def test_triton(process: str, runs: dict[str, Future[subprocess.CompletedProcess[str]]]) -> None:
    finished = runs[process].result()
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "skipped" not in finished.stdout
