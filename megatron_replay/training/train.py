"""Stage 1's training loop, how it stops on a signal, and its traces."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]
from torch.profiler import record_function

from megatron_replay import cli, platform
from megatron_replay.checkpoint.directories import keep_only
from megatron_replay.checkpoint.training import TrainState, save_checkpoint
from megatron_replay.config import Stage1Config
from megatron_replay.data.loader import Loader
from megatron_replay.files import make_directory
from megatron_replay.optim.build import learning_rate
from megatron_replay.progress import Progress
from megatron_replay.training.build import TrainingRun
from megatron_replay.training.monitor import Monitor
from megatron_replay.training.step import StepResult, train_step

#: Global batches prepared ahead of the step.
PREFETCHED_BATCHES = 2
#: Steps of this process that --profile traces, from 0: the first ones allocate and compile.
TRACED = range(3, 6)
_STOP = "stop after iteration"


def train(run: TrainingRun, stop: StopRequest) -> None:
    """Take the remaining steps: batch, forward and backward, update, watch, save, stop.

    Raises:
        Interrupted: a signal ended the run early, after a checkpoint was saved.
        TrainingError: too many steps were skipped, or no step had a label.
    """
    config, groups, state = run.config, run.groups, run.state
    train_iters, save_interval = run.data.train_iters, config.training.save_interval
    monitor, trace = Monitor(run), StepTrace(config, groups.rank)
    remaining = range(state.iteration, train_iters)
    progress = Progress(
        "Stage 1", train_iters, "iterations", initial=state.iteration, enabled=groups.writer
    )
    with Loader(run.make_batch, remaining, depth=PREFETCHED_BATCHES) as batches, progress:
        monitor.start()
        while state.iteration < train_iters:
            started = time.perf_counter()
            lr = learning_rate(state.iteration, config.optimizer, train_iters)
            with trace.step(state.iteration + 1):
                with record_function("data"):
                    batch = next(batches)
                result = train_step(
                    run.wrapped,
                    run.optimizer,
                    batch.micro_batches,
                    groups,
                    lr=lr,
                    report=(state.iteration + 1) % config.training.log_interval == 0,
                    qk_clip_threshold=config.optimizer.qk_clip_threshold,
                )
            state = state.after_step(tokens=batch.tokens, skipped=result.skipped)
            seconds = time.perf_counter() - started
            progress.advance(note=_note(result, last_stage=groups.last_stage))
            waited = batches.waited
            monitor.after_step(state, result, batch, lr=lr, seconds=seconds, waited=waited)
            if stop.after(state.iteration) or _slice_is_over(run, state):
                break
            if save_interval and state.iteration % save_interval == 0:
                nothing = _save(run, state, monitor)
                if nothing and groups.writer:
                    print(f"iteration {state.iteration}: {nothing}", file=sys.stderr)
    trace.close()
    _finish(run, state, monitor, stop)


def _note(result: StepResult, *, last_stage: bool) -> str:
    if result.loss is not None:
        return f"loss {result.loss:.4f}"
    return "no label in this step" if last_stage else ""


def _slice_is_over(run: TrainingRun, state: TrainState) -> bool:
    interval = run.config.training.exit_interval
    return interval is not None and state.iteration % interval == 0


def _save(run: TrainingRun, state: TrainState, monitor: Monitor, *, is_over: bool = False) -> str:
    """Write a checkpoint and apply --keep-last; returns why it did not, or "".

    Raises:
        TrainingError: if ``is_over`` and nothing was learned.
    """
    nothing = monitor.nothing_learnt(state, is_over=is_over)
    if not nothing:
        save_checkpoint(run.directory, state, run.model.module, run.optimizer, run.groups)
        last = run.config.training.keep_last
        run.groups.on_rank_zero(lambda: keep_only(run.directory, last=last))
    return nothing


def _finish(run: TrainingRun, state: TrainState, monitor: Monitor, stop: StopRequest) -> None:
    """Save, write the summary, and report why the run ends here if it is not finished."""
    is_finished = state.iteration >= run.data.train_iters
    is_planned = is_finished or _slice_is_over(run, state)
    nothing = _save(run, state, monitor, is_over=is_planned)
    monitor.finish()
    if is_finished:
        return
    why = stop.received or ("--exit-interval" if is_planned else "another rank")
    message = f"stopped after iteration {state.iteration} of {run.data.train_iters} ({why}); " + (
        nothing or "saved; rerun the same command to continue"
    )
    if not is_planned:
        raise cli.Interrupted(message)
    if run.groups.writer:
        print(message, file=sys.stderr)


class StopRequest:
    """Stops between two steps on SIGTERM (from a scheduler) or Ctrl-C, so that the run is saved.

    torchrun passes SIGTERM on to its workers and kills them 30 s later; Ctrl-C reaches them
    directly and through torchrun, so a second signal must not interrupt the saving.

    Args:
        store: the run's; a rank that got a signal writes the last step into it for all ranks.
    """

    def __init__(self, store: Store) -> None:
        self.received: str | None = None
        self._store = store
        self._last: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def after(self, iteration: int) -> bool:
        """Whether the run ends with step ``iteration``; the same on every rank.

        The first rank that gets a signal makes the next step the last one. Every rank reads that in
        time: it is written before that rank takes part in the step, which no rank can complete
        without it. Costs one request to the store per step, no collective, and no wait for the
        device.
        """
        if self._last is None:
            if self.received is not None:
                self._store.compare_set(_STOP, "", str(iteration + 1))
            if self._store.check([_STOP]):
                self._last = int(self._store.get(_STOP))
        return self._last is not None and iteration >= self._last

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number).name


class StepTrace:
    """``--profile``: traces a few steps into --save/profile, a file per rank; else does nothing.

    A trace, for Perfetto or chrome://tracing, names "step" and, within it, "data" (the wait for the
    batch), "head" (forward and backward) and "optimizer". torch itself names every collective
    "c10d::...".
    """

    def __init__(self, config: Stage1Config, rank: int) -> None:
        self._folder, self._rank = Path(config.training.save) / "profile", rank
        self._is_enabled = config.training.profile
        self._platform = platform.select(config.parallel.platform)
        self._taken = self._first_iteration = self._last_iteration = 0
        self._profiler: Any = None

    @contextlib.contextmanager
    def step(self, iteration: int) -> Iterator[None]:
        """Around the step that completes ``iteration``."""
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
        """Write the trace if there is one; print a line if the run was too short for it."""
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
