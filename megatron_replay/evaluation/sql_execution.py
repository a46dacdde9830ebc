"""Execution match: does a generated query return what the gold query returns?

Generated SQL is untrusted. It runs on a read-only, immutable connection; an authorizer allows
reading and a list of pure functions and nothing else; a deadline and limits of rows and bytes bound
what it can cost. SQLite looks at the deadline between instructions, and a call of a function is
one: what limits the strings is what limits that call. Answers are compared as multisets of rows, in
order where the gold query has an ORDER BY. The evaluator of BIRD
(github.com/AlibabaResearch/DAMO-ConvAI, bird/llm/src/evaluation.py) opens the database for writing
and compares sets; ``bird_compat`` gives its comparison, never its connection.
"""

from __future__ import annotations

import re
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from threading import Timer
from typing import Any

from megatron_replay.data.database import QUOTED_OR_COMMENT, open_read_only
from megatron_replay.data.sql_sets import SqlQuestion
from megatron_replay.errors import DataError
from megatron_replay.evaluation.proportion import standard_error
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
# The handler runs every so many virtual-machine instructions, about 10 µs: 10,000 are no faster,
# 100 cost a tenth of the time.
_INSTRUCTIONS_PER_CHECK = 1_000
_MATCH = "match"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one query may cost.

    Attributes:
        seconds: wall-clock time of one query.
        max_rows: rows of an answer.
        max_bytes: of an answer, as Python's objects.
        max_value_bytes: of one string or blob, stored ones too (SQLITE_LIMIT_LENGTH).
        max_pattern_bytes: of a pattern of LIKE or GLOB, and of the characters to trim.
    """

    seconds: float = 2.0
    max_rows: int = 100_000
    max_bytes: int = 200_000_000
    max_value_bytes: int = 1_000_000
    max_pattern_bytes: int = 1_000


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
        questions: how many were asked.
        failures: wrong predictions by reason; "other answer" is a query that ran.
    """

    matches: int
    questions: int
    failures: dict[str, int] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """``matches / questions``."""
        return self.matches / self.questions

    @property
    def standard_error(self) -> float:
        """Of the accuracy."""
        return standard_error(self.matches, self.questions)


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
    first_word = re.match(r"[a-z]*", QUOTED_OR_COMMENT.sub(" ", sql).strip().lower())
    if first_word is None or first_word[0] not in ("select", "with"):
        raise QueryError("not a query", "only SELECT is run")
    authorizer = _Authorizer()
    deadline = time.monotonic() + limits.seconds
    connection.set_authorizer(authorizer)
    connection.set_progress_handler(lambda: time.monotonic() > deadline, _INSTRUCTIONS_PER_CHECK)
    try:
        with (
            _bounded_values(connection, limits),
            _interrupted_after(connection, limits.seconds),
            closing(connection.execute(sql)) as cursor,
        ):
            return _fetch(cursor, limits, deadline)
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
        # ValueError: a NUL or a lone surrogate, which never reach SQLite.
        if authorizer.denied:
            raise QueryError("denied", f"denied: {authorizer.denied}") from error
        reason = _REASONS.get(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR), "sql error")
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


@contextmanager
def _interrupted_after(connection: sqlite3.Connection, seconds: float) -> Iterator[None]:
    """Interrupt the query from a thread: SQLite looks for that in every turn of a loop.

    The progress handler alone lets some hundred calls of a slow function go by; it stops what is
    interrupted before it began, which SQLite forgets.
    """
    timer = Timer(seconds, connection.interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


@contextmanager
def _bounded_values(connection: sqlite3.Connection, limits: Limits) -> Iterator[None]:
    """Limit how long the values are that one instruction works on.

    No limit of SQLite's reaches the second argument of ``trim(X, Y)``, and every character of X is
    compared with every one of Y: more than half an hour for two strings of 1 MB. So a long Y is
    refused, and a connection of its own calls SQLite's function for the others.
    """
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, limits.max_value_bytes)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, limits.max_pattern_bytes)
    with closing(sqlite3.connect(":memory:")) as native:

        def trimmed(name: str, text: Any, characters: Any) -> Any:
            if isinstance(characters, (str, bytes)) and len(characters) > limits.max_pattern_bytes:
                raise OverflowError  # becomes SQLITE_TOOBIG
            return native.execute(f"select {name}(?, ?)", (text, characters)).fetchone()[0]

        for name in ("trim", "ltrim", "rtrim"):
            connection.create_function(name, 2, partial(trimmed, name), deterministic=True)
        yield


def is_ordered(sql: str) -> bool:
    """True if the outermost query has an ORDER BY (not a subquery, window or string)."""
    text = QUOTED_OR_COMMENT.sub(" ", sql).lower()
    depth, outermost = 0, []
    for character in text:
        depth += (character == "(") - (character == ")")
        outermost.append(character if depth == 0 else " ")
    return re.search(r"\border\s+by\b", "".join(outermost)) is not None


def same_answer(
    gold: Sequence[Row], predicted: Sequence[Row], *, ordered: bool, bird_compat: bool = False
) -> bool:
    """Compare two answers: lists if ``ordered``, else multisets (sets with ``bird_compat``)."""
    if bird_compat:
        return set(gold) == set(predicted)
    if ordered:
        return list(gold) == list(predicted)
    return Counter(gold) == Counter(predicted)


def holds_a_value(rows: Sequence[Row]) -> bool:
    """True if any cell of the answer is not NULL."""
    return any(value is not None for row in rows for value in row)


def with_answers(
    questions: Sequence[SqlQuestion],
    *,
    limits: Limits | None = None,
    description: str = "gold answers",
    progress: bool = False,
) -> list[SqlQuestion]:
    """The questions whose gold answer holds a value: a query that finds nothing matches the others.

    Raises:
        DataError: a gold query does not run (its question is named), or no question is left.
    """
    found = []
    with Progress(description, len(questions), "questions", enabled=progress) as bar:
        for database, group in groupby(questions, key=lambda question: question.database):
            with open_read_only(database) as connection:
                for question in group:
                    if holds_a_value(_gold_answer(connection, question, limits)):
                        found.append(question)
                    bar.advance()
    if not found:
        raise DataError(
            "every gold answer is empty",
            where=questions[0].database if questions else None,
            found=f"{len(questions)} questions",
        )
    return found


def execution_match(
    questions: Sequence[SqlQuestion],
    predictions: Sequence[str],
    *,
    limits: Limits | None = None,
    bird_compat: bool = False,
    description: str = "execution match",
    progress: bool = False,
) -> ExecutionMatch:
    """Run gold and predicted queries and count the matches.

    Args:
        questions: what `with_answers` found.
        predictions: the query predicted for each of them.

    Raises:
        DataError: a gold query does not run, or finds nothing (its question is named).
    """
    counts = Counter[str]()
    pairs = list(zip(questions, predictions, strict=True))
    with Progress(description, len(pairs), "questions", enabled=progress) as bar:
        for database, group in groupby(pairs, key=lambda pair: pair[0].database):
            with open_read_only(database) as connection:
                for question, predicted in group:
                    counts[_outcome(connection, question, predicted, limits, bird_compat)] += 1
                    bar.advance()
    return ExecutionMatch(
        matches=counts.pop(_MATCH, 0),
        questions=len(pairs),
        failures=dict(sorted(counts.items())),
    )


def _gold_answer(
    connection: sqlite3.Connection, question: SqlQuestion, limits: Limits | None
) -> list[Row]:
    try:
        return run_query(connection, question.gold, limits=limits)
    except QueryError as error:
        raise DataError(
            f"the gold query fails: {error}: {question.gold}",
            where=question.where,
            fix="Give it more time with --query-seconds" if error.reason == "timeout" else None,
        ) from error


def _outcome(
    connection: sqlite3.Connection,
    question: SqlQuestion,
    predicted_sql: str,
    limits: Limits | None,
    bird_compat: bool,
) -> str:
    """``_MATCH``, "other answer", or why the predicted query has no answer."""
    gold = _gold_answer(connection, question, limits)
    if not holds_a_value(gold):
        raise DataError(f"the gold answer is empty: {question.gold}", where=question.where)
    try:
        predicted = run_query(connection, predicted_sql, limits=limits)
    except QueryError as error:
        return error.reason
    ordered = is_ordered(question.gold)
    same = same_answer(gold, predicted, ordered=ordered, bird_compat=bird_compat)
    return _MATCH if same else "other answer"
