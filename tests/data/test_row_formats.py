"""Each format's tokens and loss mask; a row's content is trained on, is metadata, or is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_replay.data.row_formats import FORMATS, detect_format, tokenize_row
from megatron_replay.data.rows import parse_row
from megatron_replay.errors import DataError
from tests.data.examples import document, parse, spans
from tests.data.tiny_tokenizers import CHATML

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
ROWS = {
    "prompt": {"prompt": "a", "completion": "b"},
    "alpaca": {"instruction": "a", "output": "b"},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "messages": {"messages": [USER, ANSWER]},
    "text": {"text": "a b"},
}
CHATS = ("messages", "sharegpt")
SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"
CALL = {"tool_calls": [{"name": "weather"}]}


def tokens(fields, tokenizer, row_format=None):
    return document(fields, tokenizer, row_format).tokens.tolist()


# ------------------------------------------------------------------------------ the five formats
def test_prompt_completion(tokenizer):
    got = document({"prompt": "2 + 2 =", "completion": " 4"}, tokenizer)
    assert spans(got, tokenizer) == [("2 + 2 =", False), (" 4<|endoftext|>", True)]
    assert got.tokens.dtype == np.int32
    assert got.loss_mask.dtype == np.bool_
    # The last position of the prompt predicts the first token of the completion.
    first = len(tokenizer.encode("2 + 2 ="))
    assert got.eligible_positions().tolist() == list(range(first - 1, len(got) - 1))
    # Padding equal to the EOS does not mask it.
    assert got.tokens[-1] == tokenizer.eos_id == tokenizer.pad_id


@pytest.mark.parametrize(
    ("context", "middle"),
    [
        ("", "completes the request.\n\n### Instruction:\nadd\n\n### Response:"),
        ("1, 2", "request.\n\n### Instruction:\nadd\n\n### Input:\n1, 2\n\n### Response:"),
    ],
)
def test_alpaca(tokenizer, context, middle):
    got = document({"instruction": "add", "input": context, "output": "3"}, tokenizer)
    (prompt, prompt_loss), answer = spans(got, tokenizer)
    assert prompt.startswith("Below is an instruction that describes a task")
    assert prompt.endswith(middle)
    assert not prompt_loss
    assert answer == ("3<|endoftext|>", True)


def test_conversations(tokenizer):
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "see you")]
    messages = [{"role": role, "content": content} for role, content in turns]
    names = ["human", "gpt", "user", "assistant"]
    conversations = [
        {"from": name, "value": turn[1]} for name, turn in zip(names, turns, strict=True)
    ]
    expected = [
        (SYSTEM + "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", False),
        ("hello<|im_end|>", True),
        ("\n<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n", False),
        ("see you<|im_end|>", True),
        ("\n", False),
    ]
    for row in (
        {"messages": [{"role": "system", "content": "Be brief."}, *messages]},
        {"id": "x1", "system": "Be brief.", "conversations": conversations},
        {"conversations": [{"from": "system", "value": "Be brief."}, *conversations]},
    ):
        assert spans(document(row, tokenizer), tokenizer) == expected


def test_a_template_without_end_token_keeps_all_of_the_turn(saved):
    plain = saved(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    got = document(ROWS["messages"], plain)
    assert spans(got, plain) == [("user: hi\nassistant:", False), (" hello\n", True)]


def test_text(tokenizer):
    got = document({"text": "select 1"}, tokenizer)
    assert spans(got, tokenizer) == [("select 1<|endoftext|>", True)]


def test_sentencepiece_prompt_and_text(sentencepiece_tokenizer):
    prompt, answer = map(sentencepiece_tokenizer.encode, ("how many", "singers"))
    got = document({"prompt": "how many", "completion": "singers"}, sentencepiece_tokenizer)
    assert got.tokens.tolist() == [*prompt, *answer, 2]
    assert got.loss_mask.tolist() == [False] * len(prompt) + [True] * (len(answer) + 1)
    got = document({"text": "singers"}, sentencepiece_tokenizer)
    assert got.tokens.tolist() == [*answer, 2]
    assert got.loss_mask.all()


def test_detection():
    assert set(ROWS) == set(FORMATS)
    assert all(detect_format(parse({**row, "id": 1})) == name for name, row in ROWS.items())
    with pytest.raises(DataError, match=r"prompt.*found 'question', 'answer'"):
        detect_format(parse({"question": "a", "answer": "b"}))
    with pytest.raises(DataError, match=r"messages and text\. .*--format"):
        detect_format(parse({"messages": [], "text": "a"}))


def conversation(*messages):
    return {"messages": list(messages)}


BAD = [
    ({"prompt": "a"}, "prompt", r"\(expected 'completion'; found 'prompt'\)"),
    ({"prompt": 3, "completion": "b"}, "prompt", "'prompt' .*a string; found a number"),
    ({"prompt": None, "completion": "b"}, "prompt", "found null"),
    ({"prompt": "", "completion": "b"}, "prompt", "'prompt' is empty"),
    ({"prompt": "a", "completion": ""}, "prompt", "'completion' is empty"),
    ({"prompt": "\ud800", "completion": "b"}, "prompt", "'prompt' is not valid Unicode"),
    ({"instruction": "a", "output": ""}, "alpaca", "'output' is empty"),
    ({"instruction": "", "output": "b"}, "alpaca", "'instruction' is empty"),
    ({**ROWS["alpaca"], "history": [["c", "d"]]}, "alpaca", "'history' would be lost"),
    ({"conversations": []}, "sharegpt", "the conversation is empty"),
    ({"conversations": "hi"}, "sharegpt", "expected a list; found a string"),
    ({"conversations": ["hi"]}, "sharegpt", r"conversations\[0\] is not an object"),
    ({"conversations": [{"from": "human"}]}, "sharegpt", r"'conversations\[0\].value'"),
    (
        {"conversations": [{"from": "robot", "value": "x"}]},
        "sharegpt",
        r"conversations\[0\].from .*expected one of .*gpt, assistant; found 'robot'",
    ),
    (conversation(USER), "messages", "no answer token"),
    (conversation(USER, {**ANSWER, "content": ""}), "messages", "no answer .*found message 1"),
    (conversation(USER, {**ANSWER, "content": None}), "messages", r"'messages\[1\].content'"),
    (conversation(ANSWER), "messages", "starts with an answer"),
    ({**conversation(USER), "tools": [{"name": "f"}]}, "messages", "'tools' would be lost"),
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
    (
        conversation(USER, {**ANSWER, "weight": 1, "train": False}),
        "messages",
        r"messages\[1\] contradicts itself",
    ),
    # Two texts where the template has one place.
    (
        {"conversations": [ROWS["sharegpt"]["conversations"][0],
                           {"from": "gpt", "value": "b", "content": "another answer"}]},
        "sharegpt",
        "'content' of message 1 would be lost",
    ),
    (
        {**ROWS["messages"], "system": "Be brief.", "system_prompt": "Be long."},
        "messages",
        "two different system messages",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "row_format", "message"), BAD)
def test_a_bad_row_names_its_line_and_reason(tokenizer, fields, row_format, message):
    with pytest.raises(DataError, match=rf"^rows.jsonl:7: .*{message}"):
        document(fields, tokenizer, row_format)


@pytest.mark.parametrize("content", [" ", "\n\n", "\t \n"])
def test_a_blank_answer_is_refused_as_such(tokenizer, content):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": content}]
    rows = {
        "messages": conversation(USER, {**ANSWER, "content": content}),
        "sharegpt": {"conversations": turns},
        "prompt": {"prompt": "a", "completion": content},
        "alpaca": {"instruction": "a", "output": content},
    }
    for row_format, row in rows.items():
        with pytest.raises(DataError, match=r"^rows.jsonl:7: no answer token: .* is blank"):
            document(row, tokenizer, row_format)


# ---------------------------------------------------------------------------- no field is lost
@pytest.mark.parametrize("row_format", ROWS)
def test_metadata_and_what_is_empty_change_nothing(tokenizer, row_format):
    row = ROWS[row_format]
    expected = tokens(row, tokenizer, row_format)
    metadata = {"id": 7, "Source": "web", "dataset": "x", "split": "train", "language": "en"}
    assert tokens({**row, **metadata, "category": {"a": 1}}, tokenizer, row_format) == expected
    for empty in ("[]", [], {}, "", None, "{}", [None, ""], {"a": []}, " \n"):
        fields = {**row, "tools": empty, "context": empty, "history": empty}
        assert tokens(fields, tokenizer, row_format) == expected


@pytest.mark.parametrize("row_format", ROWS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("context", "the text of the question"),
        ("history", [["a", "b"]]),
        ("images", ["a.png"]),
        ("chosen", "b"),
        ("tools", [{"name": "f"}]),
        ("tools", '[{"name": "f"}]'),
        ("weight", 0),
        ("train", False),
    ],
)
def test_another_field_is_refused_or_ignored_by_name(tokenizer, row_format, name, value):
    fields = {**ROWS[row_format], name: value}
    with pytest.raises(DataError, match=rf"^rows.jsonl:7: '{name}' would be lost: .*{name}$"):
        document(fields, tokenizer, row_format)
    ignoring = parse_row("rows.jsonl:7", json.dumps(fields).encode(), frozenset([name]))
    expected = tokens(ROWS[row_format], tokenizer, row_format)
    assert tokenize_row(ignoring, row_format, tokenizer).tokens.tolist() == expected


@pytest.mark.parametrize("row_format", ["prompt", "alpaca", "text"])
def test_a_system_text_is_refused_where_no_template_writes_it(tokenizer, row_format):
    with pytest.raises(DataError, match="'system', 'suffix' would be lost"):
        document({**ROWS[row_format], "system": "Be brief.", "suffix": "c"}, tokenizer, row_format)


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
        fields = {"messages": [system, *row["messages"]], name: "Be brief."}
        assert tokens(fields, tokenizer, row_format) == got.tokens.tolist()
        with pytest.raises(DataError, match=f"'{name}' and message 0"):
            document({**fields, name: "Be long."}, tokenizer, row_format)
    with pytest.raises(DataError, match=f"'{name}' has the wrong type"):
        document({**row, name: ["Be brief."]}, tokenizer, row_format)


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
@pytest.mark.parametrize("row_format", CHATS)
def test_an_answer_marked_to_carry_no_loss(tokenizer, row_format, key):
    name = "conversations" if row_format == "sharegpt" else "messages"
    user, answer = ROWS[row_format][name]
    whole = document({name: [user, answer] * 2}, tokenizer, row_format)
    for no, yes in ((0, 1), (False, True), (0.0, 1.0)):
        marked = [{**user, key: no}, {**answer, key: no}, user, {**answer, key: yes}]
        got = document({name: marked}, tokenizer, row_format)
        assert got.tokens.tolist() == whole.tokens.tolist()
        with_loss = [text for text, has_loss in spans(got, tokenizer) if has_loss]
        assert with_loss == [f"{answer.get('content', answer.get('value'))}<|im_end|>"]
    null = document({name: [user, {**answer, key: None}] * 2}, tokenizer, row_format)
    assert null.loss_mask.tolist() == whole.loss_mask.tolist()


# -------------------------------------------------- what a chat template leaves out is refused
READS_MORE = CHATML.replace(
    "{{ message.content }}",
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content }}{% for call in message.tool_calls or [] %}[{{ call.name }}]{% endfor %}",
)


TURNS = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
TOOL = {"role": "tool", "content": "4 C"}


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        (conversation(USER, {**ANSWER, **CALL}, TOOL, ANSWER), ["hello[weather]", "hello"]),
        # A call needs no text.
        (conversation(USER, {"role": "assistant", **CALL}), ["[weather]"]),
        (conversation(USER, {"role": "assistant", "content": None, **CALL}), ["[weather]"]),
        (conversation(USER, {"role": "assistant", "content": "", **CALL}), ["[weather]"]),
        (conversation(USER, {**ANSWER, "reasoning_content": "so"}), ["<think>so</think>hello"]),
        (
            {"conversations": [TURNS[0], {**TURNS[1], "reasoning_content": "so"}]},
            ["<think>so</think>hello"],
        ),
    ],
)
def test_a_key_that_the_template_reads_is_honoured(saved, row, answers):
    reads_more = saved(READS_MORE)
    got = spans(document(row, reads_more), reads_more)
    assert [text for text, loss in got if loss] == [f"{text}<|im_end|>" for text in answers]


@pytest.mark.parametrize("more", [CALL, {"reasoning_content": "so"}, {"name": "Bo"}, {"id": 3}])
def test_a_key_that_the_template_does_not_read_is_refused(tokenizer, more):
    (key,) = more
    for messages in ([USER, {**ANSWER, **more}], [USER, ANSWER, {**USER, **more}, ANSWER]):
        at = next(i for i, message in enumerate(messages) if key in message)
        with pytest.raises(DataError, match=rf"^rows.jsonl:7: '{key}' of message {at} would be"):
            document(conversation(*messages), tokenizer)
    line = json.dumps(conversation({**USER, **more}, ANSWER)).encode()
    ignoring = parse_row("rows.jsonl:7", line, frozenset([key]))
    expected = tokens(ROWS["messages"], tokenizer)
    assert tokenize_row(ignoring, "messages", tokenizer).tokens.tolist() == expected


def test_empty_keys_of_a_message_are_not_lost(tokenizer):
    more = {"tool_calls": [], "function_call": None, "name": "", "reasoning_content": "[]"}
    row = conversation(USER, {**ANSWER, **more})
    assert tokens(row, tokenizer) == tokens(ROWS["messages"], tokenizer)


OF_USER_AND_ASSISTANT = CHATML.replace(
    "{% for message in messages %}",
    "{% for message in messages if message.role in ('user', 'assistant') %}",
)
OWN_SYSTEM = CHATML.replace(
    "{% for message in messages %}",
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% for message in messages if message.role != 'system' %}",
)
#: As Qwen3's: the last thought before the answer, and what follows the last thought.
LAST_THOUGHT = CHATML.replace(
    "{{ message.content }}",
    "{% set parts = message.content.split('</think>') %}{% if parts | length > 1 %}<think>\n"
    "{{ parts[0].split('<think>')[-1].strip('\n') }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].lstrip('\n') }}",
)
FIRST_CALL = CHATML.replace(
    "{{ message.content }}",
    "{{ message.content }}{% if message.tool_calls %}{% set f = message.tool_calls[0].function %}"
    "[{{ f.name }}({{ f.arguments | tojson }})]{% endif %}",
)


def test_a_message_that_the_template_does_not_write_is_refused(saved, tokenizer):
    deaf = saved(OF_USER_AND_ASSISTANT)
    plain = ROWS["messages"]
    assert tokens(plain, deaf) == tokens(plain, tokenizer)
    tool = {"role": "tool", "content": "hello"}  # its text is there, in another message
    with pytest.raises(DataError, match=r"message 1 \(role 'tool'\) would be lost"):
        document(conversation(USER, tool, ANSWER), deaf)
    with pytest.raises(DataError, match=r"the row's 'system' \(role 'system'\) would be lost"):
        document({**plain, "system": "Be brief."}, deaf)


@pytest.mark.parametrize("text", ["You are a helpful assistant.", "a", "assistant"])
def test_a_text_that_the_templates_own_words_contain_is_refused(saved, text):
    own = saved(OWN_SYSTEM)
    for row in (
        conversation({"role": "system", "content": text}, USER, ANSWER),
        {**ROWS["messages"], "system": text},
    ):
        with pytest.raises(DataError, match=r"the content of .* \(role 'system'\) would be lost"):
            document(row, own)


@pytest.mark.parametrize(
    ("answer", "lost"),
    [
        ("<think>\nhmm\n</think>\n\nfour", None),
        ("<think>hmm, a < b >c</think> \n four", None),
        ("<think>\nhmm\n</think>", None),
        ("<think>\n\n</think>\n\nfour", None),
        ("Let me see. <think>\nhmm\n</think>\n\nfour", r"'Let me see\.'"),
        ("<think>hmm</think> four is <think>again</think> five", "four is"),
        ("<think>hmm</think> four </think> five", "four"),
    ],
)
def test_a_part_of_an_answer_that_the_template_leaves_out_is_refused(saved, answer, lost):
    last, row = saved(LAST_THOUGHT), conversation(USER, {"role": "assistant", "content": answer})
    if lost is None:
        assert document(row, last).eligible_positions().size
    else:
        with pytest.raises(DataError, match=f"part of the content of message 1 .*{lost}"):
            document(row, last)


def test_a_part_of_a_field_that_the_template_leaves_out_is_refused(saved):
    first = saved(FIRST_CALL)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": 2}}}

    def row(*calls):
        return conversation(USER, {**ANSWER, "tool_calls": list(calls)})

    assert document(row(call), first).eligible_positions().size
    for calls, lost in (
        ([call, call], r"tool_calls\[1\]\['function'\]\['name'\]"),
        ([{**call, "custom": "x"}], r"tool_calls\[0\]\['custom'\]"),
        ([{**call, "custom": [None, {"a": "x"}]}], r"tool_calls\[0\]\['custom'\]\[1\]\['a'\]"),
    ):
        with pytest.raises(DataError, match=f"{lost} of message 1 would be lost"):
            document(row(*calls), first)


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
