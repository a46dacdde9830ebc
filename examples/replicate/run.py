"""Run the study; after an interruption, the same command resumes it.

    python -m examples.replicate.run --plan quick --data DATA --base MODEL --output runs/study

data -> corpora -> base -> Stage 0 for each store -> Stage 1 for each run -> evaluation -> rows.
Every part is one of the framework's own programs with its own flags, in a process with one thread,
and there are as many processes as cores. A finished part is not repeated. All rows go to rows.csv,
of which ``examples.replicate.report`` makes tables and figures.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

# Before torch is imported: the parts run side by side, one thread each, and are forked.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch

from examples.replicate.plan import PLANS, PREPARATION, Plan, Run
from examples.replicate.study import Failed, Job, Study
from megatron_replay.errors import EXIT_INTERRUPTED, ReplayError
from megatron_replay.files import make_directory


def _exit_code(process: int) -> int:
    """Wait for a child, also after Ctrl-C, which interrupts it too; returns its exit code."""
    try:
        status = os.waitpid(process, 0)[1]
    except KeyboardInterrupt:
        os.waitpid(process, 0)
        raise
    if (code := os.waitstatus_to_exitcode(status)) == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    return code


class Pool:
    """Runs jobs in forked processes, ``workers`` at a time, each after those that it needs."""

    def __init__(self, jobs: Sequence[Job], *, workers: int) -> None:
        self.pending = [job for job in jobs if not job.product.exists()]
        self.total, self.workers = len(self.pending), workers
        self.running: dict[int, tuple[Job, float]] = {}
        self.failed: list[str] = []

    def run(self) -> None:
        """Run until all are done or one fails."""
        start = time.monotonic()
        try:
            while self.running or self._next():
                while len(self.running) < self.workers and (job := self._next()):
                    self.pending.remove(job)
                    make_directory(job.product.parent)
                    process = _fork(partial(_do_logged, job))
                    self.running[process] = (job, time.monotonic())
                self._wait(start)
        except BaseException:
            for process in self.running:
                os.kill(process, signal.SIGINT)
            for process in self.running:
                os.waitpid(process, 0)
            raise

    def _next(self) -> Job | None:
        """A job that may start now, if any."""
        if self.failed:
            return None
        ready = (job for job in self.pending if all(need.exists() for need in job.needs))
        return next(ready, None)

    def _wait(self, start: float) -> None:
        process, status = os.wait()
        job, started = self.running.pop(process)
        code = os.waitstatus_to_exitcode(status)
        if code == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        done = self.total - len(self.pending) - len(self.running)
        elapsed = time.monotonic() - start
        remaining = elapsed / done * (self.total - done)
        print(
            f"[{done}/{self.total}] {job.name}: {time.monotonic() - started:.1f} s"
            + (f", failed with exit code {code}" if code else "")
            + f"; elapsed {elapsed / 60:.1f} min, ETA {remaining / 60:.1f} min",
            flush=True,
        )
        if code:
            self.failed.append(f"{job.name}: exit code {code}; see {_log(job)}")


def _fork(work: Callable[[], int]) -> int:
    """Start a process that exits with what ``work()`` returns; returns its pid.

    A fork copies the locks of other threads but not the threads, so nobody would release them.
    This process therefore has no other thread: whatever may start one is done in a child.
    """
    assert os.listdir("/proc/self/task") == [str(os.getpid())], "a fork beside threads may hang"
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        torch.set_num_threads(1)
        os._exit(work())
    return process


def _log(job: Job) -> Path:
    """Beside the product's directory, because Stage 0 needs an empty one."""
    return Path(f"{job.product.parent}.log")


def _do_logged(job: Job) -> int:
    log = os.open(_log(job), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    return _do(job.action)


def _do(action: Callable[[], None]) -> int:
    """The exit code of ``action``."""
    try:
        action()
    except Failed as failure:
        return failure.code
    except ReplayError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--plan", choices=tuple(PLANS), default="quick")
    add("--data", type=Path, required=True, help="a folder for each published set: see data.py")
    add("--base", type=Path, required=True, help="Hugging Face directory of SmolLM2-135M-Instruct")
    add("--output", type=Path, required=True, help="directory of the study")
    add("--device", default="cpu", help="a platform of Stage 1, whose device all processes share")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes at a time")
    add("--only", nargs="+", default=["*"], metavar="GLOB", help="runs, by the names of --list")
    add("--list", action="store_true", help="print the runs, which are done, and the time it takes")
    return parser


def _list(study: Study, plan: Plan, runs: Sequence[Run], workers: int) -> None:
    for run in runs:
        print(
            "done" if study.rows_of(run).exists() else "open",
            f"{plan.minutes(run):4.0f} min",
            run.name,
        )
    minutes = sum(plan.minutes(run) for run in runs if not study.rows_of(run).exists())
    minutes += 0.0 if study.base_product().exists() else PREPARATION
    print(f"open: {minutes / 60:.1f} core-hours, {minutes / 60 / workers:.1f} hours on "
          f"{workers} cores like those of plan.py")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = _parser()
    options = parser.parse_args(argv)
    plan = PLANS[options.plan]
    study, runs = Study(options.output, plan, device=options.device), plan.named(options.only)
    if options.workers < 1:
        parser.error(f"--workers: expected at least 1; found {options.workers}")
    if not runs:
        parser.error(
            f"--only: no run of plan {options.plan} has such a name; --list prints all names"
        )
    if options.list:
        _list(study, plan, runs, options.workers)
        return 0
    if study.device == "cpu":
        study.parts()  # imported once for all processes
    try:
        if code := _exit_code(
            _fork(lambda: _do(lambda: study.prepare(options.data, options.base)))
        ):
            return code
        pool = Pool(study.jobs(runs, options.base), workers=options.workers)
        try:
            pool.run()
        finally:
            count = study.collect(runs)
    except ReplayError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; rerun the same command to resume", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(f"{study.rows_path}: {count} of {len(runs)} runs of plan {options.plan}")
    for failure in pool.failed:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if pool.failed else 0


if __name__ == "__main__":
    sys.exit(main())
