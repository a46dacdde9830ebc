"""The layout of a directory of training checkpoints, and which iterations are kept.

Everything is derived from the directory's content, after the newest iteration and its marker are on
disk. If a run is killed in any function here, the next run completes the same work.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from megatron_replay.errors import CheckpointError
from megatron_replay.files import fsync_path, output_error, read_text

#: Megatron's file with the number of the newest complete iteration.
LATEST = "latest_checkpointed_iteration.txt"
#: In each iteration, its ``TrainState``.
STATE = "train_state.json"
#: The names that saves and removals use: no other temporary directory is ever removed.
_UNFINISHED = re.compile(r"\.iter_\d{7,}\.[0-9a-f]{8}\.incomplete")
_REMOVED = re.compile(r"\.iter_\d{7,}\.removed")
_RESTORE = f"Write the number of one of the iter_... directories beside it into {LATEST}"


def latest_iteration(directory: Path) -> int | None:
    """The newest complete iteration in ``directory``, or None when there is none.

    Raises:
        CheckpointError: the marker names an iteration that is not there.
    """
    marker = directory / LATEST
    if not os.path.lexists(marker):
        return None
    text = read_text(marker, CheckpointError, fix=_RESTORE).strip()
    # isdecimal alone accepts digits of other scripts; int() refuses thousands of digits.
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        found = repr(text[:20])
        raise CheckpointError(
            "not an iteration", where=marker, expected="a number", found=found, fix=_RESTORE
        )
    path = iteration_directory(directory, int(text))
    if not path.is_dir():
        complete = sorted(p.name for p in directory.glob("iter_*"))
        raise CheckpointError(
            "the newest checkpoint is missing",
            where=path,
            found=", ".join(complete) or "none",
            fix=f"Restore it. {_RESTORE}",
        )
    return int(text)


def iteration_directory(directory: Path, iteration: int) -> Path:
    """``directory/iter_0000100``."""
    return directory / f"iter_{iteration:07d}"


def iterations(directory: Path) -> list[int]:
    """The numbers of the complete checkpoints in ``directory``, ascending."""
    names = [path.name.removeprefix("iter_") for path in directory.glob("iter_*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())


def unfinished(directory: Path) -> list[Path]:
    """The directories that killed saves left in ``directory``."""
    return _named(directory, _UNFINISHED)


def _named(directory: Path, pattern: re.Pattern[str]) -> list[Path]:
    return sorted(path for path in directory.glob(".iter_*") if pattern.fullmatch(path.name))


def report_remains(directory: Path, newest: int | None) -> None:
    """Report on stderr what a resumed run ignores."""
    for path in unfinished(directory):
        print(f"{path}: an unfinished save: ignored, removed at the next save", file=sys.stderr)
    for number in iterations(directory):
        if newest is None or number > newest:
            print(
                f"{iteration_directory(directory, number)}: newer than {LATEST} says: ignored, "
                "replaced when this run comes to that iteration",
                file=sys.stderr,
            )


def clear_remains(directory: Path) -> None:
    """Remove what killed saves and removals left. The directory must be locked."""
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
    """Remove an iteration; it is renamed first, so no incomplete one ever has the name.

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
