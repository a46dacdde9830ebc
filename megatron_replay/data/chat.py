"""A conversation to tokens and loss mask, by what the chat template adds at each answer.

``return_assistant_tokens_mask`` of transformers is not used: it is silently all zero when a
template lacks ``{% generation %}``, and most templates do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_replay.data.document import Document
from megatron_replay.data.tokenizer import Message, Tokenizer
from megatron_replay.errors import DataError


def tokenize_conversation(
    messages: Sequence[Message], tokenizer: Tokenizer, *, where: str
) -> Document:
    """Render ``messages`` and let the assistant's tokens carry loss.

    With R(m, g) the template's ids of messages m, with (g = 1) or without (g = 0) the header that
    asks for an answer, the answer ``messages[i]`` is what R(messages[:i+1], 0) adds to
    R(messages[:i], 1). That is right only if each of these is a prefix of the whole rendering,
    which is checked. The end-of-turn token carries loss; the separator after it does not.

    Raises:
        DataError: the template refuses the conversation, or is not prefix-stable on it.
    """
    rendered = _render(messages, tokenizer, add_generation_prompt=False, where=where)
    loss_mask = np.zeros(len(rendered), dtype=np.bool_)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:i], tokenizer, add_generation_prompt=True, where=where)
        after = _render(messages[: i + 1], tokenizer, add_generation_prompt=False, where=where)
        if rendered[: len(before)] != before or rendered[: len(after)] != after:
            raise DataError(
                f"the chat template writes message {i} differently once more messages follow, "
                "so its tokens cannot be told from the rest",
                where=where,
                fix="Give each answer its own row, with the conversation up to it; or use a "
                "template under which a conversation's beginning stays as it was",
            )
        loss_mask[len(before) : _answer_stop(after, len(before), tokenizer)] = True
    return Document(np.array(rendered, dtype=np.int32), loss_mask)


def _render(
    messages: Sequence[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool, where: str
) -> list[int]:
    if not messages:
        raise DataError(
            "the conversation starts with an answer",
            where=where,
            expected="a user or system message first",
        )
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt)
    except DataError as error:
        raise DataError(str(error), where=where) from error


def _answer_stop(rendered: list[int], start: int, tokenizer: Tokenizer) -> int:
    """Where the answer that starts at ``start`` ends: after its last special token.

    ChatML writes a newline after its end-of-turn token. Generation has stopped by then, so the
    newline is the template's, not the model's. A template whose turns end without a special token
    keeps all it wrote.
    """
    stop = len(rendered)
    while stop > start and rendered[stop - 1] not in tokenizer.special_ids:
        stop -= 1
    separator = tokenizer.decode(rendered[stop:])
    return stop if stop > start and not separator.strip() else len(rendered)
