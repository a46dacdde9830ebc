"""The base of every branch of the settings, and the branches of both stages: layout, model, data.

A field has its help, choices and limits; a branch checks them when it is built.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_replay.errors import ConfigError

#: In ``used_with``, in place of values: any but None, False and 0; any number above 1.
SET, ABOVE_ONE = "", "above 1"
#: JSON, YAML and floats all represent integers below 2^53; float32 represents 1e30.
_LARGEST, _LARGEST_FLOAT = 2**53, 1e30


def option(
    help_text: str,
    default: Any = dataclasses.MISSING,
    choices: tuple[str, ...] | None = None,
    *,
    within: str | None = None,
    used_with: Mapping[str, tuple[str, ...] | str] | None = None,
) -> Any:
    """A dataclass field with its help; without ``default`` the user must give it.

    ``within``: the interval of its numbers, as in "[0, 1)"; None as a value is in any.
    ``used_with``: the field is read only where each of these other fields, of any branch, has one
    of these values (or is ``SET`` or ``ABOVE_ONE``); elsewhere it must keep its default.
    """
    metadata = {"help": help_text, "choices": choices, "within": within, "used_with": used_with}
    return dataclasses.field(default=default, metadata=metadata)


def flag_name(field_name: str) -> str:
    """``micro_batch_size`` -> ``--micro-batch-size``."""
    return "--" + field_name.replace("_", "-")


class Section:
    """Base of the tree's branches: checks every value; ``require`` raises the errors."""

    def __post_init__(self) -> None:
        """Check every value by its type and its field, then run the branch's own checks."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value, choices, within = (
                getattr(self, field.name), field.metadata["choices"], field.metadata["within"],
            )  # fmt: skip
            if choices is not None:
                self.require(value in choices, field.name, "one of " + ", ".join(choices))
            if isinstance(value, float):
                self.require(math.isfinite(value), field.name, "a finite number")
                self.require(abs(value) <= _LARGEST_FLOAT, field.name, "a number up to 1e30")
            elif isinstance(value, int):
                self.require(abs(value) < _LARGEST, field.name, "a number below 2^53")
            elif isinstance(value, str):  # an empty path would be the current directory
                self.require(
                    value != "" and "\0" not in value, field.name, "a text that is not empty"
                )
            if within is not None and value is not None:
                self._require_within(field.name, value, within)
        self._check()

    def _require_within(self, field_name: str, value: float, interval: str) -> None:
        low, high = interval[1:-1].split(", ")
        is_above = value > float(low) or (interval[0] == "[" and value == float(low))
        is_below = value < float(high) or (interval[-1] == "]" and value == float(high))
        words = ("a number above " if interval[0] == "(" else "a number from ") + low
        if high != "inf":
            words += (", at most " if interval[-1] == "]" else ", below ") + high
        self.require(is_above and is_below, field_name, words)

    def _check(self) -> None:
        """Raise ConfigError for values that exclude each other; branches override it."""

    def require(self, condition: bool, field_name: str, expected: str) -> None:
        """Raise a ConfigError for ``field_name`` unless ``condition`` holds."""
        if not condition:
            raise ConfigError(
                "unusable value",
                where=flag_name(field_name),
                expected=expected,
                found=repr(getattr(self, field_name)),
            )


def require_used(sections: Sequence[Section]) -> None:
    """Raise a ConfigError for a field that was changed but has no effect with the other fields."""
    fields = [(section, field) for section in sections for field in dataclasses.fields(section)]  # type: ignore[arg-type]
    values = {field.name: getattr(section, field.name) for section, field in fields}
    for section, field in fields:
        for name, wanted in (field.metadata["used_with"] or {}).items():
            if not _is_among(values[name], wanted):
                words = wanted if isinstance(wanted, str) else " or ".join(wanted)
                user = f"{flag_name(name)} {words}".strip()
                is_default = values[field.name] == field.default
                section.require(is_default, field.name, f"{field.default}, as only {user} uses it")


def _is_among(value: Any, wanted: tuple[str, ...] | str) -> bool:
    if wanted == ABOVE_ONE:
        return bool(value > 1)
    return bool(value) if wanted == SET else value in wanted


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """How the model is placed on the devices."""

    tensor_model_parallel_size: int = option("tensor parallel size (TP)", 1, within="[1, inf)")
    pipeline_model_parallel_size: int = option("pipeline parallel size (PP)", 1, within="[1, inf)")
    sequence_parallel: bool = option(
        "shard activations along the sequence over TP",
        False,
        used_with={"tensor_model_parallel_size": ABOVE_ONE},
    )
    platform: str = option("auto, or the name of a platform (cpu, ...)", "auto")
    distributed_timeout_minutes: float = option(
        "minutes a collective waits for a rank before the run fails", 10.0, within="[0.01, 10080]"
    )
    batch_p2p_comm: bool = option(
        "a pipeline stage sends and receives in one batched call; off: one call each",
        True,
        used_with={"pipeline_model_parallel_size": ABOVE_ONE},
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfigSource(Section):
    """Which weights, and in what precision."""

    load: str = option("Hugging Face directory, or a directory that --save wrote")
    bf16: bool = option("compute in bfloat16 (the optimizer keeps fp32 master weights)", False)


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Which corpus, and how its documents are computed."""

    data_path: str = option("prefix of a corpus that tools/preprocess_data.py wrote")
    seq_length: int = option("positions in a pack of documents", 4096, within="[1, 4194304]")
    long_documents: str = option(
        "what to do with documents longer than --seq-length",
        "error",
        ("error", "drop", "truncate"),
    )
    micro_batch_size: int = option(
        "a micro-batch computes at most so many times --seq-length positions",
        1,
        within="[1, 65536]",
    )
    share_prefixes: bool = option(
        "compute the tokens with which documents begin in common once: exact, and cheaper", True
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of both stages."""

    parallel: ParallelConfig
    model: ModelConfigSource
    data: DataConfig

    def __post_init__(self) -> None:
        """Check the branches against each other."""
        require_used([getattr(self, field.name) for field in dataclasses.fields(self)])
