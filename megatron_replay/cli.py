"""How both stages start and end: flags in, one line per error out, exit codes with a meaning."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from megatron_replay import flags
from megatron_replay.errors import EXIT_INTERRUPTED, ReplayError

Config = TypeVar("Config")


class Interrupted(Exception):  # noqa: N818 - a requested stop is no error
    """The run received SIGTERM or Ctrl-C, saved its work and stopped."""


def launch(
    program: str,
    root: type[Config],
    run: Callable[[Config], None],
    estimate: Callable[[Config], str],
    explain: Callable[[Exception], ReplayError | None],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse, then print, estimate or run. Returns the exit code.

    ``explain``: maps an unexpected exception to a one-line error that names its cause, or to None.
    """
    end_with_launcher()
    try:
        invocation = flags.parse(root, sys.argv[1:] if argv is None else argv, program=program)
        if invocation.print_config:
            print(flags.to_yaml(invocation.config), end="")
        elif invocation.dry_run:
            print(estimate(invocation.config), end="")
        else:
            run(invocation.config)
        return 0
    except (Interrupted, KeyboardInterrupt) as stop:
        report_error(str(stop) or "rerun the same command to continue", label="interrupted")
        return EXIT_INTERRUPTED
    except Exception as error:
        details = traceback.format_exc()
        known = error if isinstance(error, ReplayError) else explain(error)
        if known is not None:
            report_error(str(known))
            return known.exit_code
        report_error(f"{type(error).__name__}: {error}", details=details)
        return 1


def exit_code_of(work: Callable[[], str], *, interrupted: str = "nothing was written") -> int:
    """Do a tool's work and print what it returns, or one line for its error; the exit code.

    A reader that exits (head) interrupts the work if the work prints, and is no error afterwards.
    """
    try:
        text = work()
    except ReplayError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, BrokenPipeError):
        with suppress(BrokenPipeError):
            print(f"interrupted: {interrupted}", file=sys.stderr)
        _print_no_more()
        return EXIT_INTERRUPTED
    try:
        print(text.removesuffix("\n"), flush=True)
    except BrokenPipeError:
        _print_no_more()
    return 0


def _print_no_more() -> None:
    """Where standard output is a closed pipe, so that Python does not complain when it exits."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


#: Seconds between SIGTERM and SIGKILL, as in torchrun.
GRACE_SECONDS = 30.0


def end_with_launcher() -> None:
    """End this process when its torchrun has exited; without torchrun, do nothing.

    The workers of a killed torchrun would keep writing while those of the next one run. This sends
    the SIGTERM that torchrun would have sent, on which Stage 1 saves, and exits half a minute later
    whatever the process is waiting for.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch, args=(os.getppid(),), name="launcher", daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1.0)
    print("torchrun has exited: stopping", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(EXIT_INTERRUPTED)


def exit_now(code: int) -> None:
    """Exit without waiting for collectives that other ranks will never join.

    After an error, destroying process groups or running atexit handlers may block on peers; the
    launcher ends the others once this process has exited.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 0:
        sys.exit(0)
    os._exit(code)


def report_error(message: str, details: str = "", *, label: str = "error") -> None:
    """Print an error, or why a run stopped, once per launch: by the rank that met it first.

    When a rank dies its peers' collectives fail too, and a mistake in the flags is found by every
    rank. torchrun gives its workers a common directory: the rank that creates the marker in it
    prints.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        marker = Path(error_file).parent.parent / "first-error"
        try:
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError:
            pass  # no common directory: print on every rank
    rank = os.environ.get("RANK")
    prefix = f"{label} (rank {rank})" if rank not in (None, "0") else label
    print(f"{details}{prefix}: {message}", file=sys.stderr, flush=True)
