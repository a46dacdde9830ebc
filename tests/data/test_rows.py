from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from megatron_replay.data.corpus import Document
from megatron_replay.data.row_formats import FORMATS, detect_format, tokenize_row
from megatron_replay.data.rows import parse_row
from megatron_replay.data.tokenizer import load_tokenizer
from megatron_replay.errors import DataError
from tests.data.tiny_tokenizers import save_hugging_face


def parse(fields):
    return parse_row("rows.jsonl:7", json.dumps(fields).encode())


def document(fields, tokenizer, row_format=None):
    row = parse(fields)
    return tokenize_row(row, row_format or detect_format(row), tokenizer)


def spans(document, tokenizer):
    """The document as [(text, carries loss), ...]: what a reader would check by eye."""
    cuts = [0, *(np.flatnonzero(np.diff(document.loss_mask)) + 1), len(document)]
    return [
        (tokenizer.decode(document.tokens[a:b].tolist()), bool(document.loss_mask[a]))
        for a, b in pairwise(cuts)
    ]


CHAT = [
    ("<|im_start|>system\nBe brief.<|im_end|>\n", False),
    ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", False),
    ("hello<|im_end|>", True),
    ("\n<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n", False),
    ("see you<|im_end|>", True),
    ("\n", False),
]
CHAT_SPANS = [(CHAT[0][0] + CHAT[1][0], False), *CHAT[2:]]


def test_prompt_completion(tokenizer):
    got = document({"prompt": "2 + 2 =", "completion": " 4"}, tokenizer)
    assert spans(got, tokenizer) == [("2 + 2 =", False), (" 4<|endoftext|>", True)]
    assert got.tokens.dtype == np.int32
    assert got.loss_mask.dtype == np.bool_
    # The last position of the prompt predicts the first token of the completion.
    first = len(tokenizer.encode("2 + 2 ="))
    assert got.eligible_positions().tolist() == list(range(first - 1, len(got) - 1))


def test_padding_equal_to_eos_does_not_mask_the_eos(tokenizer):
    assert tokenizer.pad_id == tokenizer.eos_id
    got = document({"prompt": "a", "completion": "b"}, tokenizer)
    assert got.tokens[-1] == tokenizer.eos_id
    assert got.loss_mask[-1]


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


def test_messages(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "see you"},
    ]
    assert spans(document({"messages": messages}, tokenizer), tokenizer) == CHAT_SPANS


def test_sharegpt(tokenizer):
    turns = [("human", "hi"), ("gpt", "hello"), ("user", "bye"), ("assistant", "see you")]
    conversations = [{"from": speaker, "value": value} for speaker, value in turns]
    fields = {"id": "x1", "system": "Be brief.", "conversations": conversations}
    assert spans(document(fields, tokenizer), tokenizer) == CHAT_SPANS
    first = {"from": "system", "value": "Be brief."}
    fields = {"conversations": [first, *conversations]}
    assert spans(document(fields, tokenizer), tokenizer) == CHAT_SPANS


def test_a_template_without_end_token_keeps_all_of_the_turn(tmp_path):
    plain = load_tokenizer(
        save_hugging_face(
            tmp_path / "plain",
            chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}",
        )
    )
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    got = document({"messages": turns}, plain)
    assert spans(got, plain) == [("user: hi\nassistant:", False), (" yes\n", True)]


def test_text(tokenizer):
    got = document({"text": "select 1"}, tokenizer)
    assert spans(got, tokenizer) == [("select 1<|endoftext|>", True)]


def test_sentencepiece_prompt_and_text(sentencepiece_tokenizer):
    encode = sentencepiece_tokenizer.encode
    got = document({"prompt": "how many", "completion": "singers"}, sentencepiece_tokenizer)
    assert got.tokens.tolist() == [*encode("how many"), *encode("singers"), 2]
    assert got.loss_mask.tolist() == [False] * len(encode("how many")) + [True] * (
        len(encode("singers")) + 1
    )
    got = document({"text": "singers"}, sentencepiece_tokenizer)
    assert got.tokens.tolist() == [*encode("singers"), 2]
    assert got.loss_mask.all()


TURN = {"role": "user", "content": "hi"}
BAD = [
    ({"prompt": "a"}, "prompt", r"missing key \(expected 'completion'; found 'prompt'\)"),
    ({"prompt": 3, "completion": "b"}, "prompt", "'prompt' has the wrong type .*a string.*number"),
    ({"prompt": None, "completion": "b"}, "prompt", "found null"),
    ({"prompt": "", "completion": "b"}, "prompt", "'prompt' is empty"),
    ({"prompt": "a", "completion": ""}, "prompt", "no answer token: 'completion' is empty"),
    ({"prompt": "\ud800", "completion": "b"}, "prompt", "'prompt' is not valid Unicode"),
    ({"instruction": "a", "output": ""}, "alpaca", "no answer token: 'output' is empty"),
    ({"instruction": "", "output": "b"}, "alpaca", "'instruction' is empty"),
    (
        {"instruction": "a", "output": "b", "history": [["c", "d"]]},
        "alpaca",
        "'history' would be lost",
    ),
    ({"conversations": []}, "sharegpt", "the conversation is empty"),
    ({"conversations": "hi"}, "sharegpt", r"expected a list; found a string"),
    ({"conversations": ["hi"]}, "sharegpt", r"conversations\[0\] is not an object"),
    ({"conversations": [{"from": "human"}]}, "sharegpt", r"expected 'conversations\[0\].value'"),
    (
        {"conversations": [{"from": "robot", "value": "x"}]},
        "sharegpt",
        "expected one of system, human, user, gpt, assistant; found 'robot'",
    ),
    ({"messages": [TURN]}, "messages", "no answer token: no message is the assistant's"),
    (
        {"messages": [TURN, {"role": "assistant", "content": ""}]},
        "messages",
        "no answer token: an assistant's message is empty",
    ),
    (
        {"messages": [TURN, {"role": "assistant", "content": None}]},
        "messages",
        r"'messages\[1\].content' has the wrong type",
    ),
    (
        {"messages": [{"role": "assistant", "content": "hi"}]},
        "messages",
        "the conversation starts with an answer",
    ),
    ({"messages": [TURN], "tools": [{"name": "f"}]}, "messages", "'tools' would be lost"),
    ({"text": ""}, "text", "'text' is empty"),
    ({"text": ["a"]}, "text", "expected a string; found a list"),
]


@pytest.mark.parametrize(("fields", "row_format", "message"), BAD)
def test_a_bad_row_names_its_line_and_reason(tokenizer, fields, row_format, message):
    with pytest.raises(DataError, match=rf"^rows.jsonl:7: .*{message}"):
        document(fields, tokenizer, row_format)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', r"not JSON: .* \(expected one JSON object per line\)"),
        (b'{"text": "a", "text": "b"}', r"the key 'text' is there twice"),
        (b'{"text": "a", "meta": {"b": 1, "c": 1, "b": 2}}', r"the key 'b' is there twice"),
        (b'{"text": "\xff"}', "not JSON: 'utf-8' codec can't decode"),
        (b"\n", "empty line"),
        (b"[1]", r"not a row \(expected one JSON object per line; found a JSON array\). Convert"),
        (b"[\n", r"not a row \(expected one JSON object per line; found a JSON array\). Convert"),
        (b"3", "not a row .*found a number"),
        (b'{"text":' + b"[" * 100_000, "not JSON"),
    ],
)
def test_a_line_that_is_no_row(line, message):
    with pytest.raises(DataError, match=rf"^f:1: {message}"):
        parse_row("f:1", line)


def test_detection(tokenizer):
    rows = {
        "prompt": {"prompt": "a", "completion": "b", "id": 1},
        "alpaca": {"instruction": "a", "output": "b"},
        "sharegpt": {"conversations": []},
        "messages": {"messages": []},
        "text": {"text": "a"},
    }
    assert set(rows) == set(FORMATS)
    assert all(detect_format(parse(row)) == name for name, row in rows.items())
    with pytest.raises(DataError, match=r"no known format .*prompt.*found 'question', 'answer'"):
        detect_format(parse({"question": "a", "answer": "b"}))
    with pytest.raises(
        DataError, match=r"fits the formats messages and text\. Choose with --format"
    ):
        detect_format(parse({"messages": [], "text": "a"}))


@pytest.mark.parametrize("max_tokens", [2, 3, 7, 10, 11])
def test_split_keeps_every_label_once(max_tokens):
    whole = Document(np.arange(10, dtype=np.int32), np.ones(10, dtype=np.bool_))
    pieces = whole.split(max_tokens)
    assert all(2 <= len(piece) <= max_tokens for piece in pieces)
    seen = [
        (int(piece.tokens[t]), int(piece.tokens[t + 1]))
        for piece in pieces
        for t in piece.eligible_positions()
    ]
    assert seen == [(i, i + 1) for i in range(9)]
    assert sum(int(piece.loss_mask.sum()) for piece in pieces) == 10
    assert whole.loss_mask.all()  # the pieces are not views that were written to
