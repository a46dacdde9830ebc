"""Execution match: does a generated query return what the gold query returns?

Generated SQL is untrusted. It runs on a read-only, immutable connection; an authorizer allows
reading and a list of pure functions and nothing else; a deadline, a row limit and a length limit
bound what it can cost. Answers are compared as multisets of rows, in order where the gold query
has an ORDER BY. The evaluator of BIRD (github.com/AlibabaResearch/DAMO-ConvAI, bird/llm/src/
evaluation.py) opens the database for writing and compares sets; ``bird_compatible`` gives its
comparison, never its connection.
"""

from __future__ import annotations

import math
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_replay.errors import ConfigError, DataError
from megatron_replay.progress import Progress

Row = tuple[Any, ...]

# SQLITE_RECURSIVE (33) has no name in Python's module: a recursive common table expression.
_ALLOWED_ACTIONS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, 33}
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
_REASONS = {sqlite3.SQLITE_INTERRUPT: "timeout", sqlite3.SQLITE_TOOBIG: "too large"}
# The handler runs every so many virtual-machine instructions: about 0.1 ms.
_INSTRUCTIONS_PER_CHECK = 10_000

_QUOTED_OR_COMMENT = re.compile(
    r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?(?:\*/|$)", re.DOTALL
)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one query may cost.

    Attributes:
        seconds: wall-clock time of one query.
        max_rows: rows of an answer.
        max_bytes: bytes of one string, blob or row (SQLITE_LIMIT_LENGTH).
    """

    seconds: float = 2.0
    max_rows: int = 100_000
    max_bytes: int = 10_000_000


class QueryError(Exception):
    """A query that was refused, failed, or cost too much; ``reason`` is a short stable word."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class ExecutionMatch:
    """The result over a set of questions.

    Attributes:
        matches: predictions whose answer equals the gold answer.
        total: questions that count.
        empty_gold: questions left out because the gold answer holds no value: any query that
            returns nothing would match it.
        failures: wrong predictions by reason; "other answer" is a query that ran.
    """

    matches: int
    total: int
    empty_gold: int
    failures: dict[str, int] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """``matches / total``."""
        return self.matches / self.total

    @property
    def standard_error(self) -> float:
        """``√(p(1-p)/n)`` of the accuracy, with p shrunk as Agresti and Coull (1998) do.

        ``p = (matches + 2)/(n + 4)``, n + 4 in place of n: the plain formula claims an error of
        zero for 0 of n.
        """
        n = self.total + 4
        p = (self.matches + 2) / n
        return math.sqrt(p * (1 - p) / n)


@contextmanager
def open_read_only(database: Path) -> Iterator[sqlite3.Connection]:
    """A connection that can neither write nor lock ``database``.

    Raises:
        DataError: it is missing, is not SQLite, or has a journal that ``immutable`` would ignore.
        ConfigError: this Python cannot limit the length of a value.
    """
    if not hasattr(sqlite3.Connection, "setlimit"):
        raise ConfigError("SQL execution needs sqlite3.Connection.setlimit", expected="Python 3.11")
    if not database.is_file():
        raise DataError("no such database", where=database)
    for suffix in ("-wal", "-journal"):
        journal = database.with_name(database.name + suffix)
        if journal.exists() and journal.stat().st_size:
            raise DataError(
                "the database has an unfinished transaction",
                where=journal,
                fix="Open and close it with sqlite3 once, so that the transaction is settled",
            )
    uri = f"{database.absolute().as_uri()}?mode=ro&immutable=1"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None)
    try:
        # Bytes that are no UTF-8 must stay distinct from one another when compared.
        connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
        try:
            connection.execute("select count(*) from sqlite_master").fetchone()
        except sqlite3.DatabaseError as error:
            raise DataError(f"not an SQLite database: {error}", where=database) from error
        yield connection
    finally:
        connection.close()


class _Authorizer:
    """Allows reading and pure functions; remembers what it denied, which SQLite's errors do not."""

    def __init__(self) -> None:
        self.denied: str | None = None

    def __call__(self, action: int, first: str | None, second: str | None, *_: str | None) -> int:
        name = (second or "").lower()
        if action == sqlite3.SQLITE_FUNCTION and name not in _ALLOWED_FUNCTIONS:
            self.denied = f"function {name}"
        elif action not in _ALLOWED_ACTIONS:
            self.denied = f"action {action} on {first}"
        else:
            return sqlite3.SQLITE_OK
        return sqlite3.SQLITE_DENY


def run_query(
    connection: sqlite3.Connection, sql: str, *, limits: Limits | None = None
) -> list[Row]:
    """Run one SELECT (or WITH … SELECT) and return its rows.

    Args:
        connection: from `open_read_only`.

    Raises:
        QueryError: reason "not a query", "denied", "timeout", "too large" or "sql error".
    """
    limits = Limits() if limits is None else limits
    first_word = re.match(r"[a-z]*", _QUOTED_OR_COMMENT.sub(" ", sql).strip().lower())
    if first_word is None or first_word[0] not in ("select", "with"):
        raise QueryError("not a query", "only SELECT is run")
    authorizer = _Authorizer()
    deadline = time.monotonic() + limits.seconds
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, limits.max_bytes)
    connection.set_authorizer(authorizer)
    connection.set_progress_handler(lambda: time.monotonic() > deadline, _INSTRUCTIONS_PER_CHECK)
    try:
        rows: list[Row] = connection.execute(sql).fetchmany(limits.max_rows + 1)
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
        # ValueError: a NUL or a lone surrogate, which never reach SQLite.
        if authorizer.denied:
            raise QueryError("denied", f"denied: {authorizer.denied}") from error
        reason = _REASONS.get(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR), "sql error")
        raise QueryError(reason, str(error)) from error
    if len(rows) > limits.max_rows:
        raise QueryError("too large", f"more than {limits.max_rows} rows")
    return rows


def is_ordered(sql: str) -> bool:
    """True if the outermost query has an ORDER BY (not a subquery, window or string)."""
    text = _QUOTED_OR_COMMENT.sub(" ", sql).lower()
    depth, outermost = 0, []
    for character in text:
        depth += (character == "(") - (character == ")")
        outermost.append(character if depth == 0 else " ")
    return re.search(r"\border\s+by\b", "".join(outermost)) is not None


def same_answer(
    gold: Sequence[Row], predicted: Sequence[Row], *, ordered: bool, bird_compatible: bool = False
) -> bool:
    """Compare two answers: lists if ``ordered``, else multisets (sets with ``bird_compatible``)."""
    if bird_compatible:
        return set(gold) == set(predicted)
    if ordered:
        return list(gold) == list(predicted)
    return Counter(gold) == Counter(predicted)


def holds_a_value(rows: Sequence[Row]) -> bool:
    """True if any cell of the answer is not NULL."""
    return any(value is not None for row in rows for value in row)


def execution_match(
    database: Path,
    questions: Sequence[tuple[str, str]],
    *,
    limits: Limits | None = None,
    bird_compatible: bool = False,
    progress: bool = False,
) -> ExecutionMatch:
    """Run gold and predicted queries and count the matches.

    Args:
        database: an SQLite file.
        questions: pairs ``(gold_sql, predicted_sql)``.

    Raises:
        DataError: a gold query does not run (its number is named), or no question is left.
    """
    matches, empty, failures = 0, 0, Counter[str]()
    with (
        open_read_only(database) as connection,
        Progress("execution match", len(questions), "questions", enabled=progress) as bar,
    ):
        for number, (gold_sql, predicted_sql) in enumerate(questions, start=1):
            try:
                gold = run_query(connection, gold_sql, limits=limits)
            except QueryError as error:
                raise DataError(
                    f"the gold query of question {number} fails: {error}: {gold_sql}",
                    where=database,
                ) from error
            bar.advance()
            if not holds_a_value(gold):
                empty += 1
                continue
            try:
                predicted = run_query(connection, predicted_sql, limits=limits)
            except QueryError as error:
                failures[error.reason] += 1
                continue
            if same_answer(
                gold, predicted, ordered=is_ordered(gold_sql), bird_compatible=bird_compatible
            ):
                matches += 1
            else:
                failures["other answer"] += 1
    if empty == len(questions):
        raise DataError("every gold answer is empty", where=database, found=f"{empty} questions")
    return ExecutionMatch(
        matches=matches,
        total=len(questions) - empty,
        empty_gold=empty,
        failures=dict(sorted(failures.items())),
    )
