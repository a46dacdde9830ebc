"""A conversation to tokens and loss mask, by what the chat template adds at each answer.

``return_assistant_tokens_mask`` of transformers is not used: it is silently all zero when a
template lacks ``{% generation %}``, and most templates do.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_replay.data.document import Document
from megatron_replay.data.row import is_empty
from megatron_replay.data.tokenizer import Tokenizer
from megatron_replay.errors import DataError

#: Around the number of a word: of Unicode's private use; tojson escapes it.
_MARK = "\ue0f8"
_MARKED = re.compile(rf"(?:{_MARK}|\\ue0f8)(\d+)(?:{_MARK}|\\ue0f8)")
#: Of a call, which few templates write.
_METADATA = ("id", "index", "type")
#: In place of a field that is taken away.
_GONE = object()


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
        document = self._tokenize()
        self._require_contents_written()
        self._require_fields_written()
        return document

    def _tokenize(self) -> Document:
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

    def _require_contents_written(self) -> None:
        """Raise DataError if a part of a message's content changes nothing in the rendering.

        One rendering with a mark behind each word tells which are written. Where marks are missing,
        the template may only have gone another way for them: what precedes is changed by itself.
        """
        number = itertools.count()
        marked, ends = [], []
        for turn in self._turns:
            content, pieces, done = turn.message["content"], [], 0
            ends.append([(next(number), end) for end in _word_ends(content)])
            for n, end in ends[-1]:
                pieces += [content[done:end], f"{_MARK}{n}{_MARK}"]
                done = end
            marked.append({**turn.message, "content": "".join([*pieces, content[done:]])})
        try:
            found = {int(n) for n in _MARKED.findall(self._render(marked))}
        except DataError:
            found = set()
        for i, words in enumerate(ends):
            content, start = self._turns[i].message["content"], 0
            last = words[-1][0] if words else None
            for n, end in words:
                if n not in found and n != last and n + 1 not in found:
                    continue  # more is missing behind it
                other = f"{content[:end]}x{content[end:]}"
                if n not in found and self._is_same_with(i, {"content": other}):
                    raise self._content_error(i, content[start:end])
                start = end

    def _content_error(self, i: int, lost: str) -> DataError:
        turn, lost = self._turns[i], lost.strip()
        is_all = lost == turn.message["content"].strip()
        return self._error(
            f"{'' if is_all else 'part of '}the content of {turn.name} (role "
            f"{turn.message['role']!r}) would be lost: the chat template does not write it",
            found=None if is_all else repr(lost[:60]),
            fix="Fold it into another message, or use a template that writes it"
            if is_all
            else "Remove it from the row, or use a template that writes it",
        )

    def _require_fields_written(self) -> None:
        """Raise DataError if a field of a message, or a part of one, changes nothing.

        Inside a field, ``_METADATA`` may be left out.
        """
        for i, turn in enumerate(self._turns):
            for key in [key for key in turn.message if key not in ("role", "content")]:
                if self._is_same_with(i, {key: _GONE}):
                    raise self._error(
                        f"{key!r} of {turn.name} would be lost: the chat template writes the same "
                        "without it",
                        fix="Fold it into the content, or leave it out on purpose with "
                        f"--ignore-fields {key}",
                    )
                for path, without in _without_each_leaf(turn.message[key]):
                    if self._is_same_with(i, {key: without}):
                        raise self._error(
                            f"{key}{path} of {turn.name} would be lost: the chat template writes "
                            "the same without it",
                            fix="Remove it from the row, or use a template that writes it",
                        )

    def _is_same_with(self, i: int, changes: dict[str, Any]) -> bool:
        """Whether the rendering stays as it is with ``changes`` in message ``i``."""
        messages = [turn.message for turn in self._turns]
        changed = {**messages[i], **changes}
        messages[i] = {key: value for key, value in changed.items() if value is not _GONE}
        try:
            return self._render(messages) == self._text
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


def _word_ends(content: str) -> list[int]:
    """Where the words of ``content`` end; not that of a last tag, which a template may look for."""
    ends = [match.end() for match in re.finditer(r"\S+", content)]
    return ends[:-1] if len(ends) > 1 and content.rstrip().endswith(">") else ends


def _without_each_leaf(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """``(path, value)`` less one of its leaves that say something, each in turn."""
    is_dict = isinstance(value, dict)
    if not is_dict and not isinstance(value, list):
        return
    for key in list(value) if is_dict else range(len(value)):
        inner = value[key]
        if is_empty(inner) or (is_dict and key in _METADATA):
            continue
        at = f"{path}[{key!r}]"
        if isinstance(inner, dict | list):
            for below, changed in _without_each_leaf(inner, at):
                copy = value.copy()
                copy[key] = changed
                yield below, copy
        else:
            copy = value.copy()
            del copy[key]
            yield at, copy


def _num_shared(a: str, b: str) -> int:
    """How many characters ``a`` and ``b`` have in common at their start."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
