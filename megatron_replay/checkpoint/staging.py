"""Directories that appear under their names whole: staged beside, synced, renamed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_replay.errors import OutputError
from megatron_replay.files import fsync_directory, output_error


def start_directory(final: Path, *, overwrite: bool = False, marker: str = "config.json") -> Path:
    """Create the staging directory of ``final``; what a killed export left there is removed.

    Args:
        marker: a file by which a directory is known as one that may be replaced.

    Raises:
        OutputError: ``final`` holds something and ``overwrite`` was not asked for, or it has no
            ``marker``: what else lies there is never removed.
    """
    staged = staging_directory(final)
    try:
        held = {path.name for path in final.iterdir()} if final.exists() else set()
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
        if staged.exists():
            shutil.rmtree(staged)
        staged.mkdir(parents=True)
    except OSError as error:
        raise output_error(final, error) from error
    return staged


def staging_directory(final: Path) -> Path:
    """Where ``final`` is built: beside it, or beside what it links to."""
    final = final.resolve()
    return final.with_name(f".{final.name}.incomplete")


def publish(staged: Path, final: Path, *, overwrite: bool) -> None:
    """Rename ``staged``, synced, to ``final``; what it replaces is moved aside, then removed."""
    retired = final.with_name(f".{final.name}.replaced")
    fsync_directory(staged)
    if overwrite and final.exists():
        if retired.exists():
            shutil.rmtree(retired)
        os.replace(final, retired)
    os.replace(staged, final)  # fails if there is a directory that is not empty
    fsync_directory(final.parent)
    if overwrite and retired.exists():
        shutil.rmtree(retired)
