"""Rows to documents: five formats, each one function from a row to tokens and loss mask.

=============  ==================================================  =============================
format         row                                                 what carries loss
=============  ==================================================  =============================
``prompt``     ``{"prompt": "…", "completion": "…"}``              completion and EOS
``alpaca``     ``{"instruction": "…", "input": "…", "output": …}`` output and EOS
``sharegpt``   ``{"conversations": [{"from": …, "value": …}, …]}`` the assistant's turns
``messages``   ``{"messages": [{"role": …, "content": …}, …]}``    the assistant's turns
``text``       ``{"text": "…"}``                                   every token and EOS
=============  ==================================================  =============================

Prompt and completion are plain text or a conversation (``prompts.py``). The two chat formats use
the tokenizer's chat template (``chat.py``) and take a ``system`` or ``system_prompt`` beside the
messages; alpaca rows are plain text in the prompt they were published with.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from megatron_replay.data.chat import Turn, tokenize_conversation
from megatron_replay.data.corpus import Document
from megatron_replay.data.prompts import PromptStyle
from megatron_replay.data.rows import Row, is_empty
from megatron_replay.data.tokenizer import TextError, Tokenizer
from megatron_replay.errors import ConfigError

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
#: Keys of a message that set whether an answer carries loss: OpenAI's, axolotl's, ms-swift's.
_LOSS_KEYS = ("weight", "train", "loss")
#: Prompts as plain text, without BOS.
PLAIN = PromptStyle()
_SYSTEM_KEYS = ("system", "system_prompt")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


class RowFormat(NamedTuple):
    """How a format is recognised (the keys it must have) and read (with what else it carries)."""

    keys: tuple[str, ...]
    read: Callable[[Row, Tokenizer, PromptStyle], Document]
    also: tuple[str, ...] = ()


def detect_format(row: Row) -> str:
    """The one format whose keys the row has.

    Raises:
        DataError: no format fits, or more than one.
    """
    fitting = [name for name, form in FORMATS.items() if row.fields.keys() >= set(form.keys)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise row.error(f"fits the formats {' and '.join(fitting)}", fix="Choose with --format")
    known = ", ".join(f"{name} ({'+'.join(form.keys)})" for name, form in FORMATS.items())
    keys = ", ".join(map(repr, row.fields)) or "no keys"
    raise row.error("no known format", expected=f"the keys of one of {known}", found=keys)


def tokenize_row(
    row: Row, row_format: str, tokenizer: Tokenizer, style: PromptStyle = PLAIN
) -> Document:
    """One row to one document of at least two tokens, at least one of them with loss.

    Args:
        row_format: a key of ``FORMATS``.
        style: of prompts and plain text; conversations are always in the chat template.

    Raises:
        ConfigError: the row is a conversation, and ``style`` refuses the template.
        DataError: the row does not fit the format, has content that would be lost, or has nothing
            to learn.
    """
    form = FORMATS[row_format]
    if row.fields.keys() >= set(form.keys):
        row.refuse_unread(row_format, (*form.keys, *form.also))
    try:
        document = form.read(row, tokenizer, style)
    except TextError as error:
        raise row.error(str(error)) from error
    if not document.loss_mask[1:].any():
        raise row.error("no answer token after the first token")
    return document


def _from_prompt(row: Row, tokenizer: Tokenizer, style: PromptStyle) -> Document:
    prompt, completion = row.text("prompt"), _answer(row, "completion")
    if not prompt:
        raise row.error("'prompt' is empty", fix='Write raw text as {"text": …} rows')
    return style.document(row, prompt, completion, tokenizer)


def _from_alpaca(row: Row, tokenizer: Tokenizer, style: PromptStyle) -> Document:
    instruction = row.text("instruction")
    context = "" if row.fields.get("input") is None else row.text("input")
    if not instruction:
        raise row.error("'instruction' is empty")
    template = _ALPACA_WITH_INPUT if context else _ALPACA
    prompt = template.format(instruction=instruction, input=context)
    return style.plain_document(prompt, _answer(row, "output"), tokenizer)


def _from_text(row: Row, tokenizer: Tokenizer, style: PromptStyle) -> Document:
    text = row.text("text")
    if not text:
        raise row.error("'text' is empty")
    return style.plain_document("", text, tokenizer)


def _answer(row: Row, name: str) -> str:
    answer = row.text(name)
    if not answer.strip():
        raise row.error(f"no answer token: {name!r} is {'blank' if answer else 'empty'}")
    return answer


def _from_conversation(
    row: Row,
    tokenizer: Tokenizer,
    style: PromptStyle,
    *,
    name: str,
    role_key: str,
    content_key: str,
) -> Document:
    """The document of the messages under ``name``, whose role and content have these keys."""
    if style.chat_template is False and tokenizer.chat_template is not None:
        raise ConfigError(
            f"{name!r} rows are conversations, which only a chat template writes",
            where="--no-chat-template",
            fix="Leave the flag out",
        )
    turns = [
        _turn(row, message, f"{name}[{i}].", f"message {i}", role_key, content_key)
        for i, message in enumerate(row.checked(row.fields, name, list))
    ]
    if not turns:
        raise row.error("the conversation is empty")
    answers = [turn for turn in turns if turn.message["role"] == "assistant"]
    if not answers:
        raise row.error("no answer token: no message is the assistant's")
    for answer in answers:
        content = answer.message["content"]
        if not content.strip() and not _calls_tool(answer.message):
            raise row.error(
                f"no answer token: an assistant's message is {'blank' if content else 'empty'}",
                found=answer.name,
            )
    if not any(answer.has_loss for answer in answers):
        raise row.error("no answer token: every answer is marked to carry no loss")
    return tokenize_conversation(row, style.with_system(_with_system(row, turns)), tokenizer)


FORMATS = {
    "prompt": RowFormat(("prompt", "completion"), _from_prompt),
    "alpaca": RowFormat(("instruction", "output"), _from_alpaca, ("input",)),
    "sharegpt": RowFormat(
        ("conversations",),
        partial(_from_conversation, name="conversations", role_key="from", content_key="value"),
        _SYSTEM_KEYS,
    ),
    "messages": RowFormat(
        ("messages",),
        partial(_from_conversation, name="messages", role_key="role", content_key="content"),
        _SYSTEM_KEYS,
    ),
    "text": RowFormat(("text",), _from_text),
}


def _turn(row: Row, message: Any, inside: str, name: str, role_key: str, content_key: str) -> Turn:
    """The turn of one message; ``inside`` is its path in the row, ``name`` for errors."""
    role = row.checked(message, role_key, str, inside)
    if role_key == "from":
        if role not in _SHAREGPT_ROLES:
            raise row.error(
                f"{inside}from is unknown",
                expected="one of " + ", ".join(_SHAREGPT_ROLES),
                found=repr(role),
            )
        role = _SHAREGPT_ROLES[role]
    read = {role_key, content_key, *_LOSS_KEYS, *row.ignored}
    others = {key: v for key, v in message.items() if key not in read and not is_empty(v)}
    for key in ("role", "content"):
        if key in others:  # in a sharegpt turn, which has them under its own keys
            raise row.error(f"{key!r} of {name} would be lost beside {role_key!r}, {content_key!r}")
    has_no_text = message.get(content_key) is None and _calls_tool(others)
    content = "" if has_no_text else row.checked(message, content_key, str, inside)
    fields = {"role": role, "content": content, **others}
    return Turn(name, fields, _has_loss(row, message, role, inside))


def _calls_tool(message: dict[str, Any]) -> bool:
    """Whether a message calls a tool: such an answer may have no text."""
    return "tool_calls" in message or "function_call" in message


def _has_loss(row: Row, message: dict[str, Any], role: str, inside: str) -> bool:
    """Whether a message carries loss: the assistant's do, unless a loss key is 0 or false."""
    marks = {
        key: message[key]
        for key in _LOSS_KEYS
        if key not in row.ignored and message.get(key) is not None
    }
    for key, value in marks.items():
        if type(value) not in (bool, int, float) or value not in (0, 1):
            raise row.error(
                f"{inside}{key} has no meaning here",
                expected="0 or false (no loss), 1 or true",
                found=json.dumps(value)[:60],
            )
        if value and role != "assistant":
            raise row.error(
                f"{inside}{key} requires loss on a message that is not the assistant's",
                expected=f"0, false, or no {key!r}",
                found=json.dumps(value),
            )
    if len(set(map(bool, marks.values()))) > 1:
        raise row.error(f"{inside.rstrip('.')} contradicts itself", found=json.dumps(marks))
    return role == "assistant" and all(marks.values())


def _with_system(row: Row, turns: list[Turn]) -> list[Turn]:
    """The conversation with the row's ``system`` or ``system_prompt`` as its first message."""
    for name in _SYSTEM_KEYS:
        value = row.fields.get(name)
        if value == "" or (not isinstance(value, str) and is_empty(value)):
            continue
        text = row.text(name)
        others = [turn for turn in turns if turn.message["role"] == "system"]
        for turn in others:
            if turn.message["content"] != text:
                raise row.error(
                    f"{name!r} and {turn.name} are two different system messages",
                    fix="Keep one of them",
                )
        if not others:
            system = Turn(f"the row's {name!r}", {"role": "system", "content": text}, False)
            turns = [system, *turns]
    return turns
