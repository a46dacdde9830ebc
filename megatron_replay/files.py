"""Files that are either wholly there or not there: tmp, fsync, rename, fsync of the directory."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_replay.errors import OutputError


def output_error(path: str | os.PathLike[str], error: OSError) -> OutputError:
    """The one line a user reads when ``path`` could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            "no space left on the device",
            where=path,
            fix="Nothing was published: free some space and run the same command again",
        )
    return OutputError(
        f"cannot write: {error.strerror or error}",
        where=path,
        fix="Choose a directory you may write to",
    )


def fsync_directory(path: str | os.PathLike[str]) -> None:
    """Make a rename inside ``path`` survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_file(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open ``path`` for writing, "w" or "wb"; it appears under its name complete, or not at all.

    The temporary file beside it is removed when anything goes wrong. An OSError that the body
    raises for reasons of its own, a file it reads being absent, say, passes through as it is.

    Raises:
        OutputError: the file cannot be created, written, synced or renamed.
    """
    path = Path(path)
    tmp = path.with_name(f".{path.name}.tmp.{os.getpid()}")
    try:
        with _open(tmp, path, mode) as handle:
            yield handle
            handle.flush()
            with _reported(path):
                os.fsync(handle.fileno())
        with _reported(path):
            os.replace(tmp, path)
            fsync_directory(path.parent)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise


class _Output(io.FileIO):
    """The file at ``tmp``; a write that fails is reported as one of ``path``."""

    def __init__(self, tmp: Path, path: Path) -> None:
        self._path = path
        with _reported(path):
            super().__init__(tmp, "w")

    def write(self, data: Any, /) -> int:
        with _reported(self._path):
            return super().write(data)


def _open(tmp: Path, path: Path, mode: str) -> IO[Any]:
    if mode not in ("w", "wb"):
        raise ValueError(f"atomic_file writes with mode 'w' or 'wb', not {mode!r}")
    binary = io.BufferedWriter(_Output(tmp, path))
    return binary if mode == "wb" else io.TextIOWrapper(binary, encoding="utf-8")


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into the line for ``path``."""
    try:
        yield
    except OSError as error:
        raise output_error(path, error) from error


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON with sorted keys, atomically."""
    with atomic_file(path, "w") as handle:
        json.dump(value, handle, indent=2, sort_keys=True)
        handle.write("\n")


def make_directory(path: str | os.PathLike[str]) -> Path:
    """Create ``path`` and its parents if needed, and check that it can be written to.

    Raises:
        OutputError: it cannot be created or written to.
    """
    path = Path(path)
    probe = path / f".write-test.{os.getpid()}"
    try:
        if not path.is_dir():
            path.mkdir(parents=True, exist_ok=True)
            fsync_directory(path.parent)
        probe.touch()
        probe.unlink(missing_ok=True)  # another rank's machine may share directory and number
    except OSError as error:
        raise output_error(path, error) from error
    return path


def sha256_of_files(paths: list[Path]) -> str:
    """SHA-256 over names, sizes and contents of ``paths``, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with open(path, "rb") as handle:
            while block := handle.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
