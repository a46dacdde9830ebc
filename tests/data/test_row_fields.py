"""Nothing that a row says is lost: it changes what is trained, is metadata, or is refused."""

from __future__ import annotations

import json

import pytest

from megatron_replay.data.row_formats import tokenize_row
from megatron_replay.data.rows import parse_row
from megatron_replay.data.tokenizer import load_tokenizer
from megatron_replay.errors import DataError
from tests.data.test_rows import document, spans
from tests.data.tiny_tokenizers import CHATML, save_hugging_face

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
ROWS = {
    "prompt": {"prompt": "a", "completion": "b"},
    "alpaca": {"instruction": "a", "output": "b"},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "messages": {"messages": [USER, ANSWER]},
    "text": {"text": "a b"},
}
SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"
READS_MORE = CHATML.replace(
    "{{ message.content }}",
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content }}{% for call in message.tool_calls or [] %}[{{ call.name }}]{% endfor %}",
)
WITHOUT_TOOLS = CHATML.replace(
    "{% for message in messages %}",
    "{% for message in messages if message.role in ('user', 'assistant') %}",
)


@pytest.fixture(scope="module")
def reads_more(tmp_path_factory):
    directory = tmp_path_factory.mktemp("reads-more") / "tokenizer"
    return load_tokenizer(save_hugging_face(directory, chat_template=READS_MORE))


def tokens(fields, tokenizer, row_format):
    return document(fields, tokenizer, row_format).tokens.tolist()


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
        ("context", "the text that is asked about"),
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
    with pytest.raises(DataError, match=r"'system', 'suffix' would be lost: .* carry them"):
        document({**ROWS[row_format], "system": "Be brief.", "suffix": "c"}, tokenizer, row_format)


@pytest.mark.parametrize("row_format", ["messages", "sharegpt"])
@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_text_beside_the_conversation_comes_first(tokenizer, row_format, name):
    row, system = ROWS[row_format], {"role": "system", "content": "Be brief."}
    got = document({**row, name: "Be brief."}, tokenizer, row_format)
    without = document(row, tokenizer, row_format)
    assert got.tokens.tolist() == tokenizer.encode(SYSTEM) + without.tokens.tolist()
    assert got.eligible_positions().size == without.eligible_positions().size
    if row_format == "messages":
        fields = {"messages": [system, *row["messages"]], name: "Be brief."}
        assert tokens(fields, tokenizer, row_format) == got.tokens.tolist()
        fields[name] = "Be long."
        with pytest.raises(DataError, match=f"'{name}' and message 0 are two different system"):
            document(fields, tokenizer, row_format)
    with pytest.raises(DataError, match=f"'{name}' has the wrong type"):
        document({**row, name: ["Be brief."]}, tokenizer, row_format)


def test_two_system_texts_of_a_row(tokenizer):
    row = {**ROWS["messages"], "system": "Be brief."}
    same = tokens({**row, "system_prompt": "Be brief."}, tokenizer, "messages")
    assert same == tokens(row, tokenizer, "messages")
    with pytest.raises(DataError, match="are two different system messages"):
        document({**row, "system_prompt": "Be long."}, tokenizer, "messages")


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
@pytest.mark.parametrize("row_format", ["messages", "sharegpt"])
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


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER, {**ANSWER, "weight": 0}], "every answer is marked to carry no loss"),
        ([USER, {**ANSWER, "weight": 0.5}], r"messages\[1\].weight has no meaning .*found 0.5"),
        ([USER, {**ANSWER, "loss": "0"}], r"messages\[1\].loss has no meaning"),
        ([USER, {**ANSWER, "train": [1]}], r"messages\[1\].train has no meaning"),
        ([USER, {**ANSWER, "weight": -1}], r"messages\[1\].weight has no meaning"),
        ([{**USER, "weight": 1}, ANSWER], r"messages\[0\].weight .*not the assistant"),
        ([{**USER, "train": True}, ANSWER], r"messages\[0\].train .*not the assistant"),
        ([USER, {**ANSWER, "weight": 1, "train": False}], r"messages\[1\] contradicts itself"),
    ],
)
def test_marks_that_cannot_be(tokenizer, messages, message):
    with pytest.raises(DataError, match=f"^rows.jsonl:7: .*{message}"):
        document({"messages": messages}, tokenizer)


CALL = {"tool_calls": [{"name": "weather"}]}


def test_a_key_that_the_template_reads_is_honoured(reads_more):
    calls = [USER, {**ANSWER, **CALL}, {"role": "tool", "content": "4 C"}, ANSWER]
    answers = [
        text for text, loss in spans(document({"messages": calls}, reads_more), reads_more) if loss
    ]
    assert answers == ["hello[weather]<|im_end|>", "hello<|im_end|>"]
    for content in ({"content": None}, {}, {"content": ""}):  # a call needs no text
        row = {"messages": [USER, {"role": "assistant", **content, **CALL}]}
        assert spans(document(row, reads_more), reads_more)[1] == ("[weather]<|im_end|>", True)
    row = {"messages": [USER, {**ANSWER, "reasoning_content": "so"}]}
    assert spans(document(row, reads_more), reads_more)[1][0] == "<think>so</think>hello<|im_end|>"
    row = {
        "conversations": [
            {"from": "human", "value": "hi"},
            {"from": "gpt", "value": "hello", "reasoning_content": "so"},
        ]
    }
    assert spans(document(row, reads_more), reads_more)[1][0] == "<think>so</think>hello<|im_end|>"


@pytest.mark.parametrize("more", [CALL, {"reasoning_content": "so"}, {"name": "Bo"}, {"id": 3}])
def test_a_key_that_the_template_does_not_read_is_refused(tokenizer, more):
    (key,) = more
    for messages in ([USER, {**ANSWER, **more}], [USER, ANSWER, {**USER, **more}, ANSWER]):
        at = next(i for i, message in enumerate(messages) if key in message)
        with pytest.raises(
            DataError, match=rf"^rows.jsonl:7: '{key}' of message {at} would be lost"
        ):
            document({"messages": messages}, tokenizer)
    line = json.dumps({"messages": [{**USER, **more}, ANSWER]}).encode()
    ignoring = parse_row("rows.jsonl:7", line, frozenset([key]))
    expected = tokens(ROWS["messages"], tokenizer, "messages")
    assert tokenize_row(ignoring, "messages", tokenizer).tokens.tolist() == expected


def test_empty_keys_of_a_message_are_not_lost(tokenizer):
    more = {"tool_calls": [], "function_call": None, "name": "", "reasoning_content": "[]"}
    row = {"messages": [USER, {**ANSWER, **more}]}
    assert tokens(row, tokenizer, "messages") == tokens(ROWS["messages"], tokenizer, "messages")


def test_a_turn_with_the_keys_of_the_other_format(tokenizer):
    turn = {"from": "gpt", "value": "b", "content": "another answer"}
    row = {"conversations": [{"from": "human", "value": "a"}, turn]}
    with pytest.raises(DataError, match="'content' of message 1 would be lost"):
        document(row, tokenizer)


def test_a_message_that_the_template_does_not_write_is_refused(tmp_path, tokenizer):
    deaf = load_tokenizer(save_hugging_face(tmp_path / "deaf", chat_template=WITHOUT_TOOLS))
    plain = {"messages": [USER, ANSWER]}
    assert tokens(plain, deaf, "messages") == tokens(plain, tokenizer, "messages")
    tool = {"role": "tool", "content": "hello"}  # its text is there, in another message
    with pytest.raises(
        DataError, match=r"the content of message 1 \(role 'tool'\) would be lost: "
    ):
        document({"messages": [USER, tool, ANSWER]}, deaf)
    with pytest.raises(DataError, match=r"the row's 'system' \(role 'system'\) would be lost"):
        document({**plain, "system": "Be brief."}, deaf)


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


@pytest.mark.parametrize("text", ["You are a helpful assistant.", "a", "assistant"])
def test_a_text_that_the_templates_own_words_contain_is_refused(tmp_path, text):
    own = load_tokenizer(save_hugging_face(tmp_path / "own", chat_template=OWN_SYSTEM))
    for row in (
        {"messages": [{"role": "system", "content": text}, USER, ANSWER]},
        {"messages": [USER, ANSWER], "system": text},
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
def test_a_part_of_an_answer_that_the_template_leaves_out_is_refused(tmp_path, answer, lost):
    last = load_tokenizer(save_hugging_face(tmp_path / "last", chat_template=LAST_THOUGHT))
    row = {"messages": [USER, {"role": "assistant", "content": answer}]}
    if lost is None:
        assert document(row, last).eligible_positions().size
    else:
        with pytest.raises(DataError, match=f"part of the content of message 1 .*{lost}"):
            document(row, last)


def test_a_part_of_a_field_that_the_template_leaves_out_is_refused(tmp_path):
    first = load_tokenizer(save_hugging_face(tmp_path / "first", chat_template=FIRST_CALL))
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": 2}}}

    def row(*calls):
        return {"messages": [USER, {**ANSWER, "tool_calls": list(calls)}]}

    assert document(row(call), first).eligible_positions().size
    for calls, lost in (
        ([call, call], r"tool_calls\[1\]\['function'\]\['name'\]"),
        ([{**call, "custom": "x"}], r"tool_calls\[0\]\['custom'\]"),
        ([{**call, "custom": [None, {"a": "x"}]}], r"tool_calls\[0\]\['custom'\]\[1\]\['a'\]"),
    ):
        with pytest.raises(DataError, match=f"{lost} of message 1 would be lost"):
            document(row(*calls), first)


def test_a_template_that_changes_or_reorders_what_it_writes_is_none_that_loses_it(tmp_path):
    """Mistral's writes the system text into the last user message; many strip white space."""
    template = (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
        "{% if loop.index0 == loop.length - 2 or loop.last and m.role == 'user' %}"
        "{{ messages[0].content }}\n{% endif %}"
        "{{ m.content | trim | upper }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    odd = load_tokenizer(save_hugging_face(tmp_path / "odd", chat_template=template))
    row = {"messages": [{"role": "system", "content": "hi"}, {**USER, "content": " hi "}, ANSWER]}
    got = spans(document(row, odd), odd)
    assert got[0][0] == "<|im_start|>user\nhi\nHI<|im_end|>\n<|im_start|>assistant\n"
    assert got[1] == ("HELLO<|im_end|>", True)
