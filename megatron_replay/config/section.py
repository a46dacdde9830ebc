"""A branch of the settings: fields that carry their help and choices, checked when it is built."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from megatron_replay.errors import ConfigError


def option(
    help_text: str,
    default: Any = dataclasses.MISSING,
    choices: tuple[str, ...] | None = None,
    only: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field with its help; without ``default`` the user must give it.

    ``only`` names the values of the branch's ``SWITCH`` under which the field means something;
    under another it must keep its default.
    """
    metadata = {"help": help_text, "choices": choices, "only": only}
    return dataclasses.field(default=default, metadata=metadata)


def flag_name(field_name: str) -> str:
    """``micro_batch_size`` -> ``--micro-batch-size``."""
    return "--" + field_name.replace("_", "-")


class Section:
    """Base of the tree's branches: checks ``choices`` and ``only``, and offers ``require``."""

    #: The field that decides which of the others mean something.
    SWITCH: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check every choice, then what the branch itself demands."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            choices, value = field.metadata.get("choices"), getattr(self, field.name)
            if choices is not None and value not in choices:
                self.require(False, field.name, "one of " + ", ".join(choices))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            only = field.metadata.get("only")
            if only is not None and getattr(self, self.SWITCH) not in only:
                unused = getattr(self, field.name) == field.default
                users = f"{flag_name(self.SWITCH)} {' or '.join(only)}"
                self.require(unused, field.name, f"{field.default}, as only {users} uses it")
        self._check()

    def _check(self) -> None:
        """Raise ConfigError where values cannot work; branches override it."""

    def require(self, condition: bool, field_name: str, expected: str) -> None:
        """Raise a ConfigError for ``field_name`` unless ``condition`` holds."""
        if not condition:
            raise ConfigError(
                "unusable value",
                where=flag_name(field_name),
                expected=expected,
                found=repr(getattr(self, field_name)),
            )

    def require_positive(self, *field_names: str) -> None:
        """Raise a ConfigError for the first named field that is not above zero."""
        for name in field_names:
            self.require(getattr(self, name) > 0, name, "a number above 0")
