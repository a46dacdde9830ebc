"""Each format's tokens and loss mask; a row's content is trained on, is metadata, or is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_replay.data.row_formats import FORMATS, detect_format, tokenize_row
from megatron_replay.data.rows import parse_row
from tests.data.examples import document, parse, refused, spans
from tests.data.tiny_tokenizers import CHATML

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
TURNS = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
TOOL = {"role": "tool", "content": "4 C"}
CALL = {"tool_calls": [{"name": "weather"}]}
SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"


def conversation(*messages, **more):
    return {"messages": list(messages), **more}


def sharegpt(*turns, **more):
    return {"conversations": list(turns), **more}


ROWS = {
    "prompt": {"prompt": "a", "completion": "b"},
    "alpaca": {"instruction": "a", "output": "b"},
    "sharegpt": sharegpt(*TURNS),
    "messages": conversation(USER, ANSWER),
    "text": {"text": "a b"},
}
CHATS = {"messages": "messages", "sharegpt": "conversations"}


def tokens(fields, tokenizer, row_format=None, ignored=()):
    if not ignored:
        return document(fields, tokenizer, row_format).tokens.tolist()
    row = parse_row("rows.jsonl:7", json.dumps(fields).encode(), frozenset(ignored))
    return tokenize_row(row, row_format, tokenizer).tokens.tolist()


# ------------------------------------------------------------------------------ the five formats
BELOW = "Below is an instruction that describes a task"
INSTRUCTED = " that appropriately completes the request.\n\n### Instruction:\nadd\n\n### "


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "2 + 2 =", "completion": "4"}, [("2 + 2 =", False), ("4<|endoftext|>", True)]),
        (
            {"instruction": "add", "input": "", "output": "3"},
            [(f"{BELOW}. Write a response{INSTRUCTED}Response:", False), ("3<|endoftext|>", True)],
        ),
        (
            {"instruction": "add", "input": "1, 2", "output": "3"},
            [
                (f"{BELOW}, paired with an input that provides further context. Write a response"
                 f"{INSTRUCTED}Input:\n1, 2\n\n### Response:", False),
                ("3<|endoftext|>", True),
            ],
        ),
        ({"text": "select 1"}, [("select 1<|endoftext|>", True)]),
    ],
)  # fmt: skip
def test_formats_without_a_template(tokenizer, row, expected):
    got = document(row, tokenizer)
    assert spans(got, tokenizer) == expected
    assert (got.tokens.dtype, got.loss_mask.dtype) == (np.int32, np.bool_)
    # The last position of the prompt predicts the first token of the answer.
    prompts = [text for text, has_loss in expected if not has_loss]
    first = max(sum(len(tokenizer.encode(text)) for text in prompts) - 1, 0)
    assert got.eligible_positions().tolist() == list(range(first, len(got) - 1))
    # Padding equal to the EOS does not mask it.
    assert got.tokens[-1] == tokenizer.eos_id == tokenizer.pad_id


def test_conversations(tokenizer):
    messages = [USER, ANSWER, {"role": "user", "content": "bye"}, {**ANSWER, "content": "see you"}]
    names = ["human", "gpt", "user", "assistant"]
    turns = [{"from": n, "value": m["content"]} for n, m in zip(names, messages, strict=True)]
    expected = [
        (SYSTEM + "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", False),
        ("hello<|im_end|>", True),
        ("\n<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n", False),
        ("see you<|im_end|>", True),
        ("\n", False),
    ]
    for row in (
        conversation({"role": "system", "content": "Be brief."}, *messages),
        sharegpt(*turns, id="x1", system="Be brief."),
        sharegpt({"from": "system", "value": "Be brief."}, *turns),
    ):
        assert spans(document(row, tokenizer), tokenizer) == expected


def test_a_template_without_end_token_keeps_all_of_the_turn(saved):
    plain = saved(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    got = document(ROWS["messages"], plain)
    assert spans(got, plain) == [("user: hi\nassistant:", False), (" hello\n", True)]


def test_sentencepiece_prompt_and_text(sentencepiece_tokenizer):
    prompt, answer = map(sentencepiece_tokenizer.encode, ("how many", "singers"))
    got = document({"prompt": "how many", "completion": "singers"}, sentencepiece_tokenizer)
    assert got.tokens.tolist() == [*prompt, *answer, 2]
    assert got.loss_mask.tolist() == [False] * len(prompt) + [True] * (len(answer) + 1)
    assert tokens({"text": "singers"}, sentencepiece_tokenizer) == [*answer, 2]


def test_detection():
    assert set(ROWS) == set(FORMATS)
    assert all(detect_format(parse({**row, "id": 1})) == name for name, row in ROWS.items())


BAD = [
    ({"question": "a", "answer": "b"}, None, r"prompt.*found 'question', 'answer'"),
    ({"messages": [], "text": "a"}, None, r"messages and text\. .*--format"),
    ({"prompt": "a"}, "prompt", r"\(expected 'completion'; found 'prompt'\)"),
    ({"prompt": 3, "completion": "b"}, "prompt", "'prompt' .*a string; found a number"),
    ({"prompt": None, "completion": "b"}, "prompt", "found null"),
    ({"prompt": "", "completion": "b"}, "prompt", "'prompt' is empty"),
    ({"prompt": "a", "completion": ""}, "prompt", "'completion' is empty"),
    ({"prompt": "a", "completion": "\t \n"}, "prompt", "no answer token: .* is blank"),
    ({"prompt": "\ud800", "completion": "b"}, "prompt", "'prompt' is not valid Unicode"),
    ({"instruction": "a", "output": ""}, "alpaca", "'output' is empty"),
    ({"instruction": "a", "output": " "}, "alpaca", "no answer token: .* is blank"),
    ({"instruction": "", "output": "b"}, "alpaca", "'instruction' is empty"),
    ({**ROWS["alpaca"], "history": [["c", "d"]]}, "alpaca", "'history' would be lost"),
    (sharegpt(), "sharegpt", "the conversation is empty"),
    ({"conversations": "hi"}, "sharegpt", "expected a list; found a string"),
    (sharegpt("hi"), "sharegpt", r"conversations\[0\] is not an object"),
    (sharegpt({"from": "human"}), "sharegpt", r"'conversations\[0\].value'"),
    (sharegpt({"from": "robot", "value": "x"}), "sharegpt",
     r"conversations\[0\].from .*expected one of .*gpt, assistant; found 'robot'"),
    (sharegpt(TURNS[0], {"from": "gpt", "value": "\n\n"}), "sharegpt",
     "no answer token: .* is blank .*found message 1"),
    (conversation(USER), "messages", "no answer token"),
    (conversation(USER, {**ANSWER, "content": ""}), "messages", "no answer .*found message 1"),
    (conversation(USER, {**ANSWER, "content": None}), "messages", r"'messages\[1\].content'"),
    (conversation(ANSWER), "messages", "starts with an answer"),
    (conversation(USER, tools=[{"name": "f"}]), "messages", "'tools' would be lost"),
    ({"text": ""}, "text", "'text' is empty"),
    ({"text": ["a"]}, "text", "expected a string; found a list"),
    # Marks that say which answers carry loss.
    (conversation(USER, {**ANSWER, "weight": 0}), "messages", "no answer token"),
    (conversation(USER, {**ANSWER, "weight": 0.5}), "messages", r"\[1\].weight .*found 0.5"),
    (conversation(USER, {**ANSWER, "loss": "0"}), "messages", r"messages\[1\].loss has no"),
    (conversation(USER, {**ANSWER, "train": [1]}), "messages", r"messages\[1\].train has no"),
    (conversation(USER, {**ANSWER, "weight": -1}), "messages", r"messages\[1\].weight has no"),
    (conversation({**USER, "weight": 1}, ANSWER), "messages", r"\[0\].weight .*no 'weight'"),
    (conversation({**USER, "train": True}, ANSWER), "messages", r"\[0\].train .*no 'train'"),
    (conversation(USER, {**ANSWER, "weight": 1, "train": False}), "messages",
     r"messages\[1\] contradicts itself"),
    # Two texts where the template has one place.
    (sharegpt(TURNS[0], {**TURNS[1], "content": "another answer"}), "sharegpt",
     "'content' of message 1 would be lost"),
    ({**ROWS["messages"], "system": "Be brief.", "system_prompt": "Be long."}, "messages",
     "two different system messages"),
    # No template writes a system text.
    *(({**ROWS[name], "system": "Be brief.", "suffix": "c"}, name,
       "'system', 'suffix' would be lost") for name in ("prompt", "alpaca", "text")),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "row_format", "message"), BAD)
def test_a_bad_row_names_its_line_and_reason(tokenizer, fields, row_format, message):
    refused(fields, tokenizer, message, row_format)


# ---------------------------------------------------------------------------- no field is lost
@pytest.mark.parametrize("row_format", ROWS)
def test_metadata_and_what_is_empty_change_nothing(tokenizer, row_format):
    row = ROWS[row_format]
    expected = tokens(row, tokenizer, row_format)
    metadata = {"id": 7, "Source": "web", "dataset": "x", "split": "train", "category": {"a": 1}}
    assert tokens({**row, **metadata}, tokenizer, row_format) == expected
    for empty in ("[]", [], {}, "", None, "{}", [None, ""], {"a": []}, " \n"):
        fields = {**row, "tools": empty, "context": empty, "history": empty}
        assert tokens(fields, tokenizer, row_format) == expected


@pytest.mark.parametrize("row_format", ROWS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("context", "the text of the question"),
        ("history", [["a", "b"]]),
        ("tools", '[{"name": "f"}]'),
        ("weight", 0),
        ("train", False),
    ],
)
def test_another_field_is_refused_or_ignored_by_name(tokenizer, row_format, name, value):
    fields = {**ROWS[row_format], name: value}
    refused(fields, tokenizer, f"'{name}' would be lost: .*{name}$", row_format)
    expected = tokens(ROWS[row_format], tokenizer, row_format)
    assert tokens(fields, tokenizer, row_format, [name]) == expected


@pytest.mark.parametrize("row_format", CHATS)
@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_text_beside_the_conversation_comes_first(tokenizer, row_format, name):
    row, system = ROWS[row_format], {"role": "system", "content": "Be brief."}
    got = document({**row, name: "Be brief."}, tokenizer, row_format)
    without = document(row, tokenizer, row_format)
    assert got.tokens.tolist() == tokenizer.encode(SYSTEM) + without.tokens.tolist()
    assert got.eligible_positions().size == without.eligible_positions().size
    twice = {**row, "system": "Be brief.", "system_prompt": "Be brief."}
    assert tokens(twice, tokenizer, row_format) == got.tokens.tolist()
    if row_format == "messages":
        fields = conversation(system, *row["messages"], **{name: "Be brief."})
        assert tokens(fields, tokenizer, row_format) == got.tokens.tolist()
        refused({**fields, name: "Be long."}, tokenizer, f"'{name}' and message 0", row_format)
    message = f"'{name}' has the wrong type"
    refused({**row, name: ["Be brief."]}, tokenizer, message, row_format)


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
@pytest.mark.parametrize("row_format", CHATS)
def test_an_answer_marked_to_carry_no_loss(tokenizer, row_format, key):
    name = CHATS[row_format]
    user, answer = ROWS[row_format][name]
    whole = document({name: [user, answer] * 2}, tokenizer, row_format)
    for no, yes in ((0, 1), (False, True), (0.0, 1.0)):
        marked = [{**user, key: no}, {**answer, key: no}, user, {**answer, key: yes}]
        got = document({name: marked}, tokenizer, row_format)
        assert got.tokens.tolist() == whole.tokens.tolist()
        assert [text for text, loss in spans(got, tokenizer) if loss] == ["hello<|im_end|>"]
    null = document({name: [user, {**answer, key: None}] * 2}, tokenizer, row_format)
    assert null.loss_mask.tolist() == whole.loss_mask.tolist()


# -------------------------------------------------- what a chat template leaves out is refused
def chatml(text, replacement):
    assert text in CHATML
    return CHATML.replace(text, replacement)


EACH, CONTENT = "{% for message in messages %}", "{{ message.content }}"
READS_MORE = chatml(
    CONTENT,
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content }}{% for call in message.tool_calls or [] %}[{{ call.name }}]{% endfor %}",
)
OF_USER_AND_ASSISTANT = chatml(
    EACH, "{% for message in messages if message.role in ('user', 'assistant') %}"
)
OWN_SYSTEM = chatml(
    EACH,
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% for message in messages if message.role != 'system' %}",
)
#: As Qwen3's: the last thought before the answer, and what follows the last thought.
LAST_THOUGHT = chatml(
    CONTENT,
    "{% set parts = message.content.split('</think>') %}{% if parts | length > 1 %}<think>\n"
    "{{ parts[0].split('<think>')[-1].strip('\n') }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].lstrip('\n') }}",
)
FIRST_CALL = chatml(
    CONTENT,
    "{{ message.content }}{% if message.tool_calls %}{% set f = message.tool_calls[0].function %}"
    "[{{ f.name }}({{ f.arguments | tojson }})]{% endif %}",
)


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        (conversation(USER, {**ANSWER, **CALL}, TOOL, ANSWER), ["hello[weather]", "hello"]),
        # A call needs no text.
        (conversation(USER, {"role": "assistant", **CALL}), ["[weather]"]),
        (conversation(USER, {"role": "assistant", "content": None, **CALL}), ["[weather]"]),
        (conversation(USER, {"role": "assistant", "content": "", **CALL}), ["[weather]"]),
        (conversation(USER, {**ANSWER, "reasoning_content": "so"}), ["<think>so</think>hello"]),
        (sharegpt(TURNS[0], {**TURNS[1], "reasoning_content": "so"}), ["<think>so</think>hello"]),
    ],
)
def test_a_key_that_the_template_reads_is_honoured(saved, row, answers):
    reads_more = saved(READS_MORE)
    got = spans(document(row, reads_more), reads_more)
    assert [text for text, loss in got if loss] == [f"{text}<|im_end|>" for text in answers]


@pytest.mark.parametrize("more", [CALL, {"reasoning_content": "so"}, {"name": "Bo"}, {"id": 3}])
def test_a_key_that_the_template_does_not_read_is_refused(tokenizer, more):
    (key,) = more
    for at, messages in (
        (1, [USER, {**ANSWER, **more}]),
        (2, [USER, ANSWER, {**USER, **more}, ANSWER]),
    ):
        refused(conversation(*messages), tokenizer, f"'{key}' of message {at} would be")
    row = conversation({**USER, **more}, ANSWER)
    assert tokens(row, tokenizer, "messages", [key]) == tokens(ROWS["messages"], tokenizer)


def test_empty_keys_of_a_message_are_not_lost(tokenizer):
    more = {"tool_calls": [], "function_call": None, "name": "", "reasoning_content": "[]"}
    row = conversation(USER, {**ANSWER, **more})
    assert tokens(row, tokenizer) == tokens(ROWS["messages"], tokenizer)


def with_answer(content):
    return conversation(USER, {**ANSWER, "content": content})


def with_calls(*calls):
    return conversation(USER, {**ANSWER, "tool_calls": list(calls)})


FULL_CALL = {"id": "1", "type": "function",
             "function": {"name": "f", "arguments": {"a": 1, "b": 2}}}  # fmt: skip


@pytest.mark.parametrize(
    ("template", "row", "lost"),
    [
        (OF_USER_AND_ASSISTANT, ROWS["messages"], None),
        # Its text is there, in another message.
        (OF_USER_AND_ASSISTANT, conversation(USER, {"role": "tool", "content": "hello"}, ANSWER),
         r"the content of message 1 \(role 'tool'\) would be lost"),
        (OF_USER_AND_ASSISTANT, {**ROWS["messages"], "system": "Be brief."},
         r"the content of the row's 'system' \(role 'system'\) would be lost"),
        # The template's own words contain it.
        *((OWN_SYSTEM, {**ROWS["messages"], "system": text}, r"\(role 'system'\) would be lost")
          for text in ("You are a helpful assistant.", "a", "assistant")),
        (OWN_SYSTEM, conversation({"role": "system", "content": "a"}, USER, ANSWER),
         r"the content of message 0 \(role 'system'\) would be lost"),
        (LAST_THOUGHT, with_answer("<think>\nhmm\n</think>\n\nfour"), None),
        (LAST_THOUGHT, with_answer("<think>hmm, a < b >c</think> \n four"), None),
        (LAST_THOUGHT, with_answer("<think>\nhmm\n</think>"), None),
        (LAST_THOUGHT, with_answer("<think>\n\n</think>\n\nfour"), None),
        (LAST_THOUGHT, with_answer("Let me see. <think>\nhmm\n</think>\n\nfour"),
         r"part of the content of message 1 .*'Let me see\.'"),
        (LAST_THOUGHT, with_answer("<think>hmm</think> four is <think>again</think> five"),
         "part of the content of message 1 .*four is"),
        (LAST_THOUGHT, with_answer("<think>hmm</think> four </think> five"),
         "part of the content of message 1 .*four"),
        # Values inside a key.
        (FIRST_CALL, with_calls(FULL_CALL), None),
        (FIRST_CALL, with_calls(FULL_CALL, FULL_CALL),
         r"tool_calls\[1\]\['function'\]\['name'\] of message 1 would be lost"),
        (FIRST_CALL, with_calls({**FULL_CALL, "custom": "x"}),
         r"tool_calls\[0\]\['custom'\] of message 1 would be lost"),
        (FIRST_CALL, with_calls({**FULL_CALL, "custom": [None, {"a": "x"}]}),
         r"tool_calls\[0\]\['custom'\]\[1\]\['a'\] of message 1 would be lost"),
    ],
)  # fmt: skip
def test_what_the_template_does_not_write_is_refused(saved, template, row, lost):
    if lost is None:
        assert document(row, saved(template)).eligible_positions().size
    else:
        refused(row, saved(template), lost)


def test_a_template_that_changes_or_reorders_what_it_writes_loses_nothing(saved):
    """Mistral's writes the system text into the last user message; many strip white space."""
    odd = saved(
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
        "{% if loop.index0 == loop.length - 2 or loop.last and m.role == 'user' %}"
        "{{ messages[0].content }}\n{% endif %}"
        "{{ m.content | trim | upper }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    system = {"role": "system", "content": "hi"}
    got = spans(document(conversation(system, {**USER, "content": " hi "}, ANSWER), odd), odd)
    assert got[0][0] == "<|im_start|>user\nhi\nHI<|im_end|>\n<|im_start|>assistant\n"
    assert got[1] == ("HELLO<|im_end|>", True)
