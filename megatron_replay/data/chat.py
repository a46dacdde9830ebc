"""A conversation to tokens and loss mask, by the text the chat template adds at each answer.

With R(t, g) the template's text of turns t, with (g = 1) or without (g = 0) the header that prompts
for an answer, answer i is what R(turns[:i+1], 0) adds to R(turns[:i], 1). That is right only if
each of these is a prefix of the whole rendering, which is checked. The end-of-turn token carries
loss; the separator after it does not.

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

from megatron_replay.data.corpus import Document
from megatron_replay.data.rows import Row, is_empty
from megatron_replay.data.tokenizer import TextError, Tokenizer
from megatron_replay.errors import DataError

#: Around the number of a word: a character for private use; tojson escapes it.
_MARK = "\ue0f8"
_MARKED = re.compile(rf"(?:{_MARK}|\\ue0f8)(\d+)(?:{_MARK}|\\ue0f8)")
#: Keys inside a tool call that may be lost: few templates write them.
_CALL_METADATA = ("id", "index", "type")


@dataclass(frozen=True)
class Turn:
    """A message of a conversation.

    Attributes:
        name: how errors refer to it ("message 2").
        message: the chat template's input: role, content, and the row's other keys.
        has_loss: its tokens carry loss as labels.
    """

    name: str
    message: dict[str, Any]
    has_loss: bool


def tokenize_conversation(
    row: Row, turns: Sequence[Turn], tokenizer: Tokenizer, **variables: Any
) -> Document:
    """Render the ``turns`` of ``row``; the tokens of those with loss carry it.

    Args:
        variables: others that the template may read.

    Raises:
        DataError: the template does not write all of the conversation, or is not prefix-stable on
            it.
        TextError: the template fails on the conversation.
    """
    rendering = _Rendering(row, turns, tokenizer, variables)
    document = rendering.tokenize()
    rendering.require_contents_written()
    rendering.require_fields_written()
    return document


class _Rendering:
    """The text a template writes for a conversation, whole and up to each answer."""

    def __init__(
        self, row: Row, turns: Sequence[Turn], tokenizer: Tokenizer, variables: dict[str, Any]
    ) -> None:
        self._row, self._turns, self._tokenizer = row, turns, tokenizer
        self._variables = variables
        self._messages = [turn.message for turn in turns]
        self._answers = [i for i, turn in enumerate(turns) if turn.has_loss]
        self._text = self._render(self._messages, False)

    def _render(self, messages: Sequence[dict[str, Any]], header: bool) -> str:
        return self._tokenizer.render_chat(messages, header, **self._variables)

    def tokenize(self) -> Document:
        encode = self._tokenizer.encode
        ids = encode(self._text)
        loss_mask = np.zeros(len(ids), dtype=np.bool_)
        for i in self._answers:
            start_ids = encode(self._until(i, header=True))
            # The last answer ends where the conversation does.
            stop_ids = ids if i + 1 == len(self._turns) else encode(self._until(i + 1))
            start = len(start_ids)
            if ids[:start] != start_ids or ids[: len(stop_ids)] != stop_ids:
                return self._tokenize_apart()
            loss_mask[start : start + self._answer_tokens(stop_ids[start:])] = True
        return Document(np.array(ids, dtype=np.int32), loss_mask)

    def _tokenize_apart(self) -> Document:
        """Encode each answer apart from what is around it, as a model meets it when it generates.

        Needed where the text is stable, and a token reaches across the border of an answer: a
        header that ends in a newline before an answer that begins with one.
        """
        ids, loss_mask = list[int](), list[bool]()
        for text, has_loss in self._pieces():
            piece_ids = self._tokenizer.encode(text)
            num_loss = self._answer_tokens(piece_ids) if has_loss else 0
            ids += piece_ids
            loss_mask += [True] * num_loss + [False] * (len(piece_ids) - num_loss)
        whole = self._tokenizer.encode(self._text)
        found, expected = self._tokenizer.decode(ids), self._tokenizer.decode(whole)
        if found != expected:  # sentencepiece writes a blank before each text
            at = _num_shared(found, expected)
            raise self._row.error(
                "a token reaches across the border between an answer and what is around it, and "
                "this tokenizer writes other text when the answer is encoded apart",
                expected=repr(expected[at : at + 20]),
                found=repr(found[at : at + 20]),
                fix="Remove the white space at the answer's border, or give prompt/completion rows",
            )
        return Document(np.array(ids, dtype=np.int32), np.array(loss_mask, dtype=np.bool_))

    def _pieces(self) -> list[tuple[str, bool]]:
        """The rendering cut at each answer's borders: (text, carries loss).

        Raises:
            DataError: the template does not write an answer behind the header that prompts for it.
        """
        pieces, done = [], 0
        for i in self._answers:
            start, stop = self._until(i, header=True), self._until(i + 1)
            if not self._text.startswith(stop) or not stop.startswith(start):
                raise self._unstable(i, start, stop)
            pieces += [(self._text[done : len(start)], False), (stop[len(start) :], True)]
            done = len(stop)
        return [*pieces, (self._text[done:], False)]

    def _unstable(self, i: int, start: str, stop: str) -> DataError:
        """Why ``start``, ``stop`` and the whole text are not each a prefix of the next."""
        name = self._turns[i].name
        if not self._text.startswith(stop):
            return self._row.error(
                f"the chat template writes {name} differently once more messages follow, so its "
                "tokens cannot be separated from the rest",
                fix="Give each answer its own row, with the conversation up to it, or mark all "
                'answers but the last with "weight": 0; or use a template under which a '
                "conversation's beginning stays as it was",
            )
        if not stop.startswith(self._until(i)):
            return self._row.error(
                f"the chat template writes what is before {name} differently once it follows",
                fix="Use a template under which a conversation's beginning stays as it was",
            )
        at = _num_shared(start, stop)
        return self._row.error(
            f"the chat template prompts for {name} with a header that it does not write before the "
            "answer, so the model would be trained on another text than it generates from",
            expected=repr(start[at:][:60]),
            found=repr(stop[at:][:60]),
            fix="Write that text at the start of each answer; or use a chat template with the same "
            "header in both places",
        )

    def require_contents_written(self) -> None:
        """Raise DataError if a part of a message's content changes nothing in the rendering.

        One rendering with a mark behind each word shows which are written. Where marks are missing,
        the template may only have taken another branch for them: the text before each is changed by
        itself.
        """
        number = itertools.count()
        marked, ends = [], []
        for message in self._messages:
            content, pieces, done = message["content"], [], 0
            ends.append([(next(number), end) for end in _word_ends(content)])
            for n, end in ends[-1]:
                pieces += [content[done:end], f"{_MARK}{n}{_MARK}"]
                done = end
            marked.append({**message, "content": "".join([*pieces, content[done:]])})
        try:
            text = self._render(marked, False)
        except TextError:
            text = ""
        found = {int(n) for n in _MARKED.findall(text)}
        for i, words in enumerate(ends):
            content, start = self._messages[i]["content"], 0
            for at, (n, end) in enumerate(words):
                if n not in found:
                    if at + 1 < len(words) and n + 1 not in found:
                        continue  # the next word is missing as well: try both as one
                    changed = f"{content[:end]}x{content[end:]}"
                    if self._is_same_with(i, {**self._messages[i], "content": changed}):
                        raise self._lost_content(i, content[start:end].strip())
                start = end

    def _lost_content(self, i: int, lost: str) -> DataError:
        turn = self._turns[i]
        is_all = lost == turn.message["content"].strip()
        return self._row.error(
            f"{'' if is_all else 'part of '}the content of {turn.name} (role "
            f"{turn.message['role']!r}) would be lost: the chat template does not write it",
            found=None if is_all else repr(lost[:60]),
            fix=f"{'Put it into another message' if is_all else 'Remove it from the row'}, or use "
            "a template that writes it",
        )

    def require_fields_written(self) -> None:
        """Raise DataError if a key of a message, or a value inside one, changes nothing."""
        reason = "would be lost: the chat template writes the same without it"
        for i, turn in enumerate(self._turns):
            for key, value in turn.message.items():
                if key in ("role", "content"):
                    continue
                others = {name: field for name, field in turn.message.items() if name != key}
                if self._is_same_with(i, others):
                    raise self._row.error(
                        f"{key!r} of {turn.name} {reason}",
                        fix="Put it into the content, or drop it: tools/preprocess_data.py "
                        f"--ignore-fields {key}",
                    )
                for path, without in _without_each_leaf(value):
                    if self._is_same_with(i, {**turn.message, key: without}):
                        raise self._row.error(
                            f"{key}{path} of {turn.name} {reason}",
                            fix="Remove it from the row, or use a template that writes it",
                        )

    def _is_same_with(self, i: int, message: dict[str, Any]) -> bool:
        """Whether the rendering stays as it is with ``message`` in place of message ``i``."""
        messages = [*self._messages[:i], message, *self._messages[i + 1 :]]
        try:
            return self._render(messages, False) == self._text
        except TextError:
            return False

    def _until(self, stop: int, *, header: bool = False) -> str:
        """The rendering of the turns before ``stop``, with an answer's header if requested."""
        if not stop:
            raise self._row.error(
                "the conversation starts with an answer", expected="a user or system message first"
            )
        if stop == len(self._turns) and not header:
            return self._text
        return self._render(self._messages[:stop], header)

    def _answer_tokens(self, ids: Sequence[int]) -> int:
        """How many of ``ids``, which start with an answer, are its own: up to a special token.

        ChatML writes a newline after its end-of-turn token. Generation has stopped by then, so the
        newline is the template's, not the model's. Where a template ends turns without a special
        token, all it wrote is the answer's.
        """
        stop = len(ids)
        while stop and ids[stop - 1] not in self._tokenizer.special_ids:
            stop -= 1
        is_separator = not self._tokenizer.decode(ids[stop:]).strip()
        return stop if stop and is_separator else len(ids)


def _word_ends(content: str) -> list[int]:
    """Where words end; without a tag at the very end, which a template may search for."""
    ends = [match.end() for match in re.finditer(r"\S+", content)]
    return ends[:-1] if len(ends) > 1 and content.rstrip().endswith(">") else ends


def _without_each_leaf(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """``(path, value)`` with one of its leaves that have content removed, each in turn."""
    if not isinstance(value, dict | list):
        return
    is_dict = isinstance(value, dict)
    for key in list(value) if is_dict else range(len(value)):
        inner, at = value[key], f"{path}[{key!r}]"
        if is_empty(inner) or (is_dict and key in _CALL_METADATA):
            continue
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
