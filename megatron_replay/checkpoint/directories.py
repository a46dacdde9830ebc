"""A directory of training checkpoints: its iterations, their checksums, and which are kept.

Everything is derived from the directory's content, after the newest iteration and its marker are on
disk. If a run is killed in any function here, the next run completes the same work.

``checksums.json`` has the size and crc32 of each other file of an iteration, checked before
loading: torch would load a file with a flipped bit, which may change a weight slightly or by 10^30.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path

from megatron_replay.errors import CheckpointError
from megatron_replay.files import (
    fsync_path,
    open_regular,
    read_json,
    read_text,
    reported,
    write_json,
)

#: Megatron's file with the number of the newest complete iteration.
LATEST = "latest_checkpointed_iteration.txt"
#: In each iteration, its ``TrainState``.
STATE = "train_state.json"
CHECKSUMS = "checksums.json"
_BLOCK = 1 << 22
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


def checkpoint_type(directory: Path) -> str:
    """ "hf", "mcore" (a run's checkpoints) or "mg" (one pickle a rank).

    Raises:
        CheckpointError: there is no checkpoint in ``directory``.
    """
    number = latest_iteration(directory)
    if number is not None:
        is_mg = any(iteration_directory(directory, number).glob("mp_rank_*"))
        return "mg" if is_mg else "mcore"
    if (directory / "config.json").exists():
        return "hf"
    raise CheckpointError(
        "no checkpoint here",
        where=directory,
        expected=f"config.json (Hugging Face) or {LATEST}",
        found="neither" if directory.is_dir() else "no such directory",
    )


def iteration_directory(directory: Path, iteration: int) -> Path:
    """``directory/iter_0000100``."""
    return directory / f"iter_{iteration:07d}"


def iterations(directory: Path) -> list[int]:
    """The numbers of the complete checkpoints in ``directory``, ascending."""
    names = [path.name.removeprefix("iter_") for path in directory.glob("iter_*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())


def unfinished(directory: Path) -> list[Path]:
    """The directories that killed saves left in ``directory``."""
    return sorted(path for path in directory.glob(".iter_*") if _UNFINISHED.fullmatch(path.name))


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
    for path in directory.glob(".iter_*"):
        if _UNFINISHED.fullmatch(path.name) or _REMOVED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    for path in directory.glob(f".{LATEST}.tmp.*"):
        if path.name.rpartition(".")[2].isdecimal():
            with reported(path):
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
    for number in [number for number in iterations(directory) if number <= newest][:-last]:
        remove_iteration(directory, number)


def remove_iteration(directory: Path, iteration: int) -> None:
    """Remove an iteration; it is renamed first, so no incomplete one ever has the name.

    Raises:
        OutputError: it cannot be removed.
    """
    path = iteration_directory(directory, iteration)
    remains = directory / f".{path.name}.removed"
    with reported(path):
        if remains.exists():
            shutil.rmtree(remains)
        os.replace(path, remains)
        fsync_path(directory)
        shutil.rmtree(remains)


def write_checksums(directory: Path, known: Mapping[str, tuple[int, int]]) -> None:
    """Write the sums of all files of an iteration.

    Args:
        known: (bytes, crc32) by name, computed while writing; the other files are read again.
    """
    names = sorted(path.name for path in directory.iterdir() if path.name != CHECKSUMS)
    sums = {name: known.get(name) or _sums(directory / name) for name in names}
    files = {name: {"bytes": size, "crc32": crc} for name, (size, crc) in sums.items()}
    write_json(directory / CHECKSUMS, {"files": files})


def require_intact(directory: Path, *, name: str | None = None, rank: int = 0, of: int = 1) -> None:
    """Read files of an iteration and compare them with their checksums.

    Args:
        name: the only file to read; None: rank ``rank``'s share of all files, ``of`` ranks in all.

    Raises:
        CheckpointError: one is missing or damaged.
    """
    path = directory / CHECKSUMS
    files = read_json(path, CheckpointError).get("files")
    try:
        expected = {
            str(name): (int(about["bytes"]), int(about["crc32"]))
            for name, about in files.items()  # type: ignore[union-attr]
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError("damaged", where=path) from error
    if name is not None and name not in expected:
        raise CheckpointError(f"does not list {name}", where=path)
    # Every of-th file, the largest first, gives the ranks similar shares.
    share = sorted(expected, key=lambda name: (-expected[name][0], name))[rank::of]
    for each in share if name is None else [name]:
        file = directory / os.path.basename(each)
        found = _sums(file)
        if found != expected[each]:
            raise CheckpointError(
                "damaged: the file differs from what was written",
                where=file,
                expected="{} bytes, crc32 {}".format(*expected[each]),
                found="{} bytes, crc32 {}".format(*found),
                fix="Copy it again from an intact copy, or use another iteration",
            )


def _sums(path: Path) -> tuple[int, int]:
    """(bytes, crc32) of a file."""
    size = crc = 0
    with open_regular(path, CheckpointError) as handle:
        while block := handle.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc
