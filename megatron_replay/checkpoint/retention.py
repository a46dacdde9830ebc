"""Which iterations of a run are kept: the last few and the best one; the others go.

Everything is worked out from what lies in the directory, once the newest iteration and its marker
are on disk, so that a run killed anywhere in here has the same done by the next one.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from megatron_replay.checkpoint.directories import (
    LATEST,
    iteration_directory,
    latest_iteration,
)
from megatron_replay.errors import CheckpointError
from megatron_replay.files import fsync_path, output_error, read_json, write_json

#: Of each iteration, its ``TrainState``.
STATE = "train_state.json"
#: {"iteration", "metric", "value"} of the best iteration so far, under --keep-best.
BEST = "best_checkpoint.json"


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
    for name in (LATEST, BEST):
        for path in directory.glob(f".{name}.tmp.*"):
            if path.name.rpartition(".")[2].isdecimal():
                path.unlink(missing_ok=True)


def keep_only(directory: Path, *, last: int, best_by: str | None) -> None:
    """Remove all iterations but the newest ``last`` (0: none goes) and the best, for one process.

    What the marker names is never removed, nor what is newer: such an iteration belongs to a run
    that was set back. Of equal values the earliest is the best.

    Raises:
        OutputError: one cannot be removed.
    """
    newest = latest_iteration(directory)
    if newest is None:
        return
    present = [number for number in iterations(directory) if number <= newest]
    kept = {newest, *present[-last:]}
    if best_by is not None:
        values = {number: _score(directory, number, best_by) for number in present}
        known = [(value, number) for number, value in values.items() if value is not None]
        if known:
            value, number = min(known)
            _write_best(directory, {"iteration": number, "metric": best_by, "value": value})
            kept.add(number)
    for number in present:
        if last and number not in kept:
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


def _score(directory: Path, iteration: int, metric: str) -> float | None:
    """The value stored with an iteration; None where it was not measured."""
    try:
        state = read_json(iteration_directory(directory, iteration) / STATE, CheckpointError)
        score = float(state["scores"][metric])
        return score if math.isfinite(score) else None
    except (CheckpointError, ValueError, KeyError, TypeError):
        return None


def _write_best(directory: Path, record: dict[str, Any]) -> None:
    path = directory / BEST
    try:
        if read_json(path, CheckpointError) == record:
            return
    except CheckpointError:
        pass  # none yet, or one to replace
    write_json(path, record)
