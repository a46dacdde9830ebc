"""Forks the processes of tests, in a process that never has a thread: see tests/processes.py.

python -m tests.fork_server SOCKET, where SOCKET is an inherited file descriptor. For each request
it imports what the function needs, so that later requests find it loaded, and forks twice: the
process between ends at once, so that the child becomes one of the requesting process.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import signal
import socket
import sys
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


def _serve(requests: socket.socket) -> None:
    connection = Connection(requests.fileno())
    while True:
        _, outputs, _, _ = socket.recv_fds(requests, 1, 2)
        if not outputs:  # the requesting process has gone
            os._exit(0)
        request = pickle.loads(connection.recv_bytes())
        try:
            function, arguments = pickle.loads(request["call"])
            threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
            if len(threads) > 1:
                raise RuntimeError(f"the fork server has threads: {threads}")
        except BaseException:
            connection.send(traceback.format_exc())
            for output in outputs:
                os.close(output)
            continue
        gc.freeze()  # the collector would copy the pages of all that was imported into every child
        read, write = os.pipe()
        between = os.fork()
        if between == 0:
            me = os.getpid()
            if child := os.fork():
                os.write(write, str(child).encode())
                os._exit(0)
            for fd, output in enumerate(outputs, start=1):
                os.dup2(output, fd)
            for fd in (read, write, requests.fileno(), *outputs):
                os.close(fd)
            _be(request, between=me)
            _call(function, arguments)
        gc.unfreeze()
        os.waitpid(between, 0)
        connection.send(int(os.read(read, 20)))
        for fd in (read, write, *outputs):
            os.close(fd)
        del function, arguments, request


def _be(request: dict[str, Any], *, between: int) -> None:
    """Become a child of the requesting process: its variables, directory and warning filters."""
    os.setsid()
    while os.getppid() == between:
        os.sched_yield()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != request["parent"]:  # it has died meanwhile
        os._exit(1)
    os.environ.clear()
    os.environ.update(request["environ"])
    os.chdir(request["cwd"])
    warnings.resetwarnings()
    warnings.filters.extend(request["filters"])  # type: ignore[attr-defined]


def _call(function: Any, arguments: tuple[Any, ...]) -> None:
    code = 1
    try:
        function(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # no atexit handlers of the server's libraries


if __name__ == "__main__":
    import torch

    from megatron_replay import platform

    platform.select("cpu").prepare()
    torch.set_num_threads(1)
    _serve(socket.socket(fileno=int(sys.argv[1])))
