"""Option scores against a float64 loop over single options; counts against numpy; bad rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_replay.data.tokenizer import load_tokenizer
from megatron_replay.errors import DataError
from megatron_replay.evaluation.choices import Choice, option_scores, read_choices, score_choices
from megatron_replay.evaluation.language_model import load_model
from tests.evaluation.models import VOCAB_SIZE


def random_choices(count: int, *, seed: int = 0) -> list[Choice]:
    """Prompts of few lengths, so that batches hold several; options of 1 to 6 tokens."""
    rng = np.random.default_rng(seed)
    choices = []
    for number in range(count):
        lengths = rng.integers(1, 7, rng.integers(2, 5))
        choices.append(
            Choice(
                where=f"question {number}",
                prompt=rng.integers(0, VOCAB_SIZE, rng.integers(1, 4)).tolist(),
                options=[rng.integers(0, VOCAB_SIZE, n).tolist() for n in lengths],
                num_bytes=lengths.tolist(),
                answer=int(rng.integers(len(lengths))),
            )
        )
    return choices


@pytest.fixture(scope="module")
def expected(model_directory: Path) -> list[list[float]]:
    model = AutoModelForCausalLM.from_pretrained(model_directory).double().eval()
    scores = []
    for choice in random_choices(12):
        totals = []
        for option in choice.options:
            with torch.no_grad():
                logprobs = model(torch.tensor([choice.prompt + option])).logits[0].log_softmax(-1)
            start = len(choice.prompt) - 1
            totals.append(sum(logprobs[start + i, t].item() for i, t in enumerate(option)))
        scores.append(totals)
    return scores


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_equal_a_plain_loop(
    model_directory: Path, expected: list[list[float]], batch_size: int
) -> None:
    scores = option_scores(load_model(model_directory), random_choices(12), batch_size=batch_size)
    assert [len(row) for row in scores] == [len(row) for row in expected]
    for row, wanted in zip(scores, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-5)


def test_counts(model_directory: Path, expected: list[list[float]]) -> None:
    choices = random_choices(12)
    raw = [int(np.argmax(row)) for row in expected]
    rates = [np.array(row) / c.num_bytes for row, c in zip(expected, choices, strict=True)]
    by_byte = [int(np.argmax(row)) for row in rates]
    assert raw != by_byte
    answers = np.array([choice.answer for choice in choices])
    result = score_choices(load_model(model_directory), choices)
    assert result["questions"] == 12
    assert result["correct"] == (answers == raw).sum()
    assert result["correct_per_byte"] == (answers == by_byte).sum()
    assert result["accuracy"] == result["correct"] / 12


def test_first_of_equals_wins_and_no_number_is_wrong(model_directory: Path) -> None:
    model = load_model(model_directory)
    twins = [
        Choice(where="", prompt=[1], options=[[5, 6]] * 3, num_bytes=[2] * 3, answer=answer)
        for answer in range(3)
    ]
    assert score_choices(model, twins)["correct"] == 1
    assert score_choices(model, twins[:1])["correct"] == 1
    model.get_input_embeddings().weight.data.fill_(float("nan"))
    assert score_choices(model, twins)["correct"] == 0


def test_rows_are_tokenized_as_training_rows_are(model_directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a?", "options": [" é", "bc"], "answer": 1}) + "\n")
    tokenizer = load_tokenizer(model_directory)
    [choice] = read_choices(path, tokenizer)
    assert tokenizer.decode(choice.prompt) == "a?"
    assert [tokenizer.decode(option) for option in choice.options] == [" é", "bc"]
    assert choice.num_bytes == [3, 2]


GOOD = {"prompt": "a?", "options": ["b", "c"], "answer": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": ["b"]}, "rows.jsonl:2: too few options (expected two or more; found 1)"),
        ({"options": "bc"}, "rows.jsonl:2: 'options' has the wrong type"),
        ({"options": ["b", 1]}, "rows.jsonl:2: 'options' has the wrong type (expected a string"),
        ({"options": ["b", ""]}, "rows.jsonl:2: option 1 is empty"),
        ({"prompt": ""}, "rows.jsonl:2: 'prompt' is empty"),
        ({"answer": 2}, "rows.jsonl:2: 'answer' names no option (expected a number from 0 to 1; "),
        ({"answer": -1}, "found -1"),
        ({"answer": True}, "found True"),
        ({"answer": "1"}, "found '1'"),
        ({"answer": None}, "found none"),
    ],
)
def test_bad_rows(
    model_directory: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (GOOD, GOOD | change)))
    with pytest.raises(DataError) as caught:
        read_choices(path, load_tokenizer(model_directory))
    assert message in str(caught.value)


def test_refuses_what_does_not_fit(model_directory: Path, tmp_path: Path) -> None:
    model = load_model(model_directory)
    for options, message in (
        (
            [[1], [2] * 512],
            "longer than the model's context (expected at most 512 tokens; found 513",
        ),
        ([[1], [VOCAB_SIZE]], f"expected ids below {VOCAB_SIZE}; found {VOCAB_SIZE}"),
    ):
        choice = Choice(where="q", prompt=[1, 2], options=options, num_bytes=[1, 1], answer=0)
        with pytest.raises(DataError) as caught:
            option_scores(model, [choice])
        assert message in str(caught.value)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(DataError, match="no questions"):
        read_choices(empty, load_tokenizer(model_directory))
