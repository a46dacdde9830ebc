"""Answers of batches that share first tokens, against ``generate`` on one prompt at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import GenerationConfig

from megatron_replay.data.tokenizer import load_tokenizer
from megatron_replay.evaluation.generation import Answer, greedy_answers
from megatron_replay.evaluation.language_model import load_model
from megatron_replay.evaluation.sql.sets import sql_prompt
from tests.evaluation.site import EOS

SCHEMAS = [
    ["CREATE TABLE book (title text)", "CREATE TABLE shop (name text)"],
    ["CREATE TABLE book (title text)", "CREATE TABLE author (name text)"],
    ["CREATE TABLE router (id integer)"],
]
QUESTIONS = ["how many?", "how many are there?", "which one?"]
#: Nothing in common, an equal, a prefix of another, and one token.
OTHERS = ["who?", "who?", "who? Me", "w"]


@pytest.fixture(scope="module")
def model(site):
    return load_model(site / "base").double()  # rounding decides no answer


@pytest.fixture(scope="module")
def sql_prompts(site):
    """Two databases share a table; every database's questions share its schema."""
    tokenizer = load_tokenizer(site / "base")
    texts = [sql_prompt(schema, question) for question in QUESTIONS for schema in SCHEMAS]
    return [tokenizer.encode(text) for text in [*texts, *OTHERS]]


def alone(model, prompt: list[int], eos_id: int, max_new_tokens: int) -> Answer:
    tokens = torch.tensor([prompt])
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos_id, pad_token_id=EOS
    )
    found = model.generate(tokens, generation_config=config, attention_mask=tokens >= 0)
    answer = found[0, len(prompt) :].tolist()
    return Answer(answer[:-1], True) if answer[-1] == eos_id else Answer(answer, False)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_sql_prompts(model, sql_prompts, batch_size):
    eos_id = alone(model, sql_prompts[0], EOS, 12).tokens[-1]  # some answers reach it
    expected = [alone(model, prompt, eos_id, 12) for prompt in sql_prompts]
    assert {answer.finished for answer in expected} == {True, False}
    found = greedy_answers(
        model, sql_prompts, stop_ids={eos_id}, max_new_tokens=12, batch_size=batch_size
    )
    assert found == expected


@given(
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=6),
    batch_size=st.integers(1, 5),
    max_new_tokens=st.integers(1, 4),
)
@example(prompts=[[1], [2], [1]], batch_size=2, max_new_tokens=3)
def test_any_prompts(model, prompts, batch_size, max_new_tokens):
    """Of three tokens, so that they begin alike at every level."""
    eos_id = alone(model, prompts[0], EOS, 3).tokens[-1]
    expected = [alone(model, prompt, eos_id, max_new_tokens) for prompt in prompts]
    found = greedy_answers(
        model, prompts, stop_ids={eos_id}, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    assert found == expected


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_shared_tokens_pass_through_the_model_once(model, sql_prompts, batch_size):
    """Whatever the batches are; and then each prompt's last token, for the first of its answer."""
    counts: list[int] = []
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda _, given: counts.append(given[0].numel()))
    with hook:
        greedy_answers(model, sql_prompts, stop_ids={EOS}, max_new_tokens=1, batch_size=batch_size)
    beginnings = {tuple(prompt[: n + 1]) for prompt in sql_prompts for n in range(len(prompt))}
    assert sum(counts) == len(beginnings) + len(sql_prompts)
    assert len(beginnings) < sum(map(len, sql_prompts)) / 2


def test_generation_config_is_ignored_and_kept(site, sql_prompts):
    model = load_model(site / "base").double()
    expected = greedy_answers(model, sql_prompts, stop_ids={EOS}, max_new_tokens=5)
    model.generation_config.do_sample = True
    model.generation_config.repetition_penalty = 5.0
    assert greedy_answers(model, sql_prompts, stop_ids={EOS}, max_new_tokens=5) == expected
    assert model.generation_config.do_sample
