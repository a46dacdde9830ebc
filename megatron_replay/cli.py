"""How both stages start and end: flags in, one line per error out, exit codes with a meaning."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from megatron_replay import flags
from megatron_replay.errors import EXIT_INTERRUPTED, ReplayError

Config = TypeVar("Config")


class Interrupted(Exception):  # noqa: N818 - not an error: the run did as it was told
    """The run was asked to stop, and stopped with its work saved."""


def launch(
    program: str,
    root: type[Config],
    run: Callable[[Config], None],
    estimate: Callable[[Config], str],
    explain: Callable[[Exception], ReplayError | None],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse, then print, estimate or run. Returns the exit code.

    ``explain``: what an error that no line of ours describes was caused by, if it knows.
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
    except ReplayError as error:
        report_error(str(error))
        return error.exit_code
    except (Interrupted, KeyboardInterrupt) as stop:
        report_error(str(stop) or "interrupted; the same command goes on from here")
        return EXIT_INTERRUPTED
    except Exception as error:
        details = traceback.format_exc()
        explained = explain(error)
        if explained is not None:
            report_error(str(explained))
            return explained.exit_code
        report_error(f"{type(error).__name__}: {error}", details=details)
        return 1
    return 0


#: Seconds that torchrun, too, gives its workers between SIGTERM and SIGKILL.
GRACE_SECONDS = 30.0


def end_with_launcher() -> None:
    """End this process when torchrun is gone; without torchrun, do nothing.

    A torchrun that is killed leaves its workers behind, which would go on writing beside those of
    the next one. They get the SIGTERM that torchrun would have sent, upon which Stage 1 saves, and
    half a minute later an end that nothing can hold up.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch, args=(os.getppid(),), name="launcher", daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1.0)
    print("torchrun is gone: stopping", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(EXIT_INTERRUPTED)


def exit_now(code: int) -> None:
    """Leave without waiting for collectives that other ranks will never join.

    After an error, destroying process groups or running atexit handlers may block on peers; the
    launcher ends the others once this process is gone.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 0:
        sys.exit(0)
    os._exit(code)


def report_error(message: str, details: str = "") -> None:
    """Print an error once per launch: by the rank that met it first.

    When a rank dies its peers' collectives fail too, and a mistake in the flags is found by every
    rank. torchrun gives its workers a common folder; who creates the marker in it, speaks.
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
            pass  # no common folder: speak rather than stay silent
    rank = os.environ.get("RANK")
    prefix = f"error (rank {rank}): " if rank not in (None, "0") else "error: "
    print(f"{details}{prefix}{message}", file=sys.stderr, flush=True)
