"""A row: one JSON object, and which of its fields say something that would be lost.

Whatever a row says either changes what is trained, or is known to describe the row, or was left out
by name (``--ignore-fields``). Anything else is refused: a ``context`` that no format carries would
be lost without a word.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_replay.errors import DataError

#: Fields that say where a row comes from, not what it says; in any case of letters.
METADATA = frozenset(
    "__index_level_0__ _id author category conversation_id created_at dataset dataset_name date"
    " difficulty domain hash id idx index lang language level license meta metadata model"
    " num_tokens num_turns prompt_id quality question_id row_id score sha256 source sources split"
    " subset tags task_id task_name task_type timestamp topic type uid url uuid version".split()
)
#: Keys of a message that say whether an answer carries loss: OpenAI's, axolotl's, ms-swift's.
LOSS_KEYS = ("weight", "train", "loss")


def is_empty(value: Any) -> bool:
    """Whether ``value`` says nothing: null, "", [], {}, these as a string, or a list of such."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, list):
        return all(map(is_empty, value))
    if isinstance(value, dict):
        return all(map(is_empty, value.values()))
    return value is None


@dataclass(frozen=True)
class Row:
    """One line of a file, parsed, with ``FILE:LINE`` for the messages about it.

    Attributes:
        ignored: names of fields that were left out, and that are left out of messages.
    """

    where: str
    fields: dict[str, Any]
    ignored: frozenset[str] = frozenset()

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
            raise self.error(f"{inside.rstrip('.')} is not an object", found=json_type(fields))
        if name not in fields:
            keys = ", ".join(map(repr, fields)) or "no keys"
            raise self.error("missing key", expected=repr(at), found=keys)
        value = fields[name]
        if not isinstance(value, kind):
            raise self.error(
                f"{at!r} has the wrong type", expected=_TYPES[kind], found=json_type(value)
            )
        if kind is str and not value.isascii():
            self._require_unicode(at, value)
        return value

    def text_or_empty(self, name: str) -> str:
        """The string under ``name``; "" where there is none, or null."""
        return "" if self.fields.get(name) is None else self.text(name)

    def refuse_unread(self, row_format: str, read: Sequence[str]) -> None:
        """Raise if the row says what its format does not carry: fields beside ``read``."""
        names = [
            name
            for name, value in self.fields.items()
            if name not in read and name.lower() not in METADATA and not is_empty(value)
        ]
        if names:
            raise self.error(
                f"{', '.join(map(repr, names))} would be lost: {row_format} rows do not carry "
                f"{'it' if len(names) == 1 else 'them'}",
                fix="Fold it into the text that is trained, or leave it out on purpose with "
                f"--ignore-fields {','.join(names)}",
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


def json_type(value: Any) -> str:
    """What ``value`` is, for an error."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return _TYPES.get(type(value), "a number")
