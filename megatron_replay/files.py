"""Files that are either wholly there or not there: tmp, fsync, rename, fsync of the directory."""

from __future__ import annotations

import errno
import hashlib
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
    """Open ``path`` for writing; it appears under its name complete, or not at all.

    Raises:
        OutputError: the file cannot be written. The temporary file is removed.
    """
    path = Path(path)
    tmp = path.with_name(f".{path.name}.tmp.{os.getpid()}")
    encoding = None if "b" in mode else "utf-8"
    try:
        with open(tmp, mode, encoding=encoding) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(tmp, path)
        fsync_directory(path.parent)
    except OSError as error:
        tmp.unlink(missing_ok=True)
        raise output_error(path, error) from error
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise


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
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
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
