"""Multiple choice: which option does the model find most likely after the prompt?

    score(option) = Σ_t log p(option_t | prompt, option_<t)

``accuracy`` chooses by that sum, ``accuracy_per_byte`` by the sum over the option's length in UTF-8
bytes, which does not favour short options. Prompt and option become tokens as the prompt and
completion of a training row do, so all options follow the same tokens; the end of the sequence or
turn is not scored. Of equal scores the first option's wins; a question with a score that is not a
number counts as wrong.

A single option is right if it is the greedy continuation (LAMBADA's rule). It is compared with

    score(greedy) = Σ_t max_j log p(j | prompt, option_<t)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from megatron_replay.data.corpus import Document
from megatron_replay.data.prompts import PromptStyle, prompt_of
from megatron_replay.data.row_formats import PLAIN, tokenize_row
from megatron_replay.data.rows import Row, parse_row, read_lines
from megatron_replay.data.tokenizer import Tokenizer
from megatron_replay.errors import DataError
from megatron_replay.evaluation.language_model import label_losses, require_readable
from megatron_replay.evaluation.results import standard_error


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One question, as tokens; ``answer`` is the place of the right option, from 0."""

    where: str
    prompt: list[int]
    options: list[list[int]]
    num_bytes: list[int]
    answer: int


def read_choices(path: Path, tokenizer: Tokenizer, style: PromptStyle = PLAIN) -> list[Choice]:
    """Read rows ``{"prompt": "…", "options": ["…", …], "answer": 0}``.

    Raises:
        DataError: there are none, or a row does not fit.
    """
    choices = []
    for where, line in read_lines(path):
        row = parse_row(where, line)
        prompt, options = row.text("prompt"), row.checked(row.fields, "options", list)
        if not options:
            raise row.error("no options")
        texts = [row.checked({"options": text}, "options", str) for text in options]
        if empty := [number for number, text in enumerate(texts) if not text.strip()]:
            raise row.error(f"option {empty[0]} is {'blank' if texts[empty[0]] else 'empty'}")
        documents = [
            tokenize_row(
                Row(where, {"prompt": prompt, "completion": text}), "prompt", tokenizer, style
            )
            for text in texts
        ]
        tokens = [_without_end(document, tokenizer) for document in documents]
        answer = row.fields.get("answer")
        if type(answer) is not int or not 0 <= answer < len(options):  # True is an int in Python
            raise row.error(
                "'answer' names no option",
                expected=f"a number from 0 to {len(options) - 1}",
                found="none" if answer is None else repr(answer),
            )
        num_bytes = [len(style.answer(text).encode()) for text in texts]
        choices.append(
            Choice(
                where=where,
                prompt=prompt_of(documents[0]),
                options=tokens,
                num_bytes=num_bytes,
                answer=answer,
            )
        )
    if not choices:
        raise DataError("no questions", where=path)
    return choices


def _without_end(document: Document, tokenizer: Tokenizer) -> list[int]:
    """The option's tokens: those with loss, up to the first special token."""
    tokens: list[int] = document.tokens[document.loss_mask].tolist()
    return list(takewhile(lambda token: token not in tokenizer.special_ids, tokens))


def score_choices(
    model: PreTrainedModel, choices: Sequence[Choice], *, batch_size: int = 16, show: str = ""
) -> dict[str, Any]:
    """Answer every question and count.

    Returns:
        ``questions``; ``correct`` and ``accuracy`` with its ``standard_error``, by the score, and
        ``hits``, a 0 or 1 for each question; ``correct_per_byte`` and ``accuracy_per_byte``, by the
        score over the option's bytes.

    Raises:
        DataError: a question is longer than the model's context, or holds ids it lacks.
    """
    scores = option_scores(model, choices, batch_size=batch_size, show=show)
    hits, correct_per_byte = "", 0
    for choice, totals in zip(choices, scores, strict=True):
        # The greedy continuation, which is compared with a single option, has its length.
        rates = [total / n for total, n in zip(totals, cycle(choice.num_bytes), strict=False)]
        hits += str(int(_likeliest(totals) == choice.answer))
        correct_per_byte += _likeliest(rates) == choice.answer
    correct = hits.count("1")
    return {
        "questions": len(choices),
        "hits": hits,
        "correct": correct,
        "accuracy": correct / len(choices),
        "standard_error": standard_error(correct, len(choices)),
        "correct_per_byte": correct_per_byte,
        "accuracy_per_byte": correct_per_byte / len(choices),
    }


def _likeliest(scores: Sequence[float]) -> int | None:
    return None if any(map(math.isnan, scores)) else scores.index(max(scores))


def option_scores(
    model: PreTrainedModel, choices: Sequence[Choice], *, batch_size: int = 16, show: str = ""
) -> list[list[float]]:
    """Σ log p of every option, in nats; of a single option, and of the greedy continuation.

    A prompt is computed once for all its options, and what prompts begin with once for all.

    Raises:
        DataError: a question is longer than the model's context, or holds ids it lacks.
    """
    documents = []
    for choice in choices:
        tokens = [*choice.prompt, *(token for option in choice.options for token in option)]
        longest = max(map(len, choice.options))
        require_readable(model, choice.where, tokens, len(choice.prompt) + longest - 1)
        for option in choice.options:
            whole = np.array([*choice.prompt, *option], dtype=np.int32)
            documents.append(Document(whole, np.arange(len(whole)) >= len(choice.prompt)))
    losses = iter(label_losses(model, documents, batch_size=batch_size, show=show, unit="options"))
    scores = []
    for choice in choices:
        own = [(-next(losses).sum(1)).tolist() for _ in choice.options]
        greedy = [largest for _, largest, _ in own] if len(own) == 1 else []
        scores.append([total for total, _, _ in own] + greedy)
    return scores
