"""Multiple choice: which option does the model find most likely after the prompt?

    score(option) = Σ_t log p(option_t | prompt, option_<t)

``accuracy`` chooses by that sum, ``accuracy_per_byte`` by the sum over the option's length in UTF-8
bytes, which does not favour short options. Prompt and option are encoded apart, as training rows
are, so all options follow the same tokens; the end of the sequence is not scored. Of equal scores
the first option's wins; a question with a score that is no number is answered wrongly.

Shapes: B questions of a batch, P tokens of their prompts, R options of a batch, O tokens of the
longest option, V vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from megatron_replay.data.rows import parse_row, read_lines
from megatron_replay.data.tokenizer import Tokenizer
from megatron_replay.errors import DataError
from megatron_replay.evaluation.scores import standard_error
from megatron_replay.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One question.

    Attributes:
        where: where it stands, for messages.
        prompt: tokens of the question.
        options: tokens of each option.
        num_bytes: length of each option.
        answer: place of the right option, from 0.
    """

    where: str
    prompt: list[int]
    options: list[list[int]]
    num_bytes: list[int]
    answer: int


@dataclass(frozen=True, kw_only=True)
class ChoiceScore:
    """The result over a set of questions.

    Attributes:
        correct: questions whose right option is the likeliest.
        correct_per_byte: questions whose right option is the likeliest for its length.
        questions: how many there are.
    """

    correct: int
    correct_per_byte: int
    questions: int

    @property
    def accuracy(self) -> float:
        """``correct / questions``."""
        return self.correct / self.questions

    @property
    def accuracy_per_byte(self) -> float:
        """``correct_per_byte / questions``."""
        return self.correct_per_byte / self.questions

    @property
    def standard_error(self) -> float:
        """Of the accuracy."""
        return standard_error(self.correct, self.questions)


def read_choices(path: Path, tokenizer: Tokenizer) -> list[Choice]:
    """Read rows ``{"prompt": "…", "options": ["…", …], "answer": 0}``.

    Raises:
        DataError: there are none, or a row does not fit.
    """
    choices = []
    for where, line in read_lines(path):
        row = parse_row(where, line)
        prompt, options = row.text("prompt"), row.checked(row.fields, "options", list)
        if len(options) < 2:
            raise row.error("too few options", expected="two or more", found=len(options))
        texts = [row.checked({"options": text}, "options", str) for text in options]
        question, tokens = tokenizer.encode(prompt), [tokenizer.encode(text) for text in texts]
        if not question or not all(tokens):
            empty = "'prompt'" if not question else f"option {tokens.index([])}"
            raise row.error(f"{empty} is empty")
        choices.append(
            Choice(
                where=where,
                prompt=question,
                options=tokens,
                num_bytes=[len(text.encode()) for text in texts],
                answer=_answer(row.fields.get("answer"), len(options), where),
            )
        )
    if not choices:
        raise DataError("no questions", where=path)
    return choices


def _answer(value: object, num_options: int, where: str) -> int:
    # True is an int in Python, and no answer.
    if type(value) is int and 0 <= value < num_options:
        return value
    raise DataError(
        "'answer' names no option",
        where=where,
        expected=f"a number from 0 to {num_options - 1}",
        found="none" if value is None else repr(value),
    )


def score_choices(
    model: PreTrainedModel,
    choices: Sequence[Choice],
    *,
    batch_size: int = 16,
    description: str = "choices",
    progress: bool = False,
) -> ChoiceScore:
    """Answer every question and count.

    Raises:
        DataError: a question is longer than the model's context, or holds ids it lacks.
    """
    scores = option_scores(
        model, choices, batch_size=batch_size, description=description, progress=progress
    )
    correct = correct_per_byte = 0
    for choice, totals in zip(choices, scores, strict=True):
        rates = [total / n for total, n in zip(totals, choice.num_bytes, strict=True)]
        correct += _likeliest(totals) == choice.answer
        correct_per_byte += _likeliest(rates) == choice.answer
    return ChoiceScore(correct=correct, correct_per_byte=correct_per_byte, questions=len(choices))


def _likeliest(scores: Sequence[float]) -> int | None:
    if any(map(math.isnan, scores)):
        return None
    return max(range(len(scores)), key=lambda option: scores[option])  # max: the first of equals


@torch.inference_mode()
def option_scores(
    model: PreTrainedModel,
    choices: Sequence[Choice],
    *,
    batch_size: int = 16,
    description: str = "choices",
    progress: bool = False,
) -> list[list[float]]:
    """Σ log p of every option, in nats.

    A prompt is read once for all its options. Prompts of one length form a batch of at most
    ``batch_size``: no padding before what is scored.

    Memory: keys and values of the options' prompts, and their logits, ``R·O·V`` numbers.

    Raises:
        DataError: a question is longer than the model's context, or holds ids it lacks.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, choice in enumerate(choices):
        _require_fitting(model, choice)
        by_length[len(choice.prompt)].append(number)
    scores: dict[int, list[float]] = {}
    with Progress(description, len(choices), "questions", enabled=progress) as bar:
        for _, numbers in sorted(by_length.items()):
            for start in range(0, len(numbers), batch_size):
                batch = numbers[start : start + batch_size]
                found = _batch_scores(model, [choices[number] for number in batch])
                scores |= zip(batch, found, strict=True)
                bar.advance(len(batch))
    return [scores[number] for number in range(len(choices))]


def _batch_scores(model: PreTrainedModel, choices: Sequence[Choice]) -> list[list[float]]:
    """`option_scores` of questions whose prompts have one length."""
    device = model.device
    prompts_BP = torch.tensor([choice.prompt for choice in choices], device=device)
    output = model(prompts_BP, use_cache=True, logits_to_keep=1)
    options = [option for choice in choices for option in choice.options]
    question_R = torch.tensor(
        [row for row, choice in enumerate(choices) for _ in choice.options], device=device
    )
    length_R = torch.tensor([len(option) for option in options], device=device)
    longest = max(map(len, options))
    labels_RO = torch.tensor(
        [option + [0] * (longest - len(option)) for option in options], device=device
    )
    logits_RV = output.logits[:, -1].float().log_softmax(-1)[question_R]
    scores_RO = logits_RV.gather(1, labels_RO[:, :1])
    if longest > 1:
        cache = output.past_key_values
        cache.batch_select_indices(question_R)
        logits_ROV = model(labels_RO[:, :-1], past_key_values=cache, use_cache=True).logits
        later_RO = -torch.nn.functional.cross_entropy(
            logits_ROV.float().flatten(0, 1), labels_RO[:, 1:].flatten(), reduction="none"
        ).view(len(options), longest - 1)
        scores_RO = torch.cat([scores_RO, later_RO], dim=1)
    inside_RO = torch.arange(longest, device=device) < length_R[:, None]
    # Not a product: infinity times zero is no number.
    totals = scores_RO.double().masked_fill(~inside_RO, 0.0).sum(1).tolist()
    rest = iter(totals)
    return [[next(rest) for _ in choice.options] for choice in choices]


def _require_fitting(model: PreTrainedModel, choice: Choice) -> None:
    context = getattr(model.config, "max_position_embeddings", None)
    length = len(choice.prompt) + max(map(len, choice.options)) - 1
    if context is not None and length > context:
        raise DataError(
            "the question is longer than the model's context",
            where=choice.where,
            expected=f"at most {context} tokens",
            found=length,
        )
    largest = max(max(choice.prompt), *map(max, choice.options))
    if largest >= model.config.vocab_size:
        raise DataError(
            "the question holds a token that the model lacks",
            where=choice.where,
            expected=f"ids below {model.config.vocab_size}",
            found=largest,
            fix="Give the tokenizer that belongs to the model",
        )
