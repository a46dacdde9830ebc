"""Process groups: timeouts, the variables of a launcher, lost ranks, signals and dead launchers."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_replay import parallel, platform
from megatron_replay.config import ParallelConfig
from megatron_replay.errors import ConfigError, TrainingError
from megatron_replay.parallel import environment_world_size
from megatron_replay.training.train import StopRequest
from tests import pool, processes

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
             "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # fmt: skip
WHOLE = {"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, 1), (WHOLE, 4), ({"WORLD_SIZE": "1"}, 1), ({"OMPI_COMM_WORLD_SIZE": "1"}, 1),
        ({**WHOLE, "SLURM_STEP_NUM_TASKS": "2"}, 4),
        ({k: v for k, v in WHOLE.items() if k != "LOCAL_RANK"}, "WORLD_SIZE=4 and no LOCAL_RANK"),
        ({"WORLD_SIZE": "4"}, "no RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE='four'"), ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"RANK": "x"}, "WORLD_SIZE=1 and RANK='x'"),
        ({**WHOLE, "RANK": "4"}, "WORLD_SIZE=4 and RANK='4'"),
        ({**WHOLE, "LOCAL_RANK": "zz"}, "WORLD_SIZE=4 and LOCAL_RANK='zz'"),
        ({**WHOLE, "MASTER_PORT": "abc"}, "WORLD_SIZE=4 and MASTER_PORT='abc'"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "SLURM_STEP_NUM_TASKS=8 and no WORLD_SIZE"),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, "OMPI_COMM_WORLD_SIZE=8 and no WORLD_SIZE"),
    ],
)  # fmt: skip
def test_the_variables_that_a_launcher_must_set(monkeypatch, environment, found):
    """Under srun and mpirun each process would otherwise train alone, into one directory."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(found, int):
        assert environment_world_size() == found
    else:
        with pytest.raises(ConfigError, match=r"environment: .*torchrun") as caught:
            environment_world_size()
        assert found in str(caught.value)


def meet_alone(found: Path, rank: int) -> None:
    """Rank ``rank`` of 2, without the other; its error goes to a file."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1"
    )
    if rank == 0:  # it listens: any free port
        os.environ["MASTER_PORT"] = "0"
    try:
        brief = ParallelConfig(distributed_timeout_minutes=0.02)
        parallel.initialize(brief, platform.select("cpu"))
    except TrainingError as error:
        found.write_text(str(error))


@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_without_the_others_ends_with_one_line(tmp_path, rank):
    found = tmp_path / "found"
    assert processes.wait(processes.fork(meet_alone, found, rank)) == 0
    message = found.read_text()
    assert f"rank {rank} of 2 did not connect to the others within --distributed" in message
    assert "MASTER_ADDR=127.0.0.1 MASTER_PORT=" in message
    assert "\n" not in message


def timeouts(rank: int, world_size: int) -> set[datetime.timedelta]:
    config = ParallelConfig(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2,
        distributed_timeout_minutes=7.5,
    )  # fmt: skip
    groups = parallel.initialize(config, platform.select("cpu"))
    held = (groups.tp_group, groups.pp_group, groups.dp_group, groups.model_group,
            groups.tp_dp_group)  # fmt: skip
    cpu = torch.device("cpu")
    return {groups.timeout, *(group._get_backend(cpu).options._timeout for group in held)}


@pytest.mark.distributed
def test_the_timeout_reaches_every_group():
    """megatron-core's own would be 30 minutes."""
    assert pool.run(4, timeouts) == [{datetime.timedelta(minutes=7.5)}] * 4


def explained(rank: int, world_size: int, message: str) -> object:
    return parallel.explain(RuntimeError(message))


@pytest.mark.distributed
def test_an_error_of_ranks_that_all_answer_names_none():
    """tests/e2e/test_damage.py has a rank that does not."""
    for message in ("Connection closed by peer", "division by zero"):
        assert pool.run(2, explained, message) == [None, None]


def test_a_full_device_is_said_in_one_line():
    for kind, message in (
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2 GiB.\nSee"),
        (RuntimeError, "NPU out of memory. Tried to allocate 2 GiB"),
    ):
        found = str(parallel.explain(kind(message)))
        assert "Tried to allocate 2 GiB" in found
        assert "--micro-batch-size" in found
        assert "\n" not in found


def test_hccl_s_timeout_names_the_rank_that_does_not_answer(monkeypatch):
    """The error's text is that of the vendor's page on EI0002."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(parallel, "ANSWER_SECONDS", 0.0)
    found = explained(0, 2, "EI0002: The wait execution of the Notify register times out.")
    assert "rank 1 does not answer" in str(found)


def stops(rank: int, world_size: int, signals: dict[int, int]) -> int:
    """The iteration after which this rank stops; ``signals``: the iteration of a rank's signal."""
    request = StopRequest(dist.distributed_c10d._get_default_store())
    with request:
        for iteration in range(1, 20):
            dist.barrier()  # a step, in which all take part
            if signals.get(rank) == iteration:
                os.kill(os.getpid(), signal.SIGTERM)
            if request.after(iteration):
                return iteration
    return 0


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("signals", "last"),
    [({}, 0), ({1: 3}, (4,)), ({0: 3, 1: 3, 2: 3}, (4,)), ({0: 5, 2: 4}, (5,))],
)
def test_all_ranks_stop_after_the_same_step(signals, last):
    [stopped] = set(pool.run(3, stops, signals))
    assert stopped == last if last == 0 else stopped in last


WORKER = """
import os, signal, sys, time
from megatron_replay import cli
cli.GRACE_SECONDS = float(sys.argv[1])
cli.end_with_launcher()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), flush=True)
time.sleep(3600)
"""
LAUNCHER = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(3600)"


def test_a_worker_that_ignores_sigterm_ends_with_its_torchrun():
    """It would write into the next run's directory. tests/e2e/test_torchrun.py has plain ones."""
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "1",
                   "PYTHONPATH": str(Path(__file__).parents[1])}  # fmt: skip
    worker = [sys.executable, "-c", WORKER, "0.2"]
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, *worker], stdout=subprocess.PIPE, env=environment,
        start_new_session=True,
    ) as launcher:  # fmt: skip
        try:
            assert launcher.stdout.readline()
            launcher.kill()
            # The pipe ends when the worker has ended, too.
            assert launcher.stdout.read() == b""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
