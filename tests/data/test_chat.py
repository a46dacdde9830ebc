"""Where an answer begins and ends in what a template writes, and what tokens do there."""

from __future__ import annotations

import pytest

from megatron_replay.errors import DataError
from tests.data.examples import document, spans
from tests.data.tiny_tokenizers import CHATML

USER = {"role": "user", "content": "hi"}
HEADER = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
OPENS_A_THOUGHT = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
# Writes thoughts into the last answer only, as Qwen3's does.
FORGETFUL = CHATML.replace(
    "{{ message.content }}",
    "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message.content }}",
)


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


@pytest.fixture(scope="module")
def merging(saved):
    """A tokenizer whose tokens may hold several newlines."""
    return saved(blank_lines=True)


@pytest.mark.parametrize("content", ["\n\n- a\n- b\n", "\n\n\n\nb"])
def test_an_answer_that_begins_with_blank_lines(merging, content):
    """A token would reach from the header into the answer: they are encoded apart."""
    whole = merging.encode(f"{HEADER}{content}<|im_end|>\n")
    header = merging.encode(HEADER)
    assert whole[: len(header)] != header
    got = document({"messages": [USER, answer(content)]}, merging)
    answer_ids = merging.encode(f"{content}<|im_end|>")
    assert got.tokens[: -len(merging.encode("\n"))].tolist() == header + answer_ids
    assert spans(got, merging) == [
        (HEADER, False), (f"{content}<|im_end|>", True), ("\n", False)
    ]  # fmt: skip


def test_answers_with_and_without_blank_lines(merging):
    messages = [USER, answer("a"), USER, answer("\n\n- a"), USER, answer("b")]
    assert spans(document({"messages": messages}, merging), merging) == [
        (HEADER, False), ("a<|im_end|>", True),
        (f"\n{HEADER}", False), ("\n\n- a<|im_end|>", True),
        (f"\n{HEADER}", False), ("b<|im_end|>", True), ("\n", False),
    ]  # fmt: skip


def test_other_rows_are_encoded_as_a_whole(merging):
    messages = [
        USER,
        answer("- a\n\n\n- b"),
        {"role": "user", "content": "\n\n\nb\n\n"},
        answer("b"),
    ]
    got = document({"messages": messages}, merging)
    assert got.tokens.tolist() == merging.encode(merging.render_chat(messages, False))


def test_a_border_that_a_tokenizer_cannot_keep(saved):
    """Encoded apart, the answer would begin with a blank that the model never sees there."""
    plain = CHATML.replace("<|im_end|>", "").replace("<|im_start|>", "")
    llama = saved(plain, blank_lines=True, like_sentencepiece=True)
    messages = [USER, answer("b")]
    got = spans(document({"messages": messages}, llama), llama)
    assert [has_loss for _, has_loss in got] == [False, True]
    with pytest.raises(
        DataError, match=r"^rows.jsonl:7: a token reaches across the border .*expected '\\n\\n- a"
    ):
        document({"messages": [USER, answer("\n\n- a")]}, llama)


def test_a_header_that_opens_a_thought(saved):
    thinking = saved(OPENS_A_THOUGHT)
    with pytest.raises(
        DataError,
        match=r"^rows.jsonl:7: .* "
        r"\(expected '<think>\\n'; found 'hello<\|im_end\|>\\n'\)",
    ):
        document({"messages": [USER, answer("hello")]}, thinking)
    for thought in ("so\n</think>\n\nhello", "\n</think>\n\nhello"):
        got = document({"messages": [USER, answer(f"<think>\n{thought}")]}, thinking)
        assert spans(got, thinking)[:2] == [
            (f"{HEADER}<think>\n", False), (f"{thought}<|im_end|>", True)
        ]  # fmt: skip


def test_a_template_that_rewrites_earlier_answers(saved):
    """Qwen3's drops the thoughts of all answers but the last."""
    forgetful = saved(FORGETFUL)
    one = [USER, answer("yes")]
    got = document({"messages": one}, forgetful)
    assert spans(got, forgetful)[1] == ("<think>\n\n</think>\n\nyes<|im_end|>", True)
    with pytest.raises(DataError, match=r"rows.jsonl:7: .* message 1 "):
        document({"messages": one + one}, forgetful)
    got = document({"messages": [USER, answer("yes", weight=0), *one]}, forgetful)
    assert [text for text, has_loss in spans(got, forgetful) if has_loss] == [
        "<think>\n\n</think>\n\nyes<|im_end|>"
    ]


def test_a_template_that_rewrites_what_is_before_an_answer(saved):
    counting = saved("{{ messages | length }}\n" + CHATML)
    with pytest.raises(DataError, match="what is before message 1 "):
        document({"messages": [USER, answer("yes")]}, counting)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ range(10 ** 9) }}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ nothing.there }}", "'nothing' is undefined"),
        ("{{ [][3].x }}", "has no element 3"),
        ("{{ 'a' + 1 }}", "str"),
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('no\nsuch role') }}", "no such role"),
        ("{{ raise_exception('x' * 90000) }}", "x{500}$"),
        ("{{ 'x' * 30000000000 }}", "more than 2 GiB"),
        (
            "{{ (messages | length) * 35000000 * 'x' }}",
            r"writes too much \(expected at most 67108864 characters",
        ),
    ],
)
def test_a_template_that_fails_is_one_line(saved, template, message):
    with pytest.raises(DataError, match=f"^rows.jsonl:7: the chat template .*{message}"):
        document({"messages": [USER, answer("yes")]}, saved(template))


def test_a_template_without_end(saved, tokenizer, monkeypatch):
    """CPU time is bounded, so that a busy machine refuses no row."""
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr("megatron_replay.data.tokenizer_limits.SECONDS", 0.05)
    row = {"messages": [USER, answer("yes")]}
    with pytest.raises(DataError, match=r"^rows.jsonl:7: .* took more than 0.05 s of CPU time"):
        document(row, saved(endless))
    monkeypatch.undo()
    assert document(row, tokenizer).loss_mask.any()
