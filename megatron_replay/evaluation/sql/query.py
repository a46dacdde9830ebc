"""Runs one query on one connection: what it may do, what it may cost, and how answers compare.

Generated SQL is untrusted. It runs on a read-only, immutable connection; an authorizer allows only
reading and a list of pure functions; limits of time, rows and bytes bound its cost. SQLite looks at
the clock between instructions, and one call of a function is one instruction: a longer one is
stopped by killing the process (``process.py``), which starts at once because nothing imported here
is heavy.

Answers are compared as multisets of rows, in order where the gold query has an ORDER BY.
"""

from __future__ import annotations

import re
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
_REASONS = {
    sqlite3.SQLITE_INTERRUPT: "timeout",
    sqlite3.SQLITE_TOOBIG: "too large",
    sqlite3.SQLITE_IOERR_WRITE: "too large",  # a temporary file beyond the process's limit
    sqlite3.SQLITE_IOERR_NOMEM: "too large",
}
#: Errors that are the file's or the machine's, and never the query's.
_DAMAGE = {
    sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
}  # fmt: skip
# The handler runs every so many virtual-machine instructions, about 10 µs: 10,000 are no faster,
# 100 cost a tenth of the time.
_INSTRUCTIONS_PER_CHECK = 1_000


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one query may cost.

    Attributes:
        seconds: wall-clock time of one query.
        max_rows: rows of an answer.
        max_bytes: of an answer, as Python's objects.
        max_value_bytes: of one string or blob, stored ones too (SQLITE_LIMIT_LENGTH).
        max_query_length: characters of the query.
        max_memory_bytes: address space of the process that runs it: the gold answer and the other
            one, each twice as large as ``max_bytes`` at most, and what SQLite needs.
        max_temporary_bytes: of one temporary file, which SQLite sorts with.
    """

    seconds: float = 2.0
    max_rows: int = 100_000
    max_bytes: int = 200_000_000
    max_value_bytes: int = 1_000_000
    max_query_length: int = 100_000
    max_memory_bytes: int = 1 << 30
    max_temporary_bytes: int = 4 << 30


class QueryError(Exception):
    """A query that was refused, failed, or cost too much; ``reason`` is a short stable word."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@contextmanager
def open_for_queries(database: Path) -> Iterator[sqlite3.Connection]:
    """A connection for `run_query`.

    Raises:
        DataError: see `open_read_only`.
    """
    with open_read_only(database) as connection:
        # At their first use SQLite creates these pure table functions, which the authorizer sees as
        # an UPDATE of sqlite_master, like that of pragma_… and others that are not pure. Created
        # before there is an authorizer, they need only the right to read.
        with suppress(sqlite3.OperationalError):  # an SQLite without JSON has neither
            connection.execute("select 1 from json_each('[]'), json_tree('[]')").fetchall()
        yield connection


def run_query(
    connection: sqlite3.Connection, sql: str, *, limits: Limits | None = None
) -> list[Row]:
    """Run one SELECT (or WITH … SELECT) and return its rows.

    Args:
        connection: from `open_for_queries`.

    Raises:
        QueryError: reason "not a query", "denied", "timeout", "too large" or "sql error".
        sqlite3.Error: the database is damaged, or the machine has no room for temporary files.
    """
    limits = Limits() if limits is None else limits
    deadline = time.monotonic() + limits.seconds
    require_length(sql, limits)
    first_word = re.match(r"[a-z]*", QUOTED_OR_COMMENT.sub(" ", sql).strip().lower())
    if first_word is None or first_word[0] not in ("select", "with"):
        raise QueryError("not a query", "only SELECT is run")
    denied = []

    def authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
        pure = action != sqlite3.SQLITE_FUNCTION or str(second).lower() in _ALLOWED_FUNCTIONS
        if action in _ALLOWED_ACTIONS and pure:
            return sqlite3.SQLITE_OK
        denied.append(action)
        return sqlite3.SQLITE_DENY

    connection.set_authorizer(authorize)
    connection.set_progress_handler(lambda: time.monotonic() > deadline, _INSTRUCTIONS_PER_CHECK)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, limits.max_value_bytes)
    try:
        with closing(connection.execute(sql)) as cursor:
            return _fetch(cursor, limits, deadline)
    except MemoryError as error:
        raise QueryError("too large", "more than its process may hold in memory") from error
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
        # ValueError: a NUL or a lone surrogate, which never reach SQLite.
        if denied:
            raise QueryError("denied", f"denied: {error}") from error
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
        reason = _REASONS.get(code, "sql error")
        if reason == "sql error" and code & 0xFF in _DAMAGE:
            raise
        raise QueryError(reason, str(error)) from error


def require_length(sql: str, limits: Limits) -> None:
    """Raise QueryError if the query itself is too long."""
    if len(sql) > limits.max_query_length:
        raise QueryError("too large", f"a query of more than {limits.max_query_length} characters")


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


def holds_a_value(rows: Sequence[Row]) -> bool:
    """True if any cell of the answer is not NULL."""
    return any(value is not None for row in rows for value in row)
