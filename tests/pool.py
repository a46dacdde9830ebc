"""Gloo ranks for tests, forked with all that they need imported.

``run(world_size, function, *args)`` starts ``world_size`` processes, gives each a gloo process
group, calls ``function(rank, world_size, *args)`` in each, and returns the list of their results. A
rank that raises or dies fails the test with its traceback, and ends the others. A rank costs 0.1 s
where a fresh interpreter would cost 5. Function, arguments and results are pickled.
"""

from __future__ import annotations

import datetime
import os
import pickle
import select
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import processes


class _Gloo(dist.ProcessGroupGloo):
    """On the one device of this rank: a device has a thread that wakes up 100 times a second.

    megatron-core makes some fifty groups; with a device each, most CPU time goes to those threads.
    """

    _device: Any = None

    def __init__(self, store: Any, rank: int, size: int, timeout: datetime.timedelta) -> None:
        if _Gloo._device is None:
            _Gloo._device = self.create_default_device()
        options = self._Options()
        options._devices, options._timeout = [_Gloo._device], timeout
        super().__init__(store, rank, size, options)


def _rank(
    rank: int, world_size: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    try:
        # Of torch's and megatron-core's own; and the end of the process closes what is open.
        for category in (FutureWarning, DeprecationWarning, ResourceWarning):
            warnings.filterwarnings("ignore", category=category)
        torch.set_num_threads(1)
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1",
        )  # fmt: skip
        dist.distributed_c10d.ProcessGroupGloo = _Gloo
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=processes.HANG_SECONDS),
        )
        result = ("ok", function(rank, world_size, *args))
        if dist.is_initialized():  # a whole program, as function, has left the group itself
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        result = ("error", traceback.format_exc())
    (folder / f"result-{rank}").write_bytes(pickle.dumps(result))


def start(world_size: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[int]:
    """The pids of the ranks; they leave their results in ``folder``."""
    return [
        processes.fork(_rank, rank, world_size, folder, function, args)
        for rank in range(world_size)
    ]


def run(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(rank, world_size, *args)`` on ``world_size`` gloo ranks."""
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as name, processes.ended():
        folder = Path(name)
        running = {
            os.pidfd_open(pid): (rank, pid)
            for rank, pid in enumerate(start(world_size, folder, function, *args))
        }
        try:
            while running:
                ended, _, _ = select.select(list(running), [], [], processes.HANG_SECONDS)
                if not ended:
                    raise AssertionError(f"ranks {[rank for rank, _ in running.values()]} hang")
                for pidfd in ended:
                    rank, pid = running.pop(pidfd)
                    os.close(pidfd)
                    results[rank] = _result(rank, pid, folder)
        finally:
            for pidfd in running:
                os.close(pidfd)
    return [results[rank] for rank in range(world_size)]


def _result(rank: int, pid: int, folder: Path) -> Any:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    file = folder / f"result-{rank}"
    if code or not file.exists():
        raise AssertionError(f"rank {rank} died, exit code {code}")
    status, value = pickle.loads(file.read_bytes())
    if status == "error":
        raise AssertionError(f"rank {rank} failed:\n{value}")
    return value
