"""Execution match of a model: reads the sets, asks the model, and runs the queries it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from operator import ne
from pathlib import Path

from transformers import PreTrainedModel

from megatron_replay.data.prompts import PromptStyle, prompt_of
from megatron_replay.data.row_formats import tokenize_row
from megatron_replay.data.rows import Row
from megatron_replay.data.tokenizer import Tokenizer
from megatron_replay.errors import ConfigError
from megatron_replay.evaluation.generation import greedy_answers
from megatron_replay.evaluation.inputs import Settings
from megatron_replay.evaluation.language_model import require_readable
from megatron_replay.evaluation.results import Result
from megatron_replay.evaluation.sql.execution import execution_match, with_answers
from megatron_replay.evaluation.sql.gold_answers import GoldAnswers
from megatron_replay.evaluation.sql.server import Limits
from megatron_replay.evaluation.sql.sets import SqlQuestion, read_sql_set
from megatron_replay.evaluation.sql.unwrap import unwrapped

#: The first questions of a set, whose answers are kept.
NUM_SAMPLES = 3


def sql_measurements(
    sets: Mapping[str, Path],
    tokenizer: Tokenizer,
    settings: Settings,
    gold: GoldAnswers | None = None,
) -> dict[str, tuple[Callable[..., Result], Result]]:
    """Of every set, what measures a model, and the counts of questions that are not asked.

    Args:
        gold: answers of slow gold queries, for the measurements to read and to add to.

    Raises:
        ConfigError: a question to leave out is not there.
        DataError: a set cannot be read, or a gold query fails.
    """
    style = settings.for_tokenizer(tokenizer)
    found: dict[str, tuple[Callable[..., Result], Result]] = {}
    limits = Limits(seconds=settings.query_seconds, gold_seconds=settings.gold_seconds)
    for name, (asked, left_out) in _questions(sets, settings, style).items():
        prompts = {question: _prompt(question, tokenizer, style) for question in asked}
        questions = with_answers(asked, limits, gold, show=f"{name}: gold")
        run = partial(
            _match,
            prompts={question: prompts[question] for question in questions},
            tokenizer=tokenizer,
            settings=settings,
            limits=limits,
            gold=gold,
        )
        counts = {"empty_gold": len(asked) - len(questions), "left_out": left_out}
        found[name] = run, counts
    return found


def _questions(
    sets: Mapping[str, Path], settings: Settings, style: PromptStyle
) -> dict[str, tuple[list[SqlQuestion], int]]:
    """The questions of every set, and how many were left out by name."""
    left_out = set(filter(None, (settings.leave_out or "").split(",")))
    unknown, found, counts = set(left_out), {}, []
    for name, directory in sets.items():
        questions = [
            replace(question, name=f"{name}:{number}")
            for number, question in enumerate(
                read_sql_set(directory, chat=bool(style.chat_template)), start=1
            )
        ]
        asked = [question for question in questions if question.name not in left_out]
        if not asked:
            raise ConfigError("every question is left out", where="--leave-out", found=name)
        unknown -= {question.name for question in questions}
        counts.append(f"{name}:1 to {name}:{len(questions)}")
        found[name] = asked, len(questions) - len(asked)
    if unknown:
        raise ConfigError(
            "no such question",
            where="--leave-out",
            expected=f"NAME:NUMBER of --sql NAME=DIR: {', '.join(counts)}",
            found=", ".join(sorted(unknown)),
        )
    return found


def _prompt(question: SqlQuestion, tokenizer: Tokenizer, style: PromptStyle) -> list[int]:
    """What a training row of the question has before its answer."""
    row = Row(question.where, {"prompt": question.prompt, "completion": question.gold})
    return prompt_of(tokenize_row(row, "prompt", tokenizer, style))


def _match(
    model: PreTrainedModel,
    prompts: Mapping[SqlQuestion, list[int]],
    *,
    tokenizer: Tokenizer,
    settings: Settings,
    limits: Limits,
    gold: GoldAnswers | None,
    show: str,
) -> Result:
    """Generate a query for each question and run it.

    An answer ends at the first special token: EOS, or the chat template's end of turn.

    Returns:
        `execution_match`'s; ``unfinished``: answers without an end; ``unwrapped``: answers that had
        more than the query that was run; ``samples``: the first questions (the last paragraph of
        the prompt), each with its gold query, the answer, and whether it is right.
    """
    for question, prompt in prompts.items():
        require_readable(model, question.where, prompt, len(prompt) + settings.max_new_tokens)
    answers = greedy_answers(
        model,
        list(prompts.values()),
        stop_ids=tokenizer.special_ids,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        show=f"{show}: generate",
    )
    texts = [tokenizer.decode(answer.tokens).strip() for answer in answers]
    queries = [unwrapped(text) for text in texts] if settings.unwrap else texts
    match = execution_match(list(prompts), queries, limits, gold, show=f"{show}: match")
    samples = [
        {"question": asked.prompt.rpartition("\n\n")[2], "gold": asked.gold, "answer": text,
         "right": hit == "1"}
        for asked, text, hit in zip(prompts, texts, match["hits"], strict=True)
    ]  # fmt: skip
    return match | {
        "samples": samples[:NUM_SAMPLES],
        "unfinished": sum(not answer.finished for answer in answers),
        "unwrapped": sum(map(ne, texts, queries)),
    }
