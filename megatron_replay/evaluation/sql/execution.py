"""Execution match: does a generated query return what the gold query returns?

Both run in a process of their own (``process.py``), under the limits of ``query.py``: time, rows,
bytes and memory are bounded for any query.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from megatron_replay.errors import DataError
from megatron_replay.evaluation.scores import standard_error
from megatron_replay.evaluation.sql.process import QueryProcess
from megatron_replay.evaluation.sql.query import Limits, QueryError
from megatron_replay.evaluation.sql.sets import SqlQuestion
from megatron_replay.progress import Progress

#: Characters of a gold query that an error shows.
_SHOWN = 500


def with_answers(
    questions: Sequence[SqlQuestion], limits: Limits | None = None, *, show: str = ""
) -> list[SqlQuestion]:
    """Return the questions whose gold answer holds a value.

    Any query that finds nothing would match the others.

    Args:
        show: description of the progress bar; none is shown without one.

    Raises:
        DataError: a gold query fails (its question is named), a database cannot be read, or no
            question is left.
    """
    found = []
    with (
        QueryProcess(limits) as process,
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
    *,
    show: str = "",
) -> dict[str, Any]:
    """Run the gold query and the predicted query of each question, and count equal answers.

    Args:
        questions: those that `with_answers` returned.
        predictions: one query for each question.

    Returns:
        ``questions`` and ``matches``, their counts; ``accuracy`` with its ``standard_error``;
        ``set_accuracy``, which compares answers as sets of rows, as BIRD's evaluator does;
        ``failures``: predictions that do not match, by reason ("other answer": the query ran).

    Raises:
        DataError: a gold query fails or finds nothing (its question is named), or a database
            cannot be read.
    """
    matches = set_matches = 0
    failures = Counter[str]()
    with (
        QueryProcess(limits) as process,
        Progress(show, len(questions), "questions", enabled=bool(show)) as bar,
    ):
        for question, predicted in zip(questions, predictions, strict=True):
            if not _has_answer(process, question):
                found = question.gold[:_SHOWN]
                raise DataError(f"the gold answer is empty: {found}", where=question.where)
            try:
                same, same_set = process.compare(predicted)
            except QueryError as error:
                failures[error.reason] += 1
            else:
                matches += same
                set_matches += same_set
                if not same:
                    failures["other answer"] += 1
            bar.advance()
    return {
        "questions": len(questions),
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
        raise DataError(
            f"the gold query fails: {error}: {question.gold[:_SHOWN]}",
            where=question.where,
            fix="Give it more time with --query-seconds" if error.reason == "timeout" else None,
        ) from error
