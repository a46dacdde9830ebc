"""JSON lines to documents: five formats, each one function from a row to tokens and loss mask.

=============  ==================================================  =============================
format         row                                                 what carries loss
=============  ==================================================  =============================
``prompt``     ``{"prompt": "…", "completion": "…"}``              completion and EOS
``alpaca``     ``{"instruction": "…", "input": "…", "output": …}`` output and EOS
``sharegpt``   ``{"conversations": [{"from": …, "value": …}, …]}`` the assistant's turns
``messages``   ``{"messages": [{"role": …, "content": …}, …]}``    the assistant's turns
``text``       ``{"text": "…"}``                                   every token and EOS
=============  ==================================================  =============================

Prompt and completion are encoded apart, as a model meets them when it generates. The two chat
formats use the tokenizer's chat template (``chat.py``) and take a ``system`` or ``system_prompt``
beside the messages; alpaca rows use the prompt they were published with, which needs none. What a
row says beside these is metadata, left out by name, or refused (``row.py``).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_replay.data.document import Document
from megatron_replay.data.row import Row as Row  # for those who read rows as well
from megatron_replay.data.row import json_type
from megatron_replay.data.row_chat import read_conversation
from megatron_replay.data.row_files import open_rows
from megatron_replay.data.tokenizer import Tokenizer
from megatron_replay.errors import DataError

# github.com/tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)

_EXPECTED = "one JSON object per line"
_CONVERT = (
    'Convert it: python -c "import json, sys; [print(json.dumps(row)) for row in '
    'json.load(open(sys.argv[1]))]" FILE > FILE.jsonl'
)


def read_lines(path: Path, name: str | None = None) -> Iterator[tuple[str, bytes]]:
    """Yield ``(FILE:LINE, bytes)`` for every line of ``path``, plain or compressed by gzip.

    A byte order mark and blank lines at the end are left out.

    Args:
        name: shown instead of ``path``.

    Raises:
        DataError: the file cannot be read, or holds no lines of text.
    """
    name, blank = name or str(path), 0
    with open_rows(path, name) as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                blank += 1
                continue
            for before in range(number - blank, number):
                yield f"{name}:{before}", b"\n"
            blank = 0
            yield f"{name}:{number}", line


def parse_row(where: str, line: bytes, ignored: frozenset[str] = frozenset()) -> Row:
    """Parse one line; fields whose names are ``ignored`` are left out.

    Raises:
        DataError: it is empty, not UTF-8, not JSON, not an object, or has two values for one key.
    """
    if not line.strip():
        raise DataError("empty line", where=where, expected=_EXPECTED)
    is_array = line.lstrip().startswith(b"[")  # on one line, or on many
    try:
        fields = None if is_array else _DECODER.decode(line.decode())
    except (ValueError, RecursionError) as error:
        what = str(error) if isinstance(error, _TwiceError) else f"not JSON: {error}"
        raise DataError(what, where=where, expected=_EXPECTED) from error
    if not isinstance(fields, dict):
        raise DataError(
            "not a row",
            where=where,
            expected=_EXPECTED,
            found="a JSON array" if is_array else json_type(fields),
            fix=_CONVERT if is_array else None,
        )
    return Row(where, {k: v for k, v in fields.items() if k not in ignored}, ignored)


class _TwiceError(ValueError):
    """Two values under one key."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; json would keep the last of two values under one key, without a word."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise _TwiceError(f"the key {counts.most_common(1)[0][0]!r} is there twice")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _tokens(row: Row, text: str, tokenizer: Tokenizer) -> list[int]:
    try:
        return tokenizer.encode(text)
    except DataError as error:
        raise row.error(str(error)) from error


def _prompt_completion(row: Row, prompt: str, answer: str, tokenizer: Tokenizer) -> Document:
    prompt_ids = _tokens(row, prompt, tokenizer)
    answer_ids = [*_tokens(row, answer, tokenizer), tokenizer.eos_id]
    tokens = np.array(prompt_ids + answer_ids, dtype=np.int32)
    return Document(tokens, np.arange(len(tokens)) >= len(prompt_ids))


def _answer(row: Row, name: str) -> str:
    answer = row.text(name)
    if not answer.strip():
        raise row.error(f"no answer token: {name!r} is {'blank' if answer else 'empty'}")
    return answer


def _from_prompt(row: Row, tokenizer: Tokenizer) -> Document:
    prompt, completion = row.text("prompt"), _answer(row, "completion")
    if not prompt:
        raise row.error("'prompt' is empty", fix='Write raw text as {"text": …} rows')
    return _prompt_completion(row, prompt, completion, tokenizer)


def _from_alpaca(row: Row, tokenizer: Tokenizer) -> Document:
    instruction, context = row.text("instruction"), row.text_or_empty("input")
    if not instruction:
        raise row.error("'instruction' is empty")
    template = _ALPACA_WITH_INPUT if context else _ALPACA
    prompt = template.format(instruction=instruction, input=context)
    return _prompt_completion(row, prompt, _answer(row, "output"), tokenizer)


def _from_sharegpt(row: Row, tokenizer: Tokenizer) -> Document:
    return read_conversation(row, "conversations", ("from", "value"), tokenizer)


def _from_messages(row: Row, tokenizer: Tokenizer) -> Document:
    return read_conversation(row, "messages", ("role", "content"), tokenizer)


def _from_text(row: Row, tokenizer: Tokenizer) -> Document:
    text = row.text("text")
    if not text:
        raise row.error("'text' is empty")
    tokens = np.array([*_tokens(row, text, tokenizer), tokenizer.eos_id], dtype=np.int32)
    return Document(tokens, np.ones(len(tokens), dtype=np.bool_))


@dataclass(frozen=True)
class RowFormat:
    """How a format is recognised (the keys it must have) and read (with what else it carries)."""

    keys: tuple[str, ...]
    read: Callable[[Row, Tokenizer], Document]
    also: tuple[str, ...] = ()


_SYSTEM = ("system", "system_prompt")
FORMATS = {
    "prompt": RowFormat(("prompt", "completion"), _from_prompt),
    "alpaca": RowFormat(("instruction", "output"), _from_alpaca, ("input",)),
    "sharegpt": RowFormat(("conversations",), _from_sharegpt, _SYSTEM),
    "messages": RowFormat(("messages",), _from_messages, _SYSTEM),
    "text": RowFormat(("text",), _from_text),
}
#: The formats that the tokenizer's chat template writes.
CHAT_FORMATS = tuple(name for name, form in FORMATS.items() if form.also == _SYSTEM)


def detect_format(row: Row) -> str:
    """The one format whose keys the row has.

    Raises:
        DataError: no format fits, or more than one.
    """
    fitting = [
        name for name, form in FORMATS.items() if all(key in row.fields for key in form.keys)
    ]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise row.error(f"fits the formats {' and '.join(fitting)}", fix="Choose with --format")
    known = ", ".join(f"{name} ({'+'.join(form.keys)})" for name, form in FORMATS.items())
    keys = ", ".join(map(repr, row.fields)) or "no keys"
    raise row.error("no known format", expected=f"the keys of one of {known}", found=keys)


def tokenize_row(row: Row, row_format: str, tokenizer: Tokenizer) -> Document:
    """One row to one document of at least two tokens, at least one of them with loss.

    Args:
        row_format: a key of ``FORMATS``.

    Raises:
        DataError: the row does not fit the format, holds what would be lost, or nothing in it
            could be learnt.
    """
    form = FORMATS[row_format]
    if all(key in row.fields for key in form.keys):
        row.refuse_unread(row_format, (*form.keys, *form.also))
    document = form.read(row, tokenizer)
    if not document.loss_mask[1:].any():
        raise row.error("no answer token after the first token")
    return document
