"""Execution match: does a generated query return what the gold query returns?

Both run in a process of their own (``server.py``), which is killed when a query takes too long:
SQLite cannot be stopped within one call of a function, and ``printf('%*d', …)`` alone runs for
seconds. The process is started afresh, never forked (the caller has threads), which takes about
0.1 s. It keeps both answers of a question: only whether they agree comes back.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_replay.errors import DataError
from megatron_replay.evaluation.results import standard_error
from megatron_replay.evaluation.sql.gold_answers import GoldAnswers
from megatron_replay.evaluation.sql.server import Limits, QueryError
from megatron_replay.evaluation.sql.sets import SqlQuestion
from megatron_replay.progress import Progress

#: Seconds beyond a query's own until the process is killed: for the messages, and for
#: comparing the answers.
ALLOWANCE_SECONDS = 1.0
#: Seconds for starting the process and opening a database (a slow disk, many tables).
_OPEN_SECONDS = 120.0
#: Seconds that a process may take to end.
_END_SECONDS = 10.0
#: Characters of a gold query that an error shows.
_SHOWN = 500
_ROOT = Path(__file__).resolve().parents[3]
_PROGRAM = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from megatron_replay.evaluation.sql.server import serve; serve(*sys.argv[2:])"
)


def with_answers(
    questions: Sequence[SqlQuestion],
    limits: Limits | None = None,
    gold: GoldAnswers | None = None,
    *,
    show: str = "",
) -> list[SqlQuestion]:
    """Return the questions whose gold answer holds a value.

    Any query that finds nothing would match the others.

    Args:
        gold: answers that are known, and to which slow ones are added.
        show: description of the progress bar; none is shown without one.

    Raises:
        DataError: a gold query fails (its question is named), a database cannot be read, or no
            question is left.
    """
    found = []
    with (
        QueryProcess(limits, gold) as process,
        Progress(show, len(questions), "questions", enabled=bool(show)) as bar,
    ):
        for question in questions:
            if _has_answer(process, question):
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
    limits: Limits | None = None,
    gold: GoldAnswers | None = None,
    *,
    show: str = "",
) -> dict[str, Any]:
    """Run the gold query and the predicted query of each question, and count equal answers.

    Args:
        questions: those that `with_answers` returned.
        predictions: one query for each question.
        gold: as for `with_answers`.

    Returns:
        ``questions`` and ``matches``, their counts; ``hits``, a 1 for each question that matches
        and a 0 for each other; ``accuracy`` with its ``standard_error``;
        ``set_accuracy``, which compares answers as sets of rows, as BIRD's evaluator does;
        ``failures``: predictions that do not match, by reason ("other answer": the query ran).

    Raises:
        DataError: a gold query fails or finds nothing (its question is named), or a database
            cannot be read.
    """
    hits, set_matches = "", 0
    failures = Counter[str]()
    with (
        QueryProcess(limits, gold) as process,
        Progress(show, len(questions), "questions", enabled=bool(show)) as bar,
    ):
        for question, predicted in zip(questions, predictions, strict=True):
            if not _has_answer(process, question):
                found = question.gold[:_SHOWN]
                raise DataError(f"the gold answer is empty: {found}", where=question.where)
            same = False
            try:
                same, same_set = process.compare(predicted)
            except QueryError as error:
                failures[error.reason] += 1
            else:
                set_matches += same_set
                if not same:
                    failures["other answer"] += 1
            hits += str(int(same))
            bar.advance()
    matches = hits.count("1")
    return {
        "questions": len(questions),
        "hits": hits,
        "matches": matches,
        "accuracy": matches / len(questions),
        "standard_error": standard_error(matches, len(questions)),
        "set_accuracy": set_matches / len(questions),
        "failures": dict(sorted(failures.items())),
    }


def _has_answer(process: QueryProcess, question: SqlQuestion) -> bool:
    """Run the gold query, and return whether its answer holds a value."""
    try:
        return process.gold(question.database, question.gold)
    except QueryError as error:
        is_late = error.reason == "timeout"
        fix = "Give it more time with --gold-seconds, or leave" if is_late else "Leave"
        raise DataError(
            f"the gold query fails: {error}: {question.gold[:_SHOWN]}",
            where=question.where,
            fix=f"{fix} the question out: --leave-out {question.name}",
        ) from error


class QueryProcess:
    """Runs queries on one database at a time; a context manager that ends the process.

    A process that was killed is replaced by the next question's. All methods raise DataError where
    the database cannot be opened or read.
    """

    def __init__(self, limits: Limits | None = None, gold: GoldAnswers | None = None) -> None:
        self._limits, self._known = limits or Limits(), gold or GoldAnswers()
        self._child: subprocess.Popen[bytes] | None = None
        self._pipe: Connection
        self._database: Path | None = None

    def __enter__(self) -> QueryProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def gold(self, database: Path, sql: str) -> bool:
        """Run a gold query, or recall its answer, and return whether that holds a value.

        Raises:
            QueryError: as `run_query`, and "crash" where its process ended by itself.
        """
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
        if (kept := self._known.get(database, sql)) is not None:
            return bool(self._request("recall", kept, _OPEN_SECONDS))
        seconds = self._limits.gold_seconds + ALLOWANCE_SECONDS
        has_value, kept = self._request("gold", sql, seconds)
        if kept is not None:
            self._known.add(database, sql, kept)
        return bool(has_value)

    def compare(self, sql: str) -> tuple[bool, bool]:
        """Run a predicted query; is its answer the last gold query's, and as a set of rows?

        Raises:
            QueryError: as `gold`.
        """
        same, same_set = self._request("compare", sql, self._limits.seconds + ALLOWANCE_SECONDS)
        return same, same_set

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self._child = subprocess.Popen(
                # -I and -S: nothing of the environment, no site-packages.
                [sys.executable, "-I", "-S", "-c", _PROGRAM, str(_ROOT), str(os.getpid()),
                 json.dumps(asdict(self._limits))],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the parent's
            )  # fmt: skip
            self._pipe = Connection(ours.detach())

    def _request(self, action: str, argument: str, seconds: float) -> Any:
        """Send a message and return the reply's value; without one in time, end the process."""
        try:
            self._pipe.send_bytes(json.dumps([action, argument]).encode())
            is_late = not self._pipe.poll(seconds)
            reply = {} if is_late else json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError) as error:
            code = self._end(grace=_END_SECONDS)
            raise QueryError("crash", f"its process ended with exit code {code}") from error
        except BaseException:  # Ctrl-C: the reply that comes next belongs to this query
            self._end()
            raise
        if is_late:
            self._end()
            raise QueryError("timeout", f"killed after {seconds:g} s")
        if "damage" in reply:
            raise DataError(reply["damage"])
        if "reason" in reply:
            raise QueryError(reply["reason"], reply["detail"])
        return reply["value"]

    def _end(self, *, grace: float = 0.0) -> int | None:
        """Kill the process, if it has not ended within ``grace`` seconds; returns its exit code."""
        child, self._child, self._database = self._child, None, None
        if child is None:
            return None
        self._pipe.close()
        for seconds in (grace, _END_SECONDS):
            with suppress(subprocess.TimeoutExpired):
                return child.wait(seconds)
            child.kill()
        return None  # stuck in the kernel, for example on a dead disk
