"""The Triton kernels without a GPU: run in Triton's interpreter, and compiled.

In processes of their own, side by side: Triton decides at its import whether it interprets.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).parents[2]
#: (files, TRITON_INTERPRET) of a process; the files of "shared" test the other backends as well.
PROCESSES = {
    "interpreted": (["triton_interpreted.py", "test_pair_operators.py"], "1"),
    "shared": (["test_head.py", "test_selection.py", "test_momentum_step.py"], "1"),
    "compiled": (["triton_compiled.py"], "0"),
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton has wheels for Linux only")


Runs = dict[str, tuple[subprocess.Popen[bytes], Path]]


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runs]:
    """The processes of the chosen tests, side by side, and the files they write to."""
    wanted = {item.callspec.params["process"] for item in request.session.items if run_of(item)}
    with processes.ended():
        yield {
            name: start(*PROCESSES[name], tmp_path_factory.mktemp("triton"))
            for name in PROCESSES
            if name in wanted
        }


def start(files: list[str], interpret: str, folder: Path) -> tuple[subprocess.Popen[bytes], Path]:
    pytest_here = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider"]
    pytest_here += ["-m", "not cpu_backend"]
    with open(folder / "said", "wb") as said:
        process = subprocess.Popen(
            [*pytest_here, *(f"tests/kernels/{file}" for file in files)],
            cwd=ROOT,
            env=os.environ | {"TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(folder)},
            stdout=said,
            stderr=said,
        )
    return process, folder / "said"


def run_of(item: pytest.Item) -> bool:
    return getattr(item, "function", None) is test_triton


@pytest.mark.parametrize("process", PROCESSES)
def test_triton(process: str, runs: Runs) -> None:
    started, said = runs[process]
    code = started.wait(processes.HANG_SECONDS)
    assert code == 0, said.read_text()
    assert "skipped" not in said.read_text()
