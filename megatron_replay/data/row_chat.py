"""A row's messages to the turns of a conversation: what each key means, and which carry loss."""

from __future__ import annotations

import json
from typing import Any

from megatron_replay.data.chat import Turn, tokenize_conversation
from megatron_replay.data.document import Document
from megatron_replay.data.row import LOSS_KEYS, Row, is_empty
from megatron_replay.data.tokenizer import Tokenizer

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


def read_conversation(row: Row, name: str, keys: tuple[str, str], tokenizer: Tokenizer) -> Document:
    """The document of the conversation under ``name``.

    Args:
        keys: of a message's role and of its content.

    Raises:
        DataError: it is no conversation, has nothing to learn, or says what would be lost.
    """
    messages = row.checked(row.fields, name, list)
    turns = [
        _turn(row, message, f"{name}[{i}].", keys, f"message {i}")
        for i, message in enumerate(messages)
    ]
    if not turns:
        raise row.error("the conversation is empty")
    answers = [turn for turn in turns if turn.message["role"] == "assistant"]
    if not answers:
        raise row.error("no answer token: no message is the assistant's")
    for answer in answers:
        content = answer.message["content"]
        if not content.strip() and not _calls(answer.message):
            raise row.error(
                f"no answer token: an assistant's message is {'blank' if content else 'empty'}",
                found=answer.name,
            )
    if not any(answer.has_loss for answer in answers):
        raise row.error("no answer token: every answer is marked to carry no loss")
    return tokenize_conversation(_with_system(row, turns), tokenizer, where=row.where)


def _turn(row: Row, message: Any, inside: str, keys: tuple[str, str], name: str) -> Turn:
    """A message of a row, with what its keys mean; ``keys`` name its role and its content."""
    role_key, content_key = keys
    role = row.checked(message, role_key, str, inside)
    if role_key == "from":
        if role not in _SHAREGPT_ROLES:
            raise row.error(
                f"{inside}from is unknown",
                expected="one of " + ", ".join(_SHAREGPT_ROLES),
                found=repr(role),
            )
        role = _SHAREGPT_ROLES[role]
    others = {
        key: value
        for key, value in message.items()
        if key not in (*keys, *LOSS_KEYS, *row.ignored) and not is_empty(value)
    }
    for key in ("role", "content"):
        if key in others:  # a sharegpt turn: the template's message has these already
            raise row.error(f"{key!r} of {name} would be lost beside {role_key!r}, {content_key!r}")
    is_call = message.get(content_key) is None and _calls(others)
    content = "" if is_call else row.checked(message, content_key, str, inside)
    fields = {"role": role, "content": content, **others}
    return Turn(name, fields, _has_loss(row, message, role, inside))


def _calls(message: dict[str, Any]) -> bool:
    """Whether a message calls a tool: an answer without a text."""
    return "tool_calls" in message or "function_call" in message


def _has_loss(row: Row, message: dict[str, Any], role: str, inside: str) -> bool:
    """Whether a message carries loss: the assistant's do, unless they say otherwise."""
    marks = {
        key: message[key]
        for key in LOSS_KEYS
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
                f"{inside}{key} asks for loss on a message that is not the assistant's",
                expected=f"0, false, or no {key!r}",
                found=json.dumps(value),
            )
    if len(set(map(bool, marks.values()))) > 1:
        raise row.error(f"{inside.rstrip('.')} contradicts itself", found=json.dumps(marks))
    return role == "assistant" and all(marks.values())


def _with_system(row: Row, turns: list[Turn]) -> list[Turn]:
    """The conversation with the row's ``system`` or ``system_prompt`` as its first message."""
    for name in ("system", "system_prompt"):
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
            turns = [
                Turn(f"the row's {name!r}", {"role": "system", "content": text}, False),
                *turns,
            ]
    return turns
