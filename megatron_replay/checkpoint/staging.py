"""Directories that appear under their names whole: staged beside, synced, renamed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_replay.errors import OutputError
from megatron_replay.files import fsync_path, output_error
from megatron_replay.locks import LOCK_FILE, DirectoryLock, is_ours

#: By which a directory is known as one that may be replaced: a model's, or one of checkpoints.
MODEL, CHECKPOINTS = "config.json", "latest_checkpointed_iteration.txt"
#: Which nobody may replace: the settings and the steps of a training run.
_RUN = ("resolved_config.yaml", "metrics.jsonl")
#: Held while a directory is staged by this process: the lock also proves that it is ours.
_locks: dict[Path, DirectoryLock] = {}


def start_directory(final: Path, *, overwrite: bool = False, marker: str = MODEL) -> Path:
    """Create the staging directory of ``final``; what a killed process left there is removed.

    Args:
        marker: a file by which a directory is known as one that may be replaced.

    Raises:
        OutputError: another process is writing the same; or ``final`` holds something and
            ``overwrite`` was not asked for, or it has no ``marker``, or it is a training run: what
            else lies there is never removed.
    """
    staged = staging_directory(final)
    _require_replaceable(final, overwrite=overwrite, marker=marker)
    if (ours := _locks.pop(staged, None)) is not None:  # of an attempt of this process that failed
        ours.release()
    try:
        if staged.exists():
            _require_ours(staged)
            DirectoryLock(staged, purpose=str(final)).release()  # refused while somebody writes it
            _remove(staged)
        staged.mkdir(parents=True)
        _locks[staged] = DirectoryLock(staged, purpose=str(final))
    except OSError as error:
        raise output_error(final, error) from error
    return staged


def _require_replaceable(final: Path, *, overwrite: bool, marker: str) -> None:
    try:
        held = {path.name for path in final.iterdir()} if final.exists() else set()
    except OSError as error:
        raise output_error(final, error) from error
    held -= {LOCK_FILE}
    if held & set(_RUN):
        raise OutputError(
            "the directory holds a training run",
            where=final,
            found=", ".join(sorted(held & set(_RUN))),
            fix="Choose another: a run is never overwritten",
        )
    if held and not overwrite:
        raise OutputError(
            "the directory is not empty", where=final, fix="Choose another, or give --overwrite"
        )
    if held and marker not in held:
        raise OutputError(
            "the directory holds something else than what would replace it",
            where=final,
            expected=marker,
            found=", ".join(sorted(held)[:3]),
            fix="Choose another, or remove it yourself",
        )


def _require_ours(beside: Path) -> None:
    """Ours has the lock that proves it; killed at its very start or end, an empty one or none."""
    strangers = [path for path in beside.iterdir() if path.name != LOCK_FILE]
    lock = beside / LOCK_FILE
    if (strangers or (lock.exists() and lock.stat().st_size)) and not is_ours(beside):
        raise OutputError(
            "this name is needed to write the directory beside it, and somebody else's files are "
            "there",
            where=beside,
            fix="Move them away, or choose another output",
        )


def _remove(ours: Path) -> None:
    """Remove a directory of ours, the proof that it is last."""
    for path in ours.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()
    shutil.rmtree(ours)


def staging_directory(final: Path) -> Path:
    """Where ``final`` is built: beside it, or beside what it links to."""
    final = final.resolve()
    return final.with_name(f".{final.name}.incomplete")


def publish(staged: Path, final: Path, *, overwrite: bool) -> None:
    """Rename ``staged``, synced, to ``final``; what it replaces is moved aside, then removed."""
    retired = final.with_name(f".{final.name}.replaced")
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
