"""Runs queries in a process of its own, which is killed when a query takes too long.

SQLite cannot be stopped within one call of a function, and ``printf('%*d', …)`` alone runs for
seconds; a process can be killed. It is started afresh, never forked (the caller has threads), and
imports nothing heavy (about 0.1 s). It keeps both answers of a question: only whether they agree
comes back. Both ends exchange JSON, one line per message, over a socket.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_replay.errors import DataError
from megatron_replay.evaluation.sql.query import (
    Limits,
    QueryError,
    Row,
    holds_a_value,
    is_ordered,
    open_for_queries,
    require_length,
    run_query,
    same_answer,
)

Message = dict[str, Any]
#: Seconds beyond ``Limits.seconds`` until the process is killed: for the messages, and for
#: comparing the answers.
ALLOWANCE_SECONDS = 1.0
#: Seconds for starting the process and opening a database (a slow disk, many tables).
_OPEN_SECONDS = 120.0
#: Seconds that a process may take to end.
_END_SECONDS = 10.0
_ROOT = Path(__file__).resolve().parents[3]
_PROGRAM = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from megatron_replay.evaluation.sql.process import serve; serve(*sys.argv[2:])"
)


class QueryProcess:
    """Runs queries on one database at a time; a context manager that ends the process.

    A process that was killed is replaced by the next question's. All methods raise DataError where
    the database cannot be opened or read.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._child: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket
        self._unread = b""
        self._database: Path | None = None

    def __enter__(self) -> QueryProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def gold(self, database: Path, sql: str) -> bool:
        """Run a gold query, keep its answer, and return whether it holds a value.

        Raises:
            QueryError: as `run_query`, and "crash" where its process ended by itself.
        """
        self._open(database)
        return bool(self._query("gold", sql))

    def compare(self, sql: str) -> tuple[bool, bool]:
        """Run a predicted query; is its answer the last gold query's, and as a set of rows?

        Raises:
            QueryError: as `gold`.
        """
        same, same_set = self._query("compare", sql)
        return same, same_set

    def _query(self, action: str, sql: str) -> Any:
        require_length(sql, self._limits)
        return self._request(action, sql, self._limits.seconds + ALLOWANCE_SECONDS)

    def _open(self, database: Path) -> None:
        """Start the process and open the database, where that is not done."""
        try:
            if self._child is None:
                self._start()
            if self._database != database:
                self._database = None
                self._request("open", str(database), _OPEN_SECONDS)
                self._database = database
        except (QueryError, OSError) as error:
            raise DataError(
                f"cannot start a process that runs queries on it: {error}", where=database
            ) from error

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        arguments = [str(_ROOT), str(os.getpid()), json.dumps(asdict(self._limits))]
        with theirs:
            try:
                self._child = subprocess.Popen(
                    # -I and -S: nothing of the environment, no site-packages.
                    [sys.executable, "-I", "-S", "-c", _PROGRAM, *arguments],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    start_new_session=True,  # Ctrl-C is the parent's
                )
            except BaseException:
                ours.close()
                raise
            self._socket, self._unread = ours, b""

    def _request(self, action: str, argument: str, seconds: float) -> Any:
        """Send a message and return the reply's value; without one in time, end the process."""
        try:
            reply = self._exchange([action, argument], time.monotonic() + seconds)
        except TimeoutError as error:
            self._end()
            raise QueryError("timeout", f"killed after {seconds:g} s") from error
        except OSError as error:
            code = self._end(grace=_END_SECONDS)
            raise QueryError("crash", f"its process ended with exit code {code}") from error
        except BaseException:  # Ctrl-C: the reply that comes next belongs to this query
            self._end()
            raise
        if "damage" in reply:
            raise DataError(reply["damage"])
        if "reason" in reply:
            raise QueryError(reply["reason"], reply["detail"])
        return reply["value"]

    def _exchange(self, message: list[str], deadline: float) -> Message:
        self._wait_until(deadline)
        self._socket.sendall(json.dumps(message).encode() + b"\n")
        while b"\n" not in self._unread:
            self._wait_until(deadline)
            if not (more := self._socket.recv(1 << 16)):
                raise ConnectionError("no answer")
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        reply: Message = json.loads(line)
        return reply

    def _wait_until(self, deadline: float) -> None:
        if (seconds := deadline - time.monotonic()) <= 0:
            raise TimeoutError
        self._socket.settimeout(seconds)

    def _end(self, *, grace: float = 0.0) -> int | None:
        """Kill the process, if it has not ended within ``grace`` seconds; returns its exit code."""
        child, self._child, self._database = self._child, None, None
        if child is None:
            return None
        self._socket.close()
        for seconds in (grace, _END_SECONDS):
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(seconds)
            child.kill()
        return None  # stuck in the kernel, for example on a dead disk


def serve(parent: str, limits: str) -> None:
    """Reply to messages from standard input until it ends, or until the parent process does."""
    # prctl(PR_SET_PDEATHSIG): end when the parent's thread does, in the middle of a query too.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):
        raise SystemExit("the parent has ended")
    bounds = Limits(**json.loads(limits))
    for kind, most in (
        (resource.RLIMIT_AS, bounds.max_memory_bytes),
        (resource.RLIMIT_FSIZE, bounds.max_temporary_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    with contextlib.closing(_Server(bounds)) as server:
        for line in sys.stdin.buffer:
            sys.stdout.write(json.dumps(server.reply(*json.loads(line))) + "\n")
            sys.stdout.flush()


class _Server:
    """The state of the process: the open database, and the last gold answer."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._database = ""
        self._connection: sqlite3.Connection
        self._opened = contextlib.ExitStack()
        self._gold: list[Row] = []
        self._is_ordered = False

    def close(self) -> None:
        self._opened.close()

    def reply(self, action: str, argument: str) -> Message:
        try:
            return {"value": getattr(self, action)(argument)}
        except QueryError as error:
            return {"reason": error.reason, "detail": str(error)}
        except DataError as error:
            return {"damage": str(error)}
        except sqlite3.Error as error:
            damage = DataError(f"cannot read the database: {error}", where=self._database)
            return {"damage": str(damage)}
        except MemoryError:
            return {"reason": "too large", "detail": "more than its process may hold in memory"}

    def open(self, database: str) -> None:
        self._opened.close()
        self._database = database
        self._connection = self._opened.enter_context(open_for_queries(Path(database)))

    def gold(self, sql: str) -> bool:
        self._gold = []  # its memory is needed
        self._gold = run_query(self._connection, sql, limits=self._limits)
        self._is_ordered = is_ordered(sql)
        return holds_a_value(self._gold)

    def compare(self, sql: str) -> tuple[bool, bool]:
        answer = run_query(self._connection, sql, limits=self._limits)
        same = same_answer(self._gold, answer, ordered=self._is_ordered)
        return same, same or set(self._gold) == set(answer)
