"""The programs as users start them: torchrun, real processes, signals, a rank that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_replay.checkpoint import directories
from tests import processes
from tests.e2e import stages

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
FAILING_RANK = ROOT / "tests" / "e2e" / "failing_rank.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def torchrun(processes: int, *argv: object) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc_per_node", str(processes), *map(str, argv)]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env={**ENVIRONMENT, **environment}, capture_output=True, text=True,
        timeout=processes.HANG_SECONDS,
    )  # fmt: skip


def start(command: list[str], printed: Path, **environment: str) -> subprocess.Popen[bytes]:
    """What it writes goes to a file: a pipe that is not read would stop it once it is full."""
    with open(printed, "wb") as stderr:
        return subprocess.Popen(
            command, env={**ENVIRONMENT, **environment}, stderr=stderr, start_new_session=True
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stages.prepare(tmp_path_factory.mktemp("torchrun"), store=False)


def stage1_argv(folder: Path, save: Path, *extra: object) -> list[object]:
    return [*stages.argv(folder, save, *extra), "--tensor-model-parallel-size", 2]


def test_both_stages_with_a_killed_rank_between(folder, tmp_path):
    """Its death ends all; by --max-restarts the second round goes on where the first had saved."""
    store, save, hung = (tmp_path / name for name in ("store", "run", "hung"))
    stage0 = ["-m", "megatron_replay.stage0", *stages.inputs(folder), "--store", store]
    done = run(torchrun(2, *stage0, "--tensor-model-parallel-size", 2))
    assert done.returncode == 0, done.stderr
    assert "coverage" in done.stdout
    assert "Warning" not in done.stderr

    argv = stage1_argv(folder, save, "--store", store, "--save-interval", 2)
    command = torchrun(2, "--max-restarts", 1, FAILING_RANK, *argv)
    process = start(command, tmp_path / "printed", FAULT="hang", HUNG=str(hung))
    processes.until(lambda: hung.exists() and hung.read_text(), process.pid)
    os.kill(int(hung.read_text()), signal.SIGKILL)
    code, printed = process.wait(processes.HANG_SECONDS), (tmp_path / "printed").read_text()
    assert code == 0, printed
    assert "Warning" not in printed
    assert f"resuming {save} after iteration 2" in printed
    undisturbed = tmp_path / "undisturbed"
    stages.succeed("stage1", *stage1_argv(folder, undisturbed, "--store", store), tp=2)
    assert stages.losses(save) == stages.losses(undisturbed)
    assert stages.weights(save) == stages.weights(undisturbed)


def test_workers_end_with_a_torchrun_that_was_killed(folder, tmp_path):
    """They would write beside those of the next one. One waits for something, the other for it."""
    argv, hung = stage1_argv(folder, tmp_path / "run", "--loss", "full"), tmp_path / "hung"
    command = torchrun(2, FAILING_RANK, *argv)
    process = start(command, tmp_path / "printed", FAULT="hang", HUNG=str(hung))
    processes.until(lambda: hung.exists() and hung.read_text(), process.pid)
    lists = Path(f"/proc/{process.pid}/task").glob("*/children")
    workers = [int(pid) for path in lists for pid in path.read_text().split()]
    assert len(workers) == 2
    process.kill()
    process.wait()
    assert all(processes.wait(pid) for pid in workers)


def test_the_error_of_a_failing_rank_comes_first_and_all_end(folder, tmp_path):
    argv = stage1_argv(folder, tmp_path / "run", "--loss", "full")
    done = run(torchrun(2, FAILING_RANK, *argv), FAULT="raise")
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert errors == ["error (rank 1): RuntimeError: the device of this rank is broken"]


def test_ctrl_c_saves_and_the_rerun_finishes(folder, tmp_path):
    """A terminal sends SIGINT to the launcher and to every rank at once."""
    argv = stage1_argv(folder, tmp_path / "run", "--loss", "full", "--train-epochs", 400)
    process = start(torchrun(2, "-m", "megatron_replay.stage1", *argv), tmp_path / "printed")
    metrics = tmp_path / "run" / "metrics.jsonl"
    processes.until(
        lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 3, process.pid
    )
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(processes.HANG_SECONDS) != 0
    assert "saved; rerun the same command to continue" in (tmp_path / "printed").read_text()
    reached = directories.latest_iteration(tmp_path / "run")
    assert reached is not None
    assert reached == len(stages.losses(tmp_path / "run"))
    printed = stages.succeed("stage1", *argv, "--exit-interval", reached + 2, tp=2)
    assert f"resuming {tmp_path / 'run'} after iteration {reached}" in printed
    assert len(stages.losses(tmp_path / "run")) == reached + 2
