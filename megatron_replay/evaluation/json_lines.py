"""A file of JSON objects, one a line, that several processes append to and kills interrupt.

A kill can only leave the last line torn: it is dropped where the file is read, cut off where it is
appended to, and said.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_replay.errors import DataError, OutputError
from megatron_replay.files import open_regular, output_error

#: How long to wait while other processes append.
LOCK_SECONDS = 60.0
#: Bytes that are read at once at the file's end, a few lines; and no line is longer than this.
_BLOCK, _LONGEST = 1 << 16, 1 << 26


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file, less a torn last one.

    Raises:
        DataError: it cannot be read.
    """
    with open_regular(path, DataError) as handle:
        text = handle.read()
    whole = text[: text.rfind(b"\n") + 1]
    last = text[len(whole) :]
    if last and parse_object(last) is None:
        _say_torn(path)
        text = whole
    return text.splitlines()


def append_line(path: Path, line: str, is_ours: Callable[[bytes], bool], *, what: str) -> None:
    """Append one line with one write, synced; writers take turns.

    Args:
        is_ours: whether a first line, which may be torn, is one of the file that is meant.
        what: what its lines are, for messages: "rows".

    Raises:
        OutputError: the file cannot be written, holds something else, or another process keeps it
            locked for ``LOCK_SECONDS``.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o644)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OutputError("cannot append", where=path, expected="a regular file")
            _lock(path, fd)
            _require_ours(path, fd, is_ours, what)
            _mend_end(path, fd)
            # A file name's byte that is not UTF-8 becomes an escape, which JSON has, too.
            data = f"{line}\n".encode("utf-8", "backslashreplace")
            while data:  # the disk may take less than all
                data = data[os.write(fd, data) :]
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise output_error(path, error) from error


def parse_object(line: bytes) -> dict[str, Any] | None:
    """The JSON object that a line is; no torn one is: the brace that closes it is its last byte."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _lock(path: Path, fd: int) -> None:
    """Wait for the lock, which a writer holds for as long as one line takes."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise OutputError(
                    f"another process has kept this file locked for {LOCK_SECONDS:g} s",
                    where=path,
                    fix="End it (fuser names it), or append to another file",
                ) from None
            time.sleep(0.01)


def _require_ours(path: Path, fd: int, is_ours: Callable[[bytes], bool], what: str) -> None:
    with os.fdopen(os.dup(fd), "rb") as handle:
        handle.seek(0)
        first = handle.readline(_LONGEST)
    if first and not is_ours(first):
        raise OutputError(
            f"this file holds something else than {what}, so nothing is appended",
            where=path,
            found=repr(first[:60].decode("utf-8", "replace")),
            fix="Give another file",
        )


def _mend_end(path: Path, fd: int) -> None:
    """Cut a torn last line off; end a whole one that only lacks its newline.

    Reads backwards, no further than the last line goes.
    """
    start = end = os.fstat(fd).st_size
    last = b""
    while start and b"\n" not in last:
        start = max(0, start - (max(_BLOCK, len(last)) if last else 1))
        last = os.pread(fd, end - len(last) - start, start) + last
    last = last[last.rfind(b"\n") + 1 :]
    if not last:
        return
    if parse_object(last) is not None:
        os.write(fd, b"\n")
    else:
        _say_torn(path)
        os.ftruncate(fd, end - len(last))


def _say_torn(path: Path) -> None:
    print(f"{path}: dropped its last line, torn by a kill", file=sys.stderr)
