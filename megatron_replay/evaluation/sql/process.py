"""Runs queries in a process of its own, which is killed when one takes too long.

SQLite cannot be stopped within a call of a function, and ``printf('%*d', …)`` alone runs for
seconds; a process can. It is started afresh, never forked (the caller has threads), imports nothing
heavy (about 0.1 s), lives as long as it behaves, and keeps both answers of a question: only whether
they agree comes back. Both ends speak JSON, a line a message, over one socket.
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
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
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
#: Seconds beyond ``Limits.seconds`` until a query's process is killed: for the two messages, and
#: for comparing the answers.
ALLOWANCE_SECONDS = 1.0
#: Seconds for starting the process, and for opening a database (a slow disk, many tables).
_START_SECONDS = 120.0
#: Seconds that a process may take to end.
_END_SECONDS = 10.0
_ROOT = Path(__file__).resolve().parents[3]
_PROGRAM = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from megatron_replay.evaluation.sql.process import serve; serve(*sys.argv[2:])"
)


class QueryProcess:
    """Asks one database at a time, and ends the process that does it when it is left.

    Everything below raises DataError where the database cannot be opened or read.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._child: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket
        self._unread = b""
        self._database: Path | None = None

    def __enter__(self) -> QueryProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def gold(self, database: Path, sql: str) -> bool:
        """Run a gold query, keep its answer, and return whether it holds a value.

        Raises:
            QueryError: as `run_query`, and "crash" where its process ended by itself.
        """
        self._prepare(database)
        return bool(self._query({"do": "gold", "sql": sql}))

    def agrees(self, sql: str, *, bird_compat: bool) -> bool:
        """Run a predicted query and return whether its answer is that of the last gold query.

        Raises:
            QueryError: as above.
        """
        return bool(self._query({"do": "compare", "sql": sql, "bird_compat": bird_compat}))

    def _query(self, message: Message) -> Any:
        require_length(message["sql"], self._limits)
        return self._ask(message, self._limits.seconds + ALLOWANCE_SECONDS)

    def _prepare(self, database: Path) -> None:
        """Start the process and open the database, where that is not done."""
        try:
            if self._child is None:
                self._start()
                self._ask({"do": "start"}, _START_SECONDS)
            if self._database != database:
                self._database = None
                self._ask({"do": "open", "database": str(database)}, _START_SECONDS)
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

    def _ask(self, message: Message, seconds: float) -> Any:
        """Send a message and return the reply's value; without one in time, end the process."""
        try:
            reply = self._exchange(message, time.monotonic() + seconds)
        except TimeoutError as error:
            self._end()
            raise QueryError("timeout", f"killed after {seconds:g} s") from error
        except OSError as error:
            code = self._end(grace=_END_SECONDS)
            raise QueryError("crash", f"its process ended with exit code {code}") from error
        except BaseException:  # Ctrl-C: what it would answer next is another question's
            self._end()
            raise
        if "damage" in reply:
            raise DataError(reply["damage"])
        if "reason" in reply:
            raise QueryError(reply["reason"], reply["detail"])
        return reply["value"]

    def _exchange(self, message: Message, deadline: float) -> Message:
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
        return None  # stuck in the kernel, on a dead disk, say


def serve(parent: str, limits: str) -> None:
    """The process: answer messages from standard input until it ends, or until the parent does."""
    _die_with(int(parent))
    bounds = Limits(**json.loads(limits))
    _bound(resource.RLIMIT_AS, bounds.max_memory_bytes)
    _bound(resource.RLIMIT_FSIZE, bounds.max_temporary_bytes)
    _bound(resource.RLIMIT_CORE, 0)
    with contextlib.closing(_Answerer(bounds)) as answerer:
        for line in sys.stdin.buffer:
            sys.stdout.write(json.dumps(answerer.reply(json.loads(line))) + "\n")
            sys.stdout.flush()


def _bound(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def _die_with(parent: int) -> None:
    """End when the parent does, however it does, in the middle of a query too.

    Or when the thread does that started the process (prctl(2)): it uses the process itself.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # 1: PR_SET_PDEATHSIG
    if os.getppid() != parent:
        raise SystemExit("the parent has ended")


class _Answerer:
    """What the process remembers: the database that is open, and the last gold answer."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._database: Path | None = None
        self._connection: sqlite3.Connection | None = None
        self._opened = contextlib.ExitStack()
        self._gold: list[Row] = []
        self._is_ordered = False

    def close(self) -> None:
        """Close the database."""
        self._opened.close()

    def reply(self, message: Message) -> Message:
        """The answer to one message."""
        work: dict[str, Callable[[Message], Any]] = {
            "start": lambda _: None,
            "open": self._open,
            "gold": self._run_gold,
            "compare": self._compare,
        }
        try:
            return {"value": work[message["do"]](message)}
        except QueryError as error:
            return {"reason": error.reason, "detail": str(error)}
        except DataError as error:
            return {"damage": str(error)}
        except sqlite3.Error as error:
            damage = DataError(f"cannot read the database: {error}", where=self._database)
            return {"damage": str(damage)}
        except MemoryError:
            return {"reason": "too large", "detail": "more than its process may hold in memory"}

    def _open(self, message: Message) -> None:
        self._opened.close()
        self._database = Path(message["database"])
        self._connection = self._opened.enter_context(open_for_queries(self._database))

    def _run(self, sql: str) -> list[Row]:
        assert self._connection is not None
        return run_query(self._connection, sql, limits=self._limits)

    def _run_gold(self, message: Message) -> bool:
        self._gold = []  # its memory is needed
        self._gold = self._run(message["sql"])
        self._is_ordered = is_ordered(message["sql"])
        return holds_a_value(self._gold)

    def _compare(self, message: Message) -> bool:
        answer, bird_compat = self._run(message["sql"]), message["bird_compat"]
        return same_answer(self._gold, answer, ordered=self._is_ordered, bird_compat=bird_compat)
