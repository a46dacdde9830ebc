"""Execution match: does a generated query return what the gold query returns?

The queries run in a process of their own (``process.py``), under the limits of
``query.py``: time, rows, bytes and memory are bounded for any query.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_replay.errors import DataError
from megatron_replay.evaluation.scores import standard_error
from megatron_replay.evaluation.sql.process import QueryProcess
from megatron_replay.evaluation.sql.query import Limits, QueryError
from megatron_replay.evaluation.sql.sets import SqlQuestion
from megatron_replay.progress import Progress

_MATCH = "match"
#: Characters of a gold query that an error shows.
_SHOWN = 500


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


def with_answers(
    questions: Sequence[SqlQuestion],
    *,
    limits: Limits | None = None,
    description: str = "gold answers",
    progress: bool = False,
) -> list[SqlQuestion]:
    """The questions whose gold answer holds a value: a query that finds nothing matches the others.

    Raises:
        DataError: a gold query does not run (its question is named), a database cannot be read, or
            no question is left.
    """
    found = []
    with (
        QueryProcess(limits) as process,
        Progress(description, len(questions), "questions", enabled=progress) as bar,
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
        DataError: a gold query does not run, or finds nothing (its question is named); a database
            cannot be read.
    """
    counts = Counter[str]()
    pairs = list(zip(questions, predictions, strict=True))
    with (
        QueryProcess(limits) as process,
        Progress(description, len(pairs), "questions", enabled=progress) as bar,
    ):
        for question, predicted in pairs:
            counts[_outcome(process, question, predicted, bird_compat)] += 1
            bar.advance()
    return ExecutionMatch(
        matches=counts.pop(_MATCH, 0),
        questions=len(pairs),
        failures=dict(sorted(counts.items())),
    )


def _has_answer(process: QueryProcess, question: SqlQuestion) -> bool:
    """Run the gold query, and return whether its answer holds a value."""
    try:
        return process.gold(question.database, question.gold)
    except QueryError as error:
        raise DataError(
            f"the gold query fails: {error}: {question.gold[:_SHOWN]}",
            where=question.where,
            fix="Give it more time with --query-seconds" if error.reason == "timeout" else None,
        ) from error


def _outcome(
    process: QueryProcess, question: SqlQuestion, predicted_sql: str, bird_compat: bool
) -> str:
    """``_MATCH``, "other answer", or why the predicted query has no answer."""
    if not _has_answer(process, question):
        raise DataError(f"the gold answer is empty: {question.gold[:_SHOWN]}", where=question.where)
    try:
        agrees = process.agrees(predicted_sql, bird_compat=bird_compat)
    except QueryError as error:
        return error.reason
    return _MATCH if agrees else "other answer"
