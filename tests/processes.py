"""The processes of tests: started without a fork of pytest's, waited for without a clock, ended.

A fork copies the thread that calls it and no other; a lock that one of those held stays locked in
the child for ever. pytest's process has threads (tqdm's monitor, loaders, locks), so it never
forks: ``fork`` asks a server for it that has none (tests/fork_server.py). What that has imported
once costs a child nothing; a fresh interpreter would take 5 s and more.

``adopt_orphans`` makes this process the parent of all whose own parent died, such as a killed
torchrun's workers: what a test started is what hangs below this process, and ``ended`` ends it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
#: After this long something hangs. No test depends on it: a machine so busy does not exist.
HANG_SECONDS = 3600.0
_PR_SET_CHILD_SUBREAPER = 36
_server: tuple[subprocess.Popen[bytes], socket.socket] | None = None


def adopt_orphans() -> None:
    """Become the parent of processes below this one when their own parents die."""
    if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1):
        raise OSError("prctl(PR_SET_CHILD_SUBREAPER) failed")


def start_server() -> socket.socket:
    """The fork server; it takes seconds to come up, and requests wait for it."""
    global _server
    if _server is None:
        adopt_orphans()
        ours, theirs = socket.socketpair()
        with theirs:
            server = subprocess.Popen(
                [sys.executable, "-m", "tests.fork_server", str(theirs.fileno())],
                cwd=ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C at a terminal is not for it
            )  # fmt: skip
        _server = server, ours
    return _server[1]


def fork(function: Callable[..., object], *arguments: Any) -> int:
    """The pid of a new child of this process that calls ``function(*arguments)`` and exits.

    In a session of its own, with this process's variables, directory, warning filters, stdout and
    stderr; with exit code 1 and a traceback if the function raises. Function and arguments are
    pickled.
    """
    request = {
        "call": pickle.dumps((function, arguments)), "parent": os.getpid(), "cwd": os.getcwd(),
        "environ": dict(os.environ), "filters": list(warnings.filters),  # type: ignore[attr-defined]
    }  # fmt: skip
    requests = start_server()
    socket.send_fds(requests, [b"!"], [1, 2])
    connection = Connection(os.dup(requests.fileno()))
    connection.send_bytes(pickle.dumps(request))
    answer = connection.recv()
    if not isinstance(answer, int):
        raise AssertionError(f"the fork server refused:\n{answer}")
    return answer


def wait(pid: int, seconds: float = HANG_SECONDS) -> int | None:
    """The exit code of a child, negative for a signal; None where it runs for longer than this."""
    pidfd = os.pidfd_open(pid)
    try:
        ended, _, _ = select.select([pidfd], [], [], seconds)
    finally:
        os.close(pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if ended else None


def until(condition: Callable[[], object], pid: int) -> None:
    """Wait until ``condition()`` holds, which the child ``pid`` is to bring about."""
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) and not condition():
            raise AssertionError(f"process {pid} ended before {condition}")
        if time.monotonic() > deadline:
            raise AssertionError(f"process {pid} hangs before {condition}")
        time.sleep(0.005)


def children() -> set[int]:
    """Processes whose parent this one is, but for those that live as long as it does."""
    found = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # that thread has ended, and left its children to others
            found.update(map(int, path.read_text().split()))
    # multiprocessing starts the second with its first spawned process.
    keep = {_server[0].pid if _server else None, resource_tracker._resource_tracker._pid}
    return found - keep


@contextlib.contextmanager
def ended() -> Iterator[list[int]]:
    """End whatever the block starts and leaves, with all below it; the list then holds its pids."""
    before, alive = children(), list[int]()
    try:
        yield alive
    finally:
        while left := children() - before:  # who loses a parent here becomes a child of this one
            for pid in left:
                with contextlib.suppress(ChildProcessError):  # waited for elsewhere
                    if os.waitpid(pid, os.WNOHANG) == (0, 0):
                        command = Path(f"/proc/{pid}/cmdline").read_bytes()
                        if not command:  # it is just beginning or just ending: look again
                            time.sleep(0.001)
                            continue
                        if b"resource_tracker" not in command:  # whose end closes its pipe
                            alive.append(pid)
                        os.kill(pid, signal.SIGKILL)
                        os.waitpid(pid, 0)
