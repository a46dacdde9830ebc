"""Traces of a few steps, one file a rank, in which the parts of a step have names.

Names: "step"; within it "data" (the wait for the batch), "head" (forward and backward),
"optimizer", and "collectives" around whatever torch.distributed sends or waits for.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.profiler import record_function

from megatron_replay import platform
from megatron_replay.config import Stage1Config
from megatron_replay.files import make_directory

#: Steps of this process that are traced, counted from 0: the first ones allocate and compile.
TRACED = range(3, 6)
#: Methods of ProcessGroup: every collective ends in one, whoever called what of torch.distributed.
_SENDING = (
    *("allreduce", "allreduce_coalesced", "broadcast", "reduce", "gather", "scatter", "barrier"),
    *("allgather", "_allgather_base", "allgather_into_tensor_coalesced"),
    *("all_gather_single", "all_gather_single_coalesced", "reduce_scatter"),
    *("_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "reduce_scatter_single"),
    *("reduce_scatter_single_coalesced", "alltoall", "alltoall_base", "all_to_all_single"),
    *("send", "recv", "recv_anysource"),
)


class StepTrace:
    """``with trace.step(iteration):`` around each step; ``close`` ends the trace of a short run.

    It traces the steps of this process that ``TRACED`` names into ``--save``/profile, for Perfetto
    or chrome://tracing. Without ``--profile`` it does nothing.
    """

    def __init__(self, config: Stage1Config, rank: int) -> None:
        training = config.training
        self._folder, self._rank = Path(training.save) / "profile", rank
        self._platform = platform.select(config.parallel.platform)
        self._wanted = TRACED if training.profile else ()
        self._taken = 0
        self._profiler: Any = None
        self._first_iteration = self._last_iteration = 0
        self._names = contextlib.ExitStack()

    @contextlib.contextmanager
    def step(self, iteration: int) -> Iterator[None]:
        """The step that completes ``iteration``."""
        is_wanted = self._taken in self._wanted
        if is_wanted and self._profiler is None:
            self._start(iteration)
        with record_function("step"):
            yield
        self._last_iteration = iteration
        self._taken += 1
        if is_wanted and self._taken not in self._wanted:
            self.close()

    def close(self) -> None:
        """Write the trace if one is being made; say so where the run was too short for any."""
        if self._profiler is None:
            if self._wanted and self._taken <= self._wanted[0] and self._rank == 0:
                print(
                    f"--profile has traced nothing: {self._taken} steps were taken, and the first "
                    f"traced is step {self._wanted[0] + 1}",
                    file=sys.stderr,
                )
            return
        self._profiler.stop()
        self._names.close()
        make_directory(self._folder)
        iterations = f"{self._first_iteration:07d}-{self._last_iteration:07d}"
        name = f"iterations-{iterations}-rank-{self._rank:05d}.json"
        self._profiler.export_chrome_trace(str(self._folder / name))
        self._profiler = None

    def _start(self, iteration: int) -> None:
        self._first_iteration = iteration
        self._names.enter_context(_named_collectives())
        self._profiler = self._platform.profiler()
        self._profiler.start()


@contextlib.contextmanager
def _named_collectives() -> Iterator[None]:
    """Every sending, and every wait for one, in a region "collectives"."""
    named: list[tuple[Any, str]] = [
        (dist.ProcessGroup, name) for name in _SENDING if hasattr(dist.ProcessGroup, name)
    ]
    named.append((dist.Work, "wait"))
    originals = [vars(owner)[name] for owner, name in named]  # what getattr gives is no method
    for owner, name in named:
        setattr(owner, name, _in_region(getattr(owner, name)))
    try:
        yield
    finally:
        for (owner, name), original in zip(named, originals, strict=True):
            setattr(owner, name, original)


def _in_region(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function("collectives"):
            return method(*args, **kwargs)

    return named
