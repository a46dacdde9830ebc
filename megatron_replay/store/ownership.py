"""Whose a directory is: a store starts in an empty one, and removes nothing but its own files."""

from __future__ import annotations

import os
import re
from pathlib import Path

from megatron_replay.errors import OutputError
from megatron_replay.files import output_error
from megatron_replay.locks import LOCK_FILE, is_ours
from megatron_replay.store.manifest import DESCRIPTION_FILE, read_description

#: What ``files.make_directory`` and ``files.atomic_file`` leave behind when they are killed.
_TRIED = r"\.write-test\.\d+"
_BEGINNING = re.compile(rf"\.store\.json\.tmp\.\d+|{_TRIED}")
_LEFT_AT_THE_TOP = re.compile(rf"\.(store|manifest|report|cost)\.json\.tmp\.\d+|{_TRIED}")
_SHARDS = re.compile(r"\d{4,}")
_LEFT_BESIDE_SHARDS = re.compile(rf"\.shard-\d{{7,}}\.(bin|idx)\.tmp\.\d+|{_TRIED}")
#: Names shown of a directory that is somebody's.
_SHOWN = 3


def require_free(directory: Path) -> None:
    """Raise unless ``directory`` is missing, empty, a store, or what a killed run began one with.

    Raises:
        OutputError: it holds anything else, or cannot be listed.
        StoreError: its store.json is damaged, of another version, or not a store's.
    """
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return
    except OSError as error:
        raise output_error(directory, error) from error
    if DESCRIPTION_FILE in names:
        read_description(directory)
        return
    strangers = [name for name in names if not _is_beginning(directory, name)]
    if strangers:
        more = len(strangers) - _SHOWN
        raise OutputError(
            "the directory holds files that are not a store's",
            where=directory,
            expected="a new or empty directory, or a store",
            found=", ".join(strangers[:_SHOWN]) + (f" and {more} more" if more > 0 else ""),
            fix="Nothing was written: give another directory",
        )


def _is_beginning(directory: Path, name: str) -> bool:
    if name == LOCK_FILE:  # empty: of a run that was killed before it wrote who it is
        return is_ours(directory) or (directory / name).lstat().st_size == 0
    return _BEGINNING.fullmatch(name) is not None


def remove_leftovers(directory: Path) -> None:
    """Remove the temporary files of killed runs from a store whose lock is held.

    Raises:
        OutputError: one cannot be removed.
    """
    try:
        _remove(directory, _LEFT_AT_THE_TOP)
        with os.scandir(directory) as entries:
            for entry in entries:
                if _SHARDS.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                    _remove(entry.path, _LEFT_BESIDE_SHARDS)
    except OSError as error:
        raise output_error(error.filename or directory, error) from error


def _remove(folder: str | Path, names: re.Pattern[str]) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            if names.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                Path(entry.path).unlink(missing_ok=True)
