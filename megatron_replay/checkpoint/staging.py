"""Directories that appear under their names complete: staged next to them, synced, renamed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_replay.errors import OutputError, few
from megatron_replay.files import fsync_path, read_json, reported, write_json
from megatron_replay.locks import LOCK_FILE, DirectoryLock, is_ours

#: Lists size and time of each file of a published directory; one that holds exactly these may be
#: replaced.
WRITTEN = ".written"
#: Held while this process stages a directory. The lock file also proves that the directory is ours.
_locks: dict[Path, DirectoryLock] = {}


def start_directory(final: Path, *, overwrite: bool = False) -> Path:
    """Create the staging directory of ``final``; removes what a killed process left there.

    Raises:
        OutputError: another process is writing the same directory; ``final`` is not empty and
            ``overwrite`` is False; or ``final`` is not exactly what ``publish`` left there: files
            that were added or changed since are never removed.
    """
    staged = staging_directory(final)
    require_replaceable(final, overwrite=overwrite)
    if (ours := _locks.pop(staged, None)) is not None:  # an earlier attempt failed
        ours.release()
    with reported(final):
        if staged.exists():
            _require_ours(staged)
            DirectoryLock(staged, purpose=str(final)).release()  # refused if in use
            _remove(staged)
        staged.mkdir(parents=True)
        _locks[staged] = DirectoryLock(staged, purpose=str(final))
    return staged


def require_replaceable(final: Path, *, overwrite: bool) -> None:
    """Raise OutputError unless ``start_directory`` may build ``final``."""
    with reported(final):
        held = _contents(final) if final.exists() else {}
    if held and not overwrite:
        raise OutputError(
            "the directory is not empty",
            where=final,
            fix="Choose another, or give --overwrite to replace an earlier conversion",
        )
    written = read_json(final / WRITTEN, OutputError) if (final / WRITTEN).exists() else {}
    strange = [name for name in sorted(held) if held[name] != written.get(name)]
    if strange:
        raise OutputError(
            "the directory holds files that this program did not write, or that changed since",
            where=final,
            found=few(strange),
            fix="Choose another, or remove it yourself: --overwrite replaces nothing else",
        )


def _contents(directory: Path) -> dict[str, list[int]]:
    """[bytes, ns of last change] of each file below; [] of links, empty folders and the like."""
    found: dict[str, list[int]] = {}
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            below = _contents(path)
            found.update({f"{path.name}/{name}": about for name, about in below.items()})
            if not below:
                found[f"{path.name}/"] = []
        elif path.name not in (LOCK_FILE, WRITTEN):
            is_file = path.is_file() and not path.is_symlink()
            stat = path.lstat()
            found[path.name] = [stat.st_size, stat.st_mtime_ns] if is_file else []
    return found


def _require_ours(beside: Path) -> None:
    """Ours has our lock file; if killed at its very start or end, an empty one or nothing."""
    strangers = [path for path in beside.iterdir() if path.name != LOCK_FILE]
    lock = beside / LOCK_FILE
    if (strangers or (lock.exists() and lock.stat().st_size)) and not is_ours(beside):
        raise OutputError(
            "this name is needed to write the directory beside it, and holds other files",
            where=beside,
            fix="Move them away, or choose another output",
        )


def _remove(ours: Path) -> None:
    """Remove a directory of ours; the lock file, which proves that, goes last."""
    for path in ours.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()
    shutil.rmtree(ours)


def staging_directory(final: Path) -> Path:
    """The directory in which ``final`` is built: next to it, or next to the target of a link."""
    final = final.resolve()
    return final.with_name(f".{final.name}.incomplete")


def publish(staged: Path, final: Path, *, overwrite: bool) -> None:
    """Rename ``staged``, synced, to ``final``; what it replaces is moved aside, then removed.

    Raises:
        OutputError: it cannot be renamed, for example because ``final`` is no longer empty.
    """
    final = final.resolve()
    retired = final.with_name(f".{final.name}.replaced")
    with reported(final):
        write_json(staged / WRITTEN, _contents(staged))
        fsync_path(staged)
        if overwrite and final.exists():
            if retired.exists():
                _require_ours(retired)
                _remove(retired)
            retired.mkdir()
            DirectoryLock(retired, purpose=str(final)).release()
            os.replace(final, retired / "old")
        os.replace(staged, final)  # fails if there is a directory that is not empty
        _locks.pop(staged).release()
        (final / LOCK_FILE).unlink()
        fsync_path(final.parent)
        if overwrite and retired.exists():
            _remove(retired)
