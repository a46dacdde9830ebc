"""A conversation to tokens and loss mask, by what the chat template adds at each answer.

``return_assistant_tokens_mask`` of transformers is not used: it is silently all zero when a
template lacks ``{% generation %}``, and most templates do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_replay.data.document import Document
from megatron_replay.data.tokenizer import Tokenizer
from megatron_replay.errors import DataError


@dataclass(frozen=True)
class Turn:
    """A message of a conversation.

    Attributes:
        name: what the row calls it ("message 2"), for errors.
        message: what the chat template gets: role, content, and what else the row holds.
        has_loss: its tokens carry loss as labels.
    """

    name: str
    message: dict[str, Any]
    has_loss: bool


def tokenize_conversation(turns: Sequence[Turn], tokenizer: Tokenizer, *, where: str) -> Document:
    """Render ``turns`` and let the tokens of those with loss carry it.

    With R(t, g) the template's text of turns t, with (g = 1) or without (g = 0) the header that
    asks for an answer, answer i is what R(turns[:i+1], 0) adds to R(turns[:i], 1). That is right
    only if each of these is a prefix of the whole rendering, which is checked. The end-of-turn
    token carries loss; the separator after it does not.

    Raises:
        DataError: the template fails on the conversation, does not write all of it, or is not
            prefix-stable on it.
    """
    return _Rendering(turns, tokenizer, where).tokenize()


class _Rendering:
    """A conversation as its template writes it, whole and up to each answer."""

    def __init__(self, turns: Sequence[Turn], tokenizer: Tokenizer, where: str) -> None:
        self._turns, self._tokenizer, self._where = turns, tokenizer, where
        self._text = self._render([turn.message for turn in turns])

    def tokenize(self) -> Document:
        self._require_all_written()
        ids = self._encode(self._text)
        loss_mask = np.zeros(len(ids), dtype=np.bool_)
        answers = [i for i, turn in enumerate(self._turns) if turn.has_loss]
        for i in answers:
            start_ids = self._encode(self._until(i, header=True))
            # The last answer ends where the conversation does.
            is_last = i + 1 == len(self._turns)
            stop_ids = ids if is_last else self._encode(self._until(i + 1))
            start = len(start_ids)
            if ids[:start] != start_ids or ids[: len(stop_ids)] != stop_ids:
                return self._tokenize_apart(answers)
            loss_mask[start : start + self._answer_tokens(stop_ids[start:])] = True
        return Document(np.array(ids, dtype=np.int32), loss_mask)

    def _tokenize_apart(self, answers: Sequence[int]) -> Document:
        """Encode each answer apart from what is around it, as a model meets it when it generates.

        Needed where the text is stable, and a token reaches across the border of an answer: a
        header that ends in a newline before an answer that begins with one.
        """
        pieces, ids, loss_mask = self._pieces(answers), list[int](), list[bool]()
        for text, has_loss in pieces:
            piece_ids = self._encode(text)
            num_loss = self._answer_tokens(piece_ids) if has_loss else 0
            ids += piece_ids
            loss_mask += [True] * num_loss + [False] * (len(piece_ids) - num_loss)
        found, expected = (self._tokenizer.decode(i) for i in (ids, self._encode(self._text)))
        if found != expected:  # sentencepiece writes a blank before each text
            at = _num_shared(found, expected)
            raise self._error(
                "a token reaches across the border between an answer and what is around it, and "
                "this tokenizer writes other text when the answer is encoded apart",
                expected=repr(expected[at : at + 20]),
                found=repr(found[at : at + 20]),
                fix="Remove the white space at the answer's border, or give prompt/completion rows",
            )
        return Document(np.array(ids, dtype=np.int32), np.array(loss_mask, dtype=np.bool_))

    def _pieces(self, answers: Sequence[int]) -> list[tuple[str, bool]]:
        """The rendering cut at each answer's borders: (text, carries loss).

        Raises:
            DataError: the template does not write an answer behind the header that asks for it.
        """
        pieces, done = [], 0
        for i in answers:
            name = self._turns[i].name
            start, stop = self._until(i, header=True), self._until(i + 1)
            if not self._text.startswith(stop):
                raise self._error(
                    f"the chat template writes {name} differently once more messages follow, so "
                    "its tokens cannot be told from the rest",
                    fix="Give each answer its own row, with the conversation up to it, or mark "
                    'all answers but the last with "weight": 0; or use a template under which '
                    "a conversation's beginning stays as it was",
                )
            if not stop.startswith(start):
                raise self._header_error(i, start, stop)
            pieces += [(self._text[done : len(start)], False), (stop[len(start) :], True)]
            done = len(stop)
        return [*pieces, (self._text[done:], False)]

    def _header_error(self, i: int, start: str, stop: str) -> DataError:
        """Why ``start``, which asks for answer ``i``, is no prefix of ``stop``, which has it."""
        name = self._turns[i].name
        if not stop.startswith(self._until(i)):
            return self._error(
                f"the chat template writes what is before {name} differently once it follows",
                fix="Use a template under which a conversation's beginning stays as it was",
            )
        at = _num_shared(start, stop)
        return self._error(
            f"the chat template asks for {name} with a header that it does not write before the "
            "answer, so the model would be trained on another text than it generates from",
            expected=repr(start[at:][:60]),
            found=repr(stop[at:][:60]),
            fix="Write that text at the start of each answer; or use a chat template that writes "
            "the same before an answer as it asks with",
        )

    def _require_all_written(self) -> None:
        """Raise DataError if a message, or a field of one, changes nothing in the rendering."""
        messages, rest = [turn.message for turn in self._turns], self._text
        contents = (message["content"].strip() for message in messages)
        for content in sorted(contents, key=len, reverse=True):
            if content not in rest:  # the template changed it, or left it out
                self._require_contents_written(messages)
                break
            rest = rest.replace(content, "\0", 1)  # it stands for one message only
        for i, (turn, message) in enumerate(zip(self._turns, messages, strict=True)):
            for key in [key for key in message if key not in ("role", "content")]:
                without = {k: v for k, v in message.items() if k != key}
                if self._is_same_with(messages, i, without):
                    raise self._error(
                        f"{key!r} of {turn.name} would be lost: the chat template writes the same "
                        "without it",
                        fix="Fold it into the content, or leave it out on purpose with "
                        f"--ignore-fields {key}",
                    )

    def _require_contents_written(self, messages: list[dict[str, Any]]) -> None:
        for i, (turn, message) in enumerate(zip(self._turns, messages, strict=True)):
            other = {**message, "content": message["content"] + " x"}
            if message["content"].strip() and self._is_same_with(messages, i, other):
                raise self._error(
                    f"the content of {turn.name} (role {message['role']!r}) would be lost: the "
                    "chat template does not write it",
                    fix="Fold it into another message, or use a template that writes it",
                )

    def _is_same_with(
        self, messages: list[dict[str, Any]], i: int, message: dict[str, Any]
    ) -> bool:
        try:
            return self._render([*messages[:i], message, *messages[i + 1 :]]) == self._text
        except DataError:
            return False

    def _until(self, stop: int, *, header: bool = False) -> str:
        """The rendering of the turns before ``stop``, with the header that asks for an answer."""
        if not stop:
            raise self._error(
                "the conversation starts with an answer", expected="a user or system message first"
            )
        if stop == len(self._turns) and not header:
            return self._text
        return self._render([turn.message for turn in self._turns[:stop]], header=header)

    def _render(self, messages: Sequence[dict[str, Any]], *, header: bool = False) -> str:
        try:
            return self._tokenizer.render_chat(messages, header)
        except DataError as error:
            raise self._error(str(error)) from error

    def _encode(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text)
        except DataError as error:
            raise self._error(str(error)) from error

    def _answer_tokens(self, ids: Sequence[int]) -> int:
        """How many of ``ids``, which start with an answer, are its own: up to a special token.

        ChatML writes a newline after its end-of-turn token. Generation has stopped by then, so the
        newline is the template's, not the model's. A template whose turns end without a special
        token keeps all it wrote.
        """
        stop = len(ids)
        while stop and ids[stop - 1] not in self._tokenizer.special_ids:
            stop -= 1
        is_separator = not self._tokenizer.decode(ids[stop:]).strip()
        return stop if stop and is_separator else len(ids)

    def _error(self, what: str, **facts: Any) -> DataError:
        return DataError(what, where=self._where, **facts)


def _num_shared(a: str, b: str) -> int:
    """How many characters ``a`` and ``b`` have in common at their start."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
