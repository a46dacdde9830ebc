"""A pool of forked gloo processes: import torch (and megatron-core) once, then fork the ranks.

``run(world_size, function, *args)`` forks ``world_size`` children, gives each a gloo process group,
calls ``function(rank, world_size, *args)`` in each, and returns the list of their results. A child
that raises fails the test with that rank's traceback. Forking after the imports costs 0.1 s a rank
where a fresh interpreter would cost 5. What was imported is frozen for the garbage collector, which
would copy its pages into every child.
"""

from __future__ import annotations

import datetime
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def _child(
    rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    result_file = Path(folder) / f"result-{rank}"
    try:
        # A child runs without pytest's own filters; keep what the project set.
        warnings.filterwarnings("ignore", category=FutureWarning)
        torch.set_num_threads(1)
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1",
        )  # fmt: skip
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=300),
        )
        result = ("ok", function(rank, world_size, *args))
        if dist.is_initialized():  # a whole program, as function, has left the group itself
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        result = ("error", traceback.format_exc())
    tmp = result_file.with_suffix(".tmp")
    tmp.write_bytes(pickle.dumps(result))
    tmp.rename(result_file)
    os._exit(0)  # no atexit handlers of the parent's libraries


def run(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 600.0
) -> list[Any]:
    """Run ``function(rank, world_size, *args)`` on ``world_size`` forked gloo ranks."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads: see above
            children = [
                context.Process(target=_child, args=(r, world_size, folder, function, args))
                for r in range(world_size)
            ]
            gc.freeze()
            for child in children:
                child.start()
            gc.unfreeze()
        files = [Path(folder) / f"result-{r}" for r in range(world_size)]
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        try:
            while len(results) < world_size:
                for rank, file in enumerate(files):
                    if rank in results:
                        continue
                    if file.exists():
                        status, value = pickle.loads(file.read_bytes())
                        if status == "error":
                            raise AssertionError(f"rank {rank} of {world_size} failed:\n{value}")
                        results[rank] = value
                    elif not children[rank].is_alive() and not file.exists():
                        raise AssertionError(
                            f"rank {rank} died, exit code {children[rank].exitcode}"
                        )
                if time.monotonic() > deadline:
                    raise AssertionError(f"ranks {set(range(world_size)) - set(results)} hang")
                time.sleep(0.005)
        finally:
            for child in children:
                if child.is_alive() and len(results) < world_size and child.pid:
                    os.kill(child.pid, signal.SIGKILL)
                child.join(5)
    return [results[r] for r in range(world_size)]
