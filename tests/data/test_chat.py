"""Where an answer begins and ends in what a template writes, and what tokens do there."""

from __future__ import annotations

import pytest

from tests.data.examples import document, refused, spans
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


def chat(*messages):
    return {"messages": list(messages)}


@pytest.fixture(scope="module")
def merging(saved):
    """A tokenizer whose tokens may hold several newlines."""
    return saved(blank_lines=True)


def test_answers_with_and_without_blank_lines(merging):
    """A token would reach from the header into the second answer: they are encoded apart."""
    whole, header = merging.encode(f"{HEADER}\n\n- a<|im_end|>\n"), merging.encode(HEADER)
    assert whole[: len(header)] != header
    got = document(chat(USER, answer("a"), USER, answer("\n\n- a"), USER, answer("b")), merging)
    assert spans(got, merging) == [
        (HEADER, False), ("a<|im_end|>", True),
        (f"\n{HEADER}", False), ("\n\n- a<|im_end|>", True),
        (f"\n{HEADER}", False), ("b<|im_end|>", True), ("\n", False),
    ]  # fmt: skip
    alone = document(chat(USER, answer("\n\n- a")), merging).tokens.tolist()
    assert alone == header + merging.encode("\n\n- a<|im_end|>") + merging.encode("\n")


def test_other_rows_are_encoded_as_a_whole(merging):
    user = {"role": "user", "content": "\n\n\nb\n\n"}
    messages = [USER, answer("- a\n\n\n- b"), user, answer("b")]
    got = document(chat(*messages), merging)
    assert got.tokens.tolist() == merging.encode(merging.render_chat(messages, False))


def test_a_border_that_a_tokenizer_cannot_keep(saved):
    """Encoded apart, the answer would begin with a blank that the model never sees there."""
    plain = CHATML.replace("<|im_end|>", "").replace("<|im_start|>", "")
    llama = saved(plain, blank_lines=True, like_sentencepiece=True)
    got = spans(document(chat(USER, answer("b")), llama), llama)
    assert [has_loss for _, has_loss in got] == [False, True]
    message = r"a token reaches across the border .*expected '\\n\\n- a"
    refused(chat(USER, answer("\n\n- a")), llama, message)


def test_a_header_that_opens_a_thought(saved):
    thinking = saved(OPENS_A_THOUGHT)
    message = r"\(expected '<think>\\n'; found 'hello<\|im_end\|>\\n'\)"
    refused(chat(USER, answer("hello")), thinking, message)
    for thought in ("so\n</think>\n\nhello", "\n</think>\n\nhello"):
        got = document(chat(USER, answer(f"<think>\n{thought}")), thinking)
        assert spans(got, thinking)[:2] == [
            (f"{HEADER}<think>\n", False), (f"{thought}<|im_end|>", True)
        ]  # fmt: skip


def test_a_template_that_rewrites_earlier_answers(saved):
    """Qwen3's drops the thoughts of all answers but the last."""
    forgetful, one = saved(FORGETFUL), (USER, answer("yes"))
    refused(chat(*one, *one), forgetful, " message 1 ")
    for earlier in ((), (USER, answer("yes", weight=0))):
        got = spans(document(chat(*earlier, *one), forgetful), forgetful)
        texts = [text for text, has_loss in got if has_loss]
        assert texts == ["<think>\n\n</think>\n\nyes<|im_end|>"]
    counting = saved("{{ messages | length }}\n" + CHATML)
    refused(chat(*one), counting, "what is before message 1 ")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ range(10 ** 9) }}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ nothing.there }}", "'nothing' is undefined"),
        ("{{ 'a' + 1 }}", "str"),
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('no\nsuch role') }}", "refuses the conversation: no such role"),
        ("{{ raise_exception('x' * 90000) }}", "x{500}$"),
        ("{{ 'x' * 30000000000 }}", "more than 2 GiB"),
        (
            "{{ (messages | length) * 35000000 * 'x' }}",
            r"writes too much \(expected at most 67108864 characters",
        ),
    ],
)
def test_a_template_that_fails_is_one_line(saved, template, message):
    refused(chat(USER, answer("yes")), saved(template), f"the chat template .*{message}")


def test_a_row_without_any_template(saved):
    refused(chat(USER, answer("yes")), saved(None), "the tokenizer has no chat template")


def test_a_template_without_end(saved, tokenizer, monkeypatch):
    """CPU time is bounded, so that a busy machine refuses no row."""
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr("megatron_replay.data.tokenizer_limits.SECONDS", 0.05)
    row = chat(USER, answer("yes"))
    refused(row, saved(endless), "took more than 0.05 s of CPU time")
    monkeypatch.undo()
    assert document(row, tokenizer).loss_mask.any()
