"""The layout of a directory of training checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_replay.errors import CheckpointError
from megatron_replay.files import read_text

#: Megatron's file with the number of the newest complete iteration.
LATEST = "latest_checkpointed_iteration.txt"
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
