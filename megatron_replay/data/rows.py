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

Prompt and completion are encoded apart, as a model meets them when it generates. The last two chat
formats use the tokenizer's chat template (``chat.py``); alpaca rows use the prompt they were
published with, which needs none. Fields beside those named are ignored (ids, sources), except those
that would change the text (``history``, ``tools``, …): such a row is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_replay.data.chat import tokenize_conversation
from megatron_replay.data.document import Document
from megatron_replay.data.tokenizer import Message, Tokenizer
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

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


@dataclass(frozen=True)
class Row:
    """One line of a file, parsed, with ``FILE:LINE`` for the messages about it."""

    where: str
    fields: dict[str, Any]

    def text(self, name: str) -> str:
        """The string under ``name``.

        Raises:
            DataError: it is missing, no string, or no valid Unicode.
        """
        value: str = self.checked(self.fields, name, str)
        return value

    def checked(self, fields: Any, name: str, kind: type[Any], inside: str = "") -> Any:
        """``fields[name]``, checked to be a ``kind``; ``inside`` says where in the row."""
        at = f"{inside}{name}"
        if not isinstance(fields, dict):
            raise self.error(f"{inside.rstrip('.')} is not an object", found=_json_type(fields))
        if name not in fields:
            keys = ", ".join(map(repr, fields)) or "no keys"
            raise self.error("missing key", expected=repr(at), found=keys)
        value = fields[name]
        if not isinstance(value, kind):
            raise self.error(
                f"{at!r} has the wrong type", expected=_TYPES[kind], found=_json_type(value)
            )
        if kind is str and not value.isascii():
            self._require_unicode(at, value)
        return value

    def refuse(self, *names: str) -> None:
        """Raise if a field that would change the text, and that no format carries, is not empty."""
        for name in names:
            if self.fields.get(name):
                raise self.error(
                    f"{name!r} would be lost: this format does not carry it",
                    fix="Fold it into the conversation, or remove it",
                )

    def error(self, what: str, **facts: Any) -> DataError:
        """A DataError about this row."""
        return DataError(what, where=self.where, **facts)

    def _require_unicode(self, at: str, value: str) -> None:
        try:
            value.encode()
        except UnicodeEncodeError as error:  # "\ud800" is JSON, but half a character
            raise self.error(f"{at!r} is not valid Unicode: {error.reason}") from error


_TYPES: dict[type[Any], str] = {str: "a string", list: "a list", dict: "an object"}


def _json_type(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return _TYPES.get(type(value), "a number")


def read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield ``(FILE:LINE, bytes)`` for every line of ``path``.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with open(path, "rb") as handle:
            for number, line in enumerate(handle, start=1):
                yield f"{path}:{number}", line
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror}", where=path) from error


def parse_row(where: str, line: bytes) -> Row:
    """Parse one line.

    Raises:
        DataError: it is empty, not UTF-8, not JSON, or not an object.
    """
    if not line.strip():
        raise DataError("empty line", where=where, expected="a JSON object")
    try:
        fields = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", where=where) from error
    if not isinstance(fields, dict):
        raise DataError(
            "not a row", where=where, expected="a JSON object", found=_json_type(fields)
        )
    return Row(where, fields)


def _prompt_completion(prompt: str, completion: str, tokenizer: Tokenizer) -> Document:
    prompt_ids = tokenizer.encode(prompt)
    answer_ids = [*tokenizer.encode(completion), tokenizer.eos_id]
    tokens = np.array(prompt_ids + answer_ids, dtype=np.int32)
    return Document(tokens, np.arange(len(tokens)) >= len(prompt_ids))


def _from_prompt(row: Row, tokenizer: Tokenizer) -> Document:
    prompt, completion = row.text("prompt"), row.text("completion")
    if not prompt:
        raise row.error("'prompt' is empty", fix='Write raw text as {"text": …} rows')
    if not completion:
        raise row.error("no answer token: 'completion' is empty")
    return _prompt_completion(prompt, completion, tokenizer)


def _from_alpaca(row: Row, tokenizer: Tokenizer) -> Document:
    row.refuse("history", "system")
    instruction, output = row.text("instruction"), row.text("output")
    context = row.text("input") if "input" in row.fields else ""
    if not instruction:
        raise row.error("'instruction' is empty")
    if not output:
        raise row.error("no answer token: 'output' is empty")
    template = _ALPACA_WITH_INPUT if context else _ALPACA
    prompt = template.format(instruction=instruction, input=context)
    return _prompt_completion(prompt, output, tokenizer)


def _from_sharegpt(row: Row, tokenizer: Tokenizer) -> Document:
    row.refuse("tools")
    messages: list[Message] = []
    if row.fields.get("system"):
        messages.append({"role": "system", "content": row.text("system")})
    for i, turn in enumerate(row.checked(row.fields, "conversations", list)):
        inside = f"conversations[{i}]."
        speaker = row.checked(turn, "from", str, inside)
        if speaker not in _SHAREGPT_ROLES:
            raise row.error(
                f"{inside}from is unknown",
                expected="one of " + ", ".join(_SHAREGPT_ROLES),
                found=repr(speaker),
            )
        value = row.checked(turn, "value", str, inside)
        messages.append({"role": _SHAREGPT_ROLES[speaker], "content": value})
    return _conversation(row, messages, tokenizer)


def _from_messages(row: Row, tokenizer: Tokenizer) -> Document:
    row.refuse("tools", "functions")
    messages = row.checked(row.fields, "messages", list)
    for i, message in enumerate(messages):
        row.checked(message, "role", str, f"messages[{i}].")
        row.checked(message, "content", str, f"messages[{i}].")
    return _conversation(row, messages, tokenizer)


def _conversation(row: Row, messages: list[Message], tokenizer: Tokenizer) -> Document:
    if not messages:
        raise row.error("the conversation is empty")
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise row.error("no answer token: no message is the assistant's")
    if not all(answer["content"] for answer in answers):
        raise row.error("no answer token: an assistant's message is empty")
    return tokenize_conversation(messages, tokenizer, where=row.where)


def _from_text(row: Row, tokenizer: Tokenizer) -> Document:
    text = row.text("text")
    if not text:
        raise row.error("'text' is empty")
    tokens = np.array([*tokenizer.encode(text), tokenizer.eos_id], dtype=np.int32)
    return Document(tokens, np.ones(len(tokens), dtype=np.bool_))


@dataclass(frozen=True)
class RowFormat:
    """How a format is recognised (the keys it must have) and read."""

    keys: tuple[str, ...]
    read: Callable[[Row, Tokenizer], Document]


FORMATS = {
    "prompt": RowFormat(("prompt", "completion"), _from_prompt),
    "alpaca": RowFormat(("instruction", "output"), _from_alpaca),
    "sharegpt": RowFormat(("conversations",), _from_sharegpt),
    "messages": RowFormat(("messages",), _from_messages),
    "text": RowFormat(("text",), _from_text),
}


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
        DataError: the row does not fit the format, or nothing in it could be learnt.
    """
    document = FORMATS[row_format].read(row, tokenizer)
    if not document.loss_mask[1:].any():
        raise row.error("no answer token after the first token")
    return document
