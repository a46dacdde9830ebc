"""A branch of the settings: fields with their help and choices, checked when it is built."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_replay.errors import ConfigError

#: In ``used_with``: any value but None, False and 0.
SET: tuple[Any, ...] = ()
#: The largest integer that JSON, YAML and floats all represent.
_LARGEST = 2**53
#: float32 can represent it.
_LARGEST_FLOAT = 1e30


def option(
    help_text: str,
    default: Any = dataclasses.MISSING,
    choices: tuple[str, ...] | None = None,
    used_with: Mapping[str, tuple[Any, ...]] | None = None,
) -> Any:
    """A dataclass field with its help; without ``default`` the user must give it.

    ``used_with``: the field is read only where each of these other fields, of any branch, has one
    of these values (``SET``: any but None, False and 0); elsewhere it must keep its default.
    """
    metadata = {"help": help_text, "choices": choices, "used_with": used_with or {}}
    return dataclasses.field(default=default, metadata=metadata)


def flag_name(field_name: str) -> str:
    """``micro_batch_size`` -> ``--micro-batch-size``."""
    return "--" + field_name.replace("_", "-")


class Section:
    """Base of the tree's branches: checks every value; ``require`` raises the errors."""

    def __post_init__(self) -> None:
        """Check every value by its type, then run the branch's own checks."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            choices, value = field.metadata.get("choices"), getattr(self, field.name)
            if choices is not None and value not in choices:
                self.require(False, field.name, "one of " + ", ".join(choices))
            if isinstance(value, float):
                self.require(math.isfinite(value), field.name, "a finite number")
                self.require(abs(value) <= _LARGEST_FLOAT, field.name, "a number up to 1e30")
            elif isinstance(value, int):
                self.require(abs(value) < _LARGEST, field.name, "a number below 2^53")
            elif isinstance(value, str):  # an empty path would be the current directory
                self.require(
                    value != "" and "\0" not in value, field.name, "a text that is not empty"
                )
        require_used([self])
        self._check()

    def _check(self) -> None:
        """Raise ConfigError for values that cannot work; branches override it."""

    def require(self, condition: bool, field_name: str, expected: str) -> None:
        """Raise a ConfigError for ``field_name`` unless ``condition`` holds."""
        if not condition:
            raise ConfigError(
                "unusable value",
                where=flag_name(field_name),
                expected=expected,
                found=repr(getattr(self, field_name)),
            )

    def require_between(self, least: float, most: float, *field_names: str) -> None:
        """Raise a ConfigError for the first named field that is not within these numbers."""
        for name in field_names:
            is_within = least <= getattr(self, name) <= most
            self.require(is_within, name, f"{least:,} to {most:,}")

    def require_positive(self, *field_names: str) -> None:
        """Raise a ConfigError for the first named field that is not above zero."""
        for name in field_names:
            self.require(getattr(self, name) > 0, name, "a number above 0")


def require_used(sections: Sequence[Section]) -> None:
    """Raise a ConfigError for a field that was changed but has no effect with the other fields.

    Conditions on fields of branches that are not in ``sections`` are not checked.
    """
    values = {
        field.name: getattr(section, field.name)
        for section in sections
        for field in dataclasses.fields(section)  # type: ignore[arg-type]
    }
    for section in sections:
        for field in dataclasses.fields(section):  # type: ignore[arg-type]
            for name, wanted in field.metadata.get("used_with", {}).items():
                if name not in values or values[name] in wanted:
                    continue
                if wanted is SET and values[name]:
                    continue
                users = " ".join([flag_name(name), " or ".join(map(str, wanted))]).strip()
                is_default = getattr(section, field.name) == field.default
                section.require(is_default, field.name, f"{field.default}, as only {users} uses it")
