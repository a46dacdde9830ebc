"""Run the study, a row at a time; stopped, the same command goes on.

    python -m examples.replicate.run --plan paper --output runs/replicate

data -> corpora -> base models -> Stage 0 once a store -> Stage 1 once a run -> evaluation -> a row.
Every part is the framework's own program with its own flags, in a process of one thread; as many
run at a time as there are cores. A part that is done is not done again. Rows go to
rows.csv, of which ``examples.replicate.report`` makes tables and figures.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

# Before torch is imported: the parts run side by side, one thread each, and are forked.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch

from examples.replicate import plan
from megatron_replay import platform
from megatron_replay.errors import EXIT_INTERRUPTED, ReplayError
from megatron_replay.files import make_directory

platform.select("cpu").prepare()  # before megatron-core is imported, which forks then share

from examples.replicate.parts import Failed  # noqa: E402
from examples.replicate.study import Job, Study  # noqa: E402


def _exit_code(process: int) -> int:
    """The exit code of a child; after Ctrl-C, which it gets too, not before its end."""
    try:
        status = os.waitpid(process, 0)[1]
    except KeyboardInterrupt:
        os.waitpid(process, 0)
        raise
    if (code := os.waitstatus_to_exitcode(status)) == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    return code


class Pool:
    """Jobs in forked processes, ``workers`` at a time, in their order as far as needs allow."""

    def __init__(self, jobs: Sequence[Job], *, workers: int) -> None:
        self.pending = [job for job in jobs if not job.product.exists()]
        self.total, self.workers = len(self.pending), workers
        self.running: dict[int, tuple[Job, float]] = {}
        self.failed: list[str] = []

    def run(self, *, until: float) -> None:
        """Until all is done, one fails, or ``time.monotonic()`` reaches ``until``."""
        start = time.monotonic()
        try:
            while self.running or self._may_start(until):
                while len(self.running) < self.workers and self._may_start(until):
                    job = next(job for job in self.pending if self._ready(job))
                    self.pending.remove(job)
                    self.running[self._start(job)] = (job, time.monotonic())
                self._wait(start)
        except BaseException:
            for process in self.running:
                os.kill(process, signal.SIGINT)
            for process in self.running:
                os.waitpid(process, 0)
            raise

    def _may_start(self, until: float) -> bool:
        if self.failed or time.monotonic() >= until:
            return False
        return any(self._ready(job) for job in self.pending)

    def _ready(self, job: Job) -> bool:
        return all(need.exists() for need in job.needs)

    def _start(self, job: Job) -> int:
        make_directory(job.product.parent)
        return _fork(lambda: _do_logged(job))

    def _wait(self, start: float) -> None:
        if not self.running:
            return
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
    """The pid of a process that exits with what ``work()`` returns.

    A fork copies the locks that other threads hold, and no thread that would release them: so
    whatever may start a thread is done in such a process, and this one has none.
    """
    assert os.listdir("/proc/self/task") == [str(os.getpid())], "a fork beside threads may hang"
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        torch.set_num_threads(1)
        os._exit(work())
    return process


def _log(job: Job) -> Path:
    """Beside the product's directory: Stage 0 starts a store in an empty one."""
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


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plan", choices=tuple(plan.PLANS), default="paper")
    parser.add_argument("--output", type=Path, default=Path("runs/replicate"))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="start nothing new after this long"
    )
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="GLOB",
        help="runs whose names, as --list shows them, match one of these",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="name the runs, and which are done")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    study, runs = Study(options.output), plan.plan(options.plan, options.only)
    if not runs:
        parser.error(f"--only: no run of plan {options.plan} has such a name; --list shows them")
    if options.list:
        for run in runs:
            print("done" if study.row_path(run).exists() else "open", run.name)
        return 0
    try:
        if code := _exit_code(_fork(lambda: _do(study.prepare))):
            return code
        pool = Pool(study.jobs(runs), workers=options.workers)
        try:
            pool.run(until=until)
        finally:
            count = study.collect(runs)
    except ReplayError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(f"{study.rows_path}: {count} of {len(runs)} runs of plan {options.plan}")
    for failure in pool.failed:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if pool.failed else 0


if __name__ == "__main__":
    sys.exit(main())
