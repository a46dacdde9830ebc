"""Which iterations of a run are kept: the last few; the others go.

Everything is worked out from what lies in the directory, once the newest iteration and its marker
are on disk, so that a run killed anywhere in here has the same done by the next one.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from megatron_replay.checkpoint.directories import (
    LATEST,
    iteration_directory,
    latest_iteration,
)
from megatron_replay.files import fsync_path, output_error

#: Of each iteration, its ``TrainState``.
STATE = "train_state.json"


def iterations(directory: Path) -> list[int]:
    """The numbers of the whole checkpoints in ``directory``, ascending."""
    names = [path.name.removeprefix("iter_") for path in directory.glob("iter_*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())


#: Exactly the names that a save and a removal make: nothing else is ever removed.
_UNFINISHED = re.compile(r"\.iter_\d{7,}\.[0-9a-f]{8}\.incomplete")
_REMOVED = re.compile(r"\.iter_\d{7,}\.removed")


def unfinished(directory: Path) -> list[Path]:
    """What saves that were killed have left in ``directory``."""
    return _named(directory, _UNFINISHED)


def _named(directory: Path, pattern: re.Pattern[str]) -> list[Path]:
    return sorted(path for path in directory.glob(".iter_*") if pattern.fullmatch(path.name))


def report_remains(directory: Path, newest: int | None) -> None:
    """Say on stderr what a resumed run does not count as a checkpoint of its own."""
    for path in unfinished(directory):
        print(
            f"{path}: a save that was not finished: ignored, removed at the next save",
            file=sys.stderr,
        )
    for number in iterations(directory):
        if newest is None or number > newest:
            print(
                f"{iteration_directory(directory, number)}: newer than {LATEST} says: ignored, "
                "replaced when this run comes to that iteration",
                file=sys.stderr,
            )


def clear_remains(directory: Path) -> None:
    """Remove what killed saves and removals have left. The directory must be locked."""
    for path in [*unfinished(directory), *_named(directory, _REMOVED)]:
        shutil.rmtree(path, ignore_errors=True)
    for path in directory.glob(f".{LATEST}.tmp.*"):
        if path.name.rpartition(".")[2].isdecimal():
            path.unlink(missing_ok=True)


def keep_only(directory: Path, *, last: int) -> None:
    """Remove all iterations but the newest ``last``; 0 keeps all. Called by one process.

    What the marker names is never removed, nor what is newer: such an iteration belongs to a run
    that was set back.

    Raises:
        OutputError: one cannot be removed.
    """
    newest = latest_iteration(directory)
    if newest is None or not last:
        return
    present = [number for number in iterations(directory) if number <= newest]
    for number in present[:-last]:
        if number != newest:
            remove_iteration(directory, number)


def remove_iteration(directory: Path, iteration: int) -> None:
    """Remove one; it loses its name first, so that no half of it ever has one.

    Raises:
        OutputError: it cannot be removed.
    """
    path = iteration_directory(directory, iteration)
    remains = directory / f".{path.name}.removed"
    try:
        if remains.exists():
            shutil.rmtree(remains)
        os.replace(path, remains)
        fsync_path(directory)
        shutil.rmtree(remains)
    except OSError as error:
        raise output_error(path, error) from error
