"""Which iterations of a run are kept: the last few and the best one; the others go.

Everything is worked out from what lies in the directory, once the newest iteration and its marker
are on disk, so that a run killed anywhere in here has the same done by the next one.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from megatron_replay.checkpoint.directories import (
    LATEST,
    iteration_directory,
    latest_iteration,
)
from megatron_replay.files import fsync_directory, output_error, write_json

#: {"iteration", "metric", "value"} of the best iteration so far, under --keep-best.
BEST = "best_checkpoint.json"


def iterations(directory: Path) -> list[int]:
    """The numbers of the whole checkpoints in ``directory``, ascending."""
    names = [path.name.removeprefix("iter_") for path in directory.glob("iter_*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())


def unfinished(directory: Path) -> list[Path]:
    """What saves that were killed have left in ``directory``."""
    return sorted(directory.glob(".iter_*.incomplete"))


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
    """Remove what killed saves and removals have left.

    A killed rank's writers may outlive it for a moment: what they leave behind here goes next time,
    and what is to be written meanwhile has another name.
    """
    for path in [*unfinished(directory), *directory.glob(".iter_*.removed")]:
        shutil.rmtree(path, ignore_errors=True)
    for name in (LATEST, BEST):
        for path in directory.glob(f".{name}.tmp.*"):
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
        fsync_directory(directory)
        shutil.rmtree(remains)
    except OSError as error:
        raise output_error(path, error) from error


def _score(directory: Path, iteration: int, metric: str) -> float | None:
    """The value stored with an iteration; None where it was not measured."""
    try:
        state = json.loads(
            (iteration_directory(directory, iteration) / "train_state.json").read_text()
        )
        return float(state["scores"][metric])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_best(directory: Path, record: dict[str, Any]) -> None:
    path = directory / BEST
    try:
        if json.loads(path.read_text()) == record:
            return
    except (OSError, ValueError):
        pass  # none yet
    write_json(path, record)
