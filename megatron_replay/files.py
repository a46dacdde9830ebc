"""Reads files safely whatever they are, and writes files atomically.

Reading: only regular files are opened (a FIFO would block for ever, a device has no end), and each
kind of file is read and checked in one place, whose errors are one line. Writing: a temporary file,
fsync, rename, fsync of the directory.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from megatron_replay.errors import ConfigError, DataError, OutputError, ReplayError

#: Largest JSON, YAML or marker file, in bytes: they are read whole, so a damaged one must not fill
#: memory. The largest that we write, a manifest of a million shards, is a tenth of it.
MAX_TEXT_BYTES = 512 << 20
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def require_regular(path: str | os.PathLike[str], error: type[ReplayError]) -> int:
    """Raise ``error`` unless ``path`` is a readable regular file; returns its size in bytes.

    Call it before a library opens the file by its name.
    """
    with open_regular(path, error) as handle:
        return os.fstat(handle.fileno()).st_size


def open_regular(path: str | os.PathLike[str], error: type[ReplayError]) -> IO[bytes]:
    """Open a regular file for reading bytes, without ever waiting for a writer.

    Raises:
        ReplayError: of class ``error``: it is missing, may not be read, or is no regular file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as reason:
        raise error(f"cannot read: {reason.strerror or reason}", where=path) from reason
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        found = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise error("cannot read", where=path, expected="a regular file", found=found)
    return os.fdopen(fd, "rb")


def read_text(
    path: str | os.PathLike[str], error: type[ReplayError], *, fix: str | None = None
) -> str:
    """All of a text file, UTF-8.

    Raises:
        ReplayError: of class ``error``: it cannot be read, is too large, or is not UTF-8.
    """
    with open_regular(path, error) as handle:
        size, most = os.fstat(handle.fileno()).st_size, f"at most {MAX_TEXT_BYTES} bytes"
        if size > MAX_TEXT_BYTES:
            what = "too large for a file of this name"
            raise error(what, where=path, expected=most, found=f"{size} bytes", fix=fix)
        try:
            return handle.read().decode("utf-8")
        except UnicodeDecodeError as reason:
            raise error(f"damaged: not UTF-8: {reason.reason}", where=path, fix=fix) from reason
        except OSError as reason:  # a bad block, or a file server that is down
            raise error(f"cannot read: {reason.strerror or reason}", where=path) from reason


def read_json(
    path: str | os.PathLike[str], error: type[ReplayError], *, fix: str | None = None
) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ReplayError: of class ``error``: it cannot be read, or is not a JSON object.
    """
    text = read_text(path, error, fix=fix)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as reason:
        raise error(f"damaged: not JSON: {reason}", where=path, fix=fix) from reason
    if not isinstance(value, dict):
        what = "damaged: no JSON object"
        raise error(what, where=path, expected="{...}", found=text[:40], fix=fix)
    return value


def is_number(value: Any) -> bool:
    """Whether ``value``, read from JSON, is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return not isinstance(value, int) or abs(value) < 1 << 1000


def require_apart(
    output: str | os.PathLike[str],
    inputs: Iterable[tuple[str, str | os.PathLike[str]]],
    *,
    flag: str,
) -> None:
    """Raise ConfigError where ``output``, of ``flag``, is one of ``inputs``, links resolved.

    ``inputs``: (flag, path) of each.
    """
    written = Path(output).resolve()
    for name, path in inputs:
        if written == Path(path).resolve():
            raise ConfigError(
                f"the output is also read, as {name}",
                where=f"{flag} {output}",
                expected=f"a path other than {path}",
                fix="Nothing was written. Choose another output",
            )


def output_error(path: str | os.PathLike[str], error: OSError) -> OutputError:
    """The error for a ``path`` that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            "no space left on the device",
            where=path,
            fix="Nothing was published. Free some space or raise the quota, then rerun the command",
        )
    return OutputError(
        f"cannot write: {error.strerror or error}",
        where=path,
        fix="Choose another path, or a directory with write permission",
    )


@contextmanager
def reported(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError of the block into the OutputError for ``path``."""
    try:
        yield
    except OSError as error:
        raise output_error(path, error) from error


def fsync_path(path: str | os.PathLike[str]) -> None:
    """Sync ``path``: a file's content, or a rename in a directory, then survives a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def temporary_path(path: str | os.PathLike[str]) -> Path:
    """The name under which this process writes ``path`` until it is complete."""
    path = Path(path)
    return path.with_name(f".{path.name}.tmp.{os.getpid()}")


@contextmanager
def atomic_file(path: str | os.PathLike[str], mode: Literal["w", "wb"] = "wb") -> Iterator[IO[Any]]:
    """Open ``path`` for writing; it appears under its name complete, or not at all.

    The temporary file is in the same directory and is removed on any error. An OSError of the
    body's own, such as a missing file that it reads, is not changed.

    Raises:
        OutputError: the file cannot be created, written, synced or renamed.
    """
    path = Path(path)
    tmp = temporary_path(path)
    try:
        binary = io.BufferedWriter(_Output(tmp, path))
        with binary if mode == "wb" else io.TextIOWrapper(binary, encoding="utf-8") as handle:
            yield handle
            handle.flush()
            with reported(path):
                os.fsync(handle.fileno())
        with reported(path):
            os.replace(tmp, path)
            fsync_path(path.parent)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise


class _Output(io.FileIO):
    """The file at ``tmp``; a write that fails is reported as one of ``path``."""

    def __init__(self, tmp: Path, path: Path) -> None:
        self._path = path
        with reported(path):
            super().__init__(tmp, "w")

    def write(self, data: Any, /) -> int:
        with reported(self._path):
            return super().write(data)


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
    with reported(path):
        if not path.is_dir():
            path.mkdir(parents=True, exist_ok=True)
            fsync_path(path.parent)
        probe.touch()
        probe.unlink(missing_ok=True)  # another node may share the directory and have this pid
    return path


def sha256_of_files(paths: list[Path], *, error: type[ReplayError] = DataError) -> str:
    """SHA-256 over names, sizes and contents of ``paths``, in the order of their names.

    Raises:
        ReplayError: of class ``error``: one cannot be read, or is no regular file.
    """
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        with open_regular(path, error) as handle:
            size = os.fstat(handle.fileno()).st_size
            digest.update(f"{path.name}\0{size}\0".encode())
            while block := handle.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def differing(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Names that are on one side only, or whose digests differ; ascending."""
    return sorted(name for name in {**expected, **found} if expected.get(name) != found.get(name))
