"""The process that runs queries: what a query may do, what it may cost, and how answers compare.

Generated SQL is untrusted. It runs on a read-only, immutable connection; an authorizer allows only
reading and a list of pure functions; limits of time, rows and bytes bound its cost. SQLite looks at
the clock between instructions, and one call of a function is one instruction: a longer one is
stopped by killing the process (``execution.py``). The process starts at once, because nothing
imported here is heavy, and runs without site-packages.

Answers are compared as multisets of rows, in order where the gold query has an ORDER BY.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_replay.errors import DataError
from megatron_replay.evaluation.sql.database import QUOTED_OR_COMMENT, open_read_only

Row = tuple[Any, ...]

_RECURSIVE = 33  # SQLITE_RECURSIVE, a recursive common table expression, has no name in Python
_ALLOWED_ACTIONS = {
    sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, _RECURSIVE
}  # fmt: skip
# sqlite.org/lang_corefunc.html, lang_aggfunc.html, lang_datefunc.html, lang_mathfunc.html,
# windowfunctions.html, json1.html: those whose value depends on the arguments alone, plus dates.
_FUNCTION_NAMES = (
    "abs char coalesce concat concat_ws format glob hex ifnull iif instr length like likelihood "
    "likely lower ltrim max min nullif octet_length printf quote replace round rtrim sign "
    "soundex substr substring trim typeof unhex unicode unlikely upper zeroblob avg count "
    "group_concat string_agg sum total date time datetime julianday unixepoch strftime timediff "
    "current_date current_time current_timestamp acos acosh asin asinh atan atan2 atanh ceil "
    "ceiling cos cosh degrees exp floor ln log log10 log2 mod pi pow power radians sin sinh "
    "sqrt tan tanh trunc row_number rank dense_rank percent_rank cume_dist ntile lag lead "
    "first_value last_value nth_value json json_array json_array_length json_extract "
    "json_group_array json_group_object json_object json_quote json_type json_valid -> ->> "
)
_ALLOWED_FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
# By number, because Python 3.10 has no names for SQLite's errors, and gives their messages only.
_ERROR = 1
_CODES = {
    "interrupted": 9, "disk I/O error": 10, "database disk image is malformed": 11,
    "database or disk is full": 13, "unable to open database file": 14,
    "string or blob too big": 18, "file is not a database": 26,
}  # fmt: skip
_REASONS = {
    9: "timeout",  # INTERRUPT
    18: "too large",  # TOOBIG
    778: "too large",  # IOERR_WRITE: a temporary file beyond the process's limit
    3082: "too large",  # IOERR_NOMEM
}
#: Errors that are the file's or the machine's, and never the query's: IOERR, CORRUPT, FULL,
#: CANTOPEN, NOTADB.
_DAMAGE = {10, 11, 13, 14, 26}
_LIMIT_LENGTH = 0
# The handler runs every so many virtual-machine instructions, about 10 µs: 10,000 are no faster,
# 100 cost a tenth of the time.
_INSTRUCTIONS_PER_CHECK = 1_000


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one query may cost."""

    seconds: float = 2.0  # wall-clock time
    gold_seconds: float = 30.0  # of a gold query
    slow_seconds: float = 1.0  # beyond which a gold query's answer is kept, if it is small:
    max_kept_rows: int = 1_000
    max_kept_length: int = 1_000_000  # characters of its JSON
    max_rows: int = 100_000  # of an answer
    max_bytes: int = 200_000_000  # of an answer, as Python's objects
    max_value_bytes: int = 1_000_000  # of one string or blob, stored ones too (Python >= 3.11)
    max_query_length: int = 100_000  # characters
    # Address space of the process: two answers, each at most twice as large as max_bytes, and
    # what SQLite needs.
    max_memory_bytes: int = 1 << 30
    max_temporary_bytes: int = 4 << 30  # of one file, which SQLite sorts with


class QueryError(Exception):
    """A query that was refused, failed, or cost too much; ``reason`` is a short stable phrase."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


#: A query whose answer may be another one later; that of a slow gold query is not kept.
_CHANGING = re.compile(
    r"'now'|\bcurrent_(date|time|timestamp)\b|\b(random|randomblob|changes)\s*\("
    r"|\b(date|time|datetime|julianday|unixepoch)\s*\(\s*\)|\bstrftime\s*\(\s*'[^']*'\s*\)",
    re.IGNORECASE,
)


def run_query(connection: sqlite3.Connection, sql: str, limits: Limits) -> list[Row]:
    """Run one SELECT (or WITH … SELECT) on a connection of `open_read_only`; return its rows.

    Raises:
        QueryError: reason "not a query", "denied", "timeout", "too large" or "sql error".
        sqlite3.Error: the database is damaged, or the machine has no room for temporary files.
    """
    deadline = time.monotonic() + limits.seconds
    if len(sql) > limits.max_query_length:
        raise QueryError("too large", f"a query of more than {limits.max_query_length} characters")
    first_word = re.match(r"[a-z]*", QUOTED_OR_COMMENT.sub(" ", sql).strip().lower())
    if first_word is None or first_word[0] not in ("select", "with"):
        raise QueryError("not a query", "only SELECT is run")
    denied: list[int] = []

    def authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
        pure = action != sqlite3.SQLITE_FUNCTION or str(second).lower() in _ALLOWED_FUNCTIONS
        if action in _ALLOWED_ACTIONS and pure:
            return sqlite3.SQLITE_OK
        denied.append(action)
        return sqlite3.SQLITE_DENY

    connection.set_authorizer(authorize)
    connection.set_progress_handler(lambda: time.monotonic() > deadline, _INSTRUCTIONS_PER_CHECK)
    if sys.version_info >= (3, 11):  # before, the process's memory is the only limit
        connection.setlimit(_LIMIT_LENGTH, limits.max_value_bytes)
    try:
        with closing(connection.execute(sql)) as cursor:
            return _fetch(cursor, limits, deadline)
    except MemoryError as error:
        raise QueryError("too large", "more than its process may hold in memory") from error
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
        # ValueError: a NUL or a lone surrogate, which never reach SQLite.
        if denied:
            raise QueryError("denied", f"denied: {error}") from error
        code = getattr(error, "sqlite_errorcode", _CODES.get(str(error), _ERROR))
        reason = _REASONS.get(code, "sql error")
        if reason == "sql error" and code & 0xFF in _DAMAGE:
            raise
        raise QueryError(reason, str(error)) from error


def _fetch(cursor: sqlite3.Cursor, limits: Limits, deadline: float) -> list[Row]:
    rows: list[Row] = []
    size = 0
    for row in cursor:
        rows.append(row)
        size += sys.getsizeof(row) + sum(map(sys.getsizeof, row))
        if len(rows) > limits.max_rows:
            raise QueryError("too large", f"more than {limits.max_rows} rows")
        if size > limits.max_bytes:
            raise QueryError("too large", f"more than {limits.max_bytes} bytes")
        # A row may take fewer instructions than there are between two calls of the handler.
        if time.monotonic() > deadline:
            raise QueryError("timeout", f"more than {limits.seconds} s")
    return rows


def is_ordered(sql: str) -> bool:
    """True if the outermost query has an ORDER BY (not a subquery, window or string)."""
    text = QUOTED_OR_COMMENT.sub(" ", sql).lower()
    depth, outermost = 0, []
    for character in text:
        depth += (character == "(") - (character == ")")
        outermost.append(character if depth == 0 else " ")
    return re.search(r"\border\s+by\b", "".join(outermost)) is not None


def same_answer(gold: Sequence[Row], predicted: Sequence[Row], *, ordered: bool) -> bool:
    """Compare two answers: as lists if ``ordered``, else as multisets."""
    if ordered:
        return list(gold) == list(predicted)
    return Counter(gold) == Counter(predicted)


def serve(parent: str, limits: str) -> None:
    """Reply to the messages on file 0 until it ends, or until the parent process does."""
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
    server, pipe = _Server(bounds), Connection(0)
    with suppress(EOFError):
        while True:
            reply = server.reply(*json.loads(pipe.recv_bytes()))
            pipe.send_bytes(json.dumps(reply).encode())


class _Server:
    """The state of the process: the open database, and the last gold answer."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._database = ""
        self._connection: sqlite3.Connection
        self._opened = ExitStack()
        self._gold: list[Row] = []
        self._is_ordered = False

    def reply(self, action: str, argument: str) -> dict[str, Any]:
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
        self._connection = self._opened.enter_context(open_read_only(Path(database)))

    def gold(self, sql: str) -> tuple[bool, str | None]:
        """Whether the answer holds a value; and, of a slow query, what `recall` reads."""
        self._gold = []  # its memory is needed
        start, limits = time.monotonic(), self._limits
        rows = run_query(self._connection, sql, replace(limits, seconds=limits.gold_seconds))
        kept = None
        is_slow = time.monotonic() - start > limits.slow_seconds
        if is_slow and len(rows) <= limits.max_kept_rows and not _CHANGING.search(sql):
            kept = json.dumps([sql, rows], default=lambda blob: {"hex": blob.hex()})
        is_small = kept is not None and len(kept) <= limits.max_kept_length
        return self._keep(sql, rows), kept if is_small else None

    def recall(self, kept: str) -> bool:
        sql, rows = json.loads(kept, object_hook=lambda blob: bytes.fromhex(blob["hex"]))
        return self._keep(sql, list(map(tuple, rows)))

    def _keep(self, sql: str, rows: list[Row]) -> bool:
        self._gold, self._is_ordered = rows, is_ordered(sql)
        return any(value is not None for row in rows for value in row)

    def compare(self, sql: str) -> tuple[bool, bool]:
        answer = run_query(self._connection, sql, self._limits)
        same = same_answer(self._gold, answer, ordered=self._is_ordered)
        return same, same or set(self._gold) == set(answer)
