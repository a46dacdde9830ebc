"""``--profile``: traces a few steps into one file per rank.

A trace names "step" and, within it, "data" (the wait for the batch), "head" (forward and backward)
and "optimizer". torch itself names every collective "c10d::...".
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.profiler import record_function

from megatron_replay import platform
from megatron_replay.config import Stage1Config
from megatron_replay.files import make_directory

#: Steps of this process that are traced, counted from 0: the first ones allocate and compile.
TRACED = range(3, 6)


class StepTrace:
    """``with trace.step(iteration):`` around each step; ``close`` ends the trace of a short run.

    Writes to ``--save``/profile, for Perfetto or chrome://tracing. Without ``--profile`` it does
    nothing.
    """

    def __init__(self, config: Stage1Config, rank: int) -> None:
        self._folder, self._rank = Path(config.training.save) / "profile", rank
        self._is_enabled = config.training.profile
        self._platform = platform.select(config.parallel.platform)
        self._taken = self._first_iteration = self._last_iteration = 0
        self._profiler: Any = None

    @contextlib.contextmanager
    def step(self, iteration: int) -> Iterator[None]:
        """The step that completes ``iteration``."""
        if self._is_enabled and self._taken == TRACED.start:
            self._first_iteration = iteration
            self._profiler = self._platform.profiler()
            self._profiler.start()
        with record_function("step"):
            yield
        self._last_iteration = iteration
        self._taken += 1
        if self._taken == TRACED.stop:
            self.close()

    def close(self) -> None:
        """Write the trace if there is one; report a run that was too short for it."""
        if self._profiler is not None:
            self._profiler.stop()
            make_directory(self._folder)
            iterations = f"{self._first_iteration:07d}-{self._last_iteration:07d}"
            name = f"iterations-{iterations}-rank-{self._rank:05d}.json"
            self._profiler.export_chrome_trace(str(self._folder / name))
            self._profiler = None
        elif self._is_enabled and self._taken <= TRACED.start and self._rank == 0:
            print(
                f"--profile traced nothing: the run took {self._taken} steps, and the first traced "
                f"step is {TRACED.start + 1}",
                file=sys.stderr,
            )
