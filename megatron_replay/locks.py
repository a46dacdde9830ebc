"""Allows one writer per directory, on local disks, on NFS and on Lustre.

A directory that this project writes to has a file ``.lock``: an flock on it keeps other processes
out, and a record in it names the owner. The kernel releases the flock when the owner ends.

An flock may not reach other machines: Lustre mounted with ``localflock`` and NFS with
``local_lock`` silently keep it on one. So the owner also increments a counter in its record every
few seconds, and a process that finds the record of another machine watches whether it changes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from megatron_replay.errors import OutputError
from megatron_replay.files import reported

LOCK_FILE = ".lock"
_PROGRAM = "megatron_replay"
#: How each record begins.
_BEGINNING = f'{{"program": "{_PROGRAM}"'.encode()
#: Seconds between two increments by an owner, and how long another machine's record is watched for
#: one. NFS reads from its server when a file is opened, so an increment shows at once; a busy owner
#: may be late by a few.
BEAT_SECONDS, WATCH_SECONDS = 5.0, 60.0


class DirectoryLock:
    """Holds ``directory`` for this process until ``release``, or until the object or process ends.

    The lock file stays when it is released: removing it would let two processes hold locks on two
    files of one name. It also proves that the directory is this project's (``is_ours``).

    Args:
        purpose: what is written here ("this store"), for the error of a process that is kept out.

    Raises:
        OutputError: another process holds it, the file is not our lock, or it cannot be written.
    """

    def __init__(self, directory: str | os.PathLike[str], *, purpose: str) -> None:
        path = Path(directory) / LOCK_FILE
        record = {
            "program": _PROGRAM,
            "purpose": purpose,
            "host": socket.gethostname(),
            "machine": this_machine(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "beat": 0,
        }
        with reported(path), contextlib.ExitStack() as undo:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
            undo.callback(os.close, fd)
            _require_ours(fd, path)
            _keep_others_out(fd, path, purpose)
            _write(fd, record)
            undo.pop_all()
        stop = threading.Event()
        # The thread has its own descriptor, so it never writes to one that was closed and reused.
        thread = threading.Thread(
            target=_beat, args=(os.dup(fd), record, stop), name="lock", daemon=True
        )
        thread.start()
        self.release = weakref.finalize(self, _let_go, fd, stop, thread)


def is_ours(directory: str | os.PathLike[str], purpose: str | None = None) -> bool:
    """Whether the last lock taken here was one of this project, for ``purpose`` if given."""
    record = _read(Path(directory) / LOCK_FILE)
    return record.get("program") == _PROGRAM and purpose in (None, record.get("purpose"))


def _require_ours(fd: int, path: Path) -> None:
    """Refuse another program's file. A kill can truncate our record; a power cut can zero it."""
    content = os.pread(fd, 4096, 0).strip(b"\0 \n") if stat.S_ISREG(os.fstat(fd).st_mode) else b"?"
    if content[: len(_BEGINNING)] != _BEGINNING[: len(content)]:
        raise OutputError(
            "this name is needed for a lock, but another program's file is there",
            where=path,
            fix="Move that file, or choose another directory",
        )


def _keep_others_out(fd: int, path: Path, purpose: str) -> None:
    found, is_certain = _read(path), True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _is_taken(path, purpose) from error
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        is_certain = False
        print(
            f"{path}: this file system has no locks ({error.strerror}). The record in this file "
            "keeps later runs out, but not two runs that start at the same moment",
            file=sys.stderr,
        )
    is_elsewhere = found.get("machine") != this_machine()
    if "pid" in found and (is_elsewhere or not is_certain) and _is_alive(path, found):
        raise _is_taken(path, purpose)


def this_machine() -> str:
    """Identifies the running kernel; the containers of one machine share it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _write(fd: int, record: dict[str, Any]) -> None:
    data = json.dumps(record).encode()
    os.pwrite(fd, data.ljust(os.fstat(fd).st_size), 0)
    os.fsync(fd)


def _read(path: Path) -> dict[str, Any]:
    """The record; {} where there is none that can be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as handle:
            record = json.loads(handle.read(4096) or b"{}")
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _beat(fd: int, record: dict[str, Any], stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        record["beat"] += 1
        with contextlib.suppress(OSError):  # a full disk also fails the files written here
            _write(fd, record)
    with contextlib.suppress(OSError):
        # Without a pid, no later process watches this record.
        _write(fd, {"program": _PROGRAM, "purpose": record["purpose"]})
    os.close(fd)


def _let_go(fd: int, stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    thread.join(BEAT_SECONDS)
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def _is_alive(path: Path, found: dict[str, Any]) -> bool:
    """Whether the owner that the record names still increments its counter."""
    print(
        f"{path}: {_owner(found)}, wrote here last and did not release its lock. Checking for "
        f"{WATCH_SECONDS:.0f} s whether it is alive",
        file=sys.stderr,
        flush=True,
    )
    deadline = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < deadline:
        time.sleep(WATCH_SECONDS / 60)
        if _read(path).get("beat") != found.get("beat"):
            return True
    return False


def _owner(record: dict[str, Any]) -> str:
    pid, host, since = (record.get(name, "?") for name in ("pid", "host", "since"))
    return f"process {pid} on {host}, since {since}"


def _is_taken(path: Path, purpose: str) -> OutputError:
    record = _read(path)
    return OutputError(
        f"another run is writing {purpose}",
        where=path.parent,
        found=_owner(record) if "pid" in record else None,
        fix="Wait until it has ended, stop it, or choose another directory",
    )
