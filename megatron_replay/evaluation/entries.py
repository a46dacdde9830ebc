"""A model's results as JSON, checked where they are read, so that no other code checks them.

``tools/evaluate.py`` writes one entry for each model. Fields that are not listed here pass
unchecked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_replay.errors import DataError
from megatron_replay.files import is_number

#: Kinds of benchmarks, and the fields that each of their results has.
_SCORES = {"sql": ["accuracy"], "choices": ["accuracy"], "lm_eval": ["score", "metric"]}
#: Other measurements.
_PARTS = ("data", "general", "candidates")
_TEXTS = ("name", "path", "sha256", "key", "metric", "command", "config")
_FLAGS = ("general",)
_COUNTS = (
    "questions", "matches", "empty_gold", "unfinished", "correct", "correct_per_byte", "tokens",
    "positions", "documents",
)  # fmt: skip
_NUMBERS = (
    "accuracy", "accuracy_per_byte", "standard_error", "score", "perplexity", "delta_perplexity",
    "loss", "outside_mass", "restricted_loss", "full_loss", "relative_l2_percent",
    "retention_percent", "seconds",
)  # fmt: skip
_OBJECTS = (*_SCORES, *_PARTS, "retention")
#: lm-eval does not always return these.
_MAY_BE_NULL = ("standard_error", "questions")
#: Measures of a model that diverged may be infinite or no number, which JSON cannot write.
_BEYOND = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_NUMBER = "a number"


def strict(value: Any) -> Any:
    """``value`` with the texts "NaN" and "Infinity" for numbers that JSON cannot write."""
    if isinstance(value, Mapping):
        return {name: strict(inside) for name, inside in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(inside) for inside in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def restored(value: Any, name: str = "") -> Any:
    """The inverse of ``strict`` for an entry or part of one."""
    if isinstance(value, Mapping):
        return {key: restored(inside, key) for key, inside in value.items()}
    return _BEYOND.get(value, value) if name in _NUMBERS and isinstance(value, str) else value


def require_entry(entry: Any, where: object, *, required: Iterable[str] = ()) -> None:
    """Raise DataError unless the listed fields of a model's results have their types.

    Args:
        where: the file and the place in it, for the message.
        required: further fields that must be there.
    """
    plain = {k: v for k, v in require_object(entry, where).items() if k not in _OBJECTS}
    require_fields(plain, where, required=required)
    for name, value in entry.items():
        inside = f"{where}: {name}"
        if name in _SCORES:
            for benchmark, result in require_object(value, inside).items():
                require_fields(result, f"{inside}: {benchmark}", required=_SCORES[name])
                require_numbers(result.get("failures", {}), f"{inside}: {benchmark}: failures")
        elif name in _PARTS:
            require_fields(value, inside)
        elif name == "retention":
            require_numbers(value, inside)


def require_fields(value: Any, where: object, *, required: Iterable[str] = ()) -> None:
    """Raise DataError unless ``value`` is an object whose listed fields have their types."""
    fields = require_object(value, where)
    for name in required:
        if name not in fields:
            raise DataError(f"{name!r} is missing", where=where, found=", ".join(fields)[:80])
    for name, found in fields.items():
        expected = _type_of(name)
        if name == "failures":
            continue  # checked by `require_entry`
        if found is None and name in _MAY_BE_NULL:
            right = name not in required
        elif expected == _NUMBER and isinstance(found, str):
            right = found in _BEYOND
        elif expected == "a string":
            right = isinstance(found, str)
        elif expected == "true or false":
            right = isinstance(found, bool)
        else:
            kinds = (int, float) if expected == _NUMBER else int
            right = not expected or (isinstance(found, kinds) and is_number(found))
        if not right:
            raise DataError(
                f"{name!r} is of another type", where=where, expected=expected, found=_shown(found)
            )


def require_numbers(value: Any, where: object) -> None:
    """Raise DataError unless ``value`` is an object of numbers."""
    for name, found in require_object(value, where).items():
        if not is_number(found):
            raise DataError(
                f"{name!r} is of another type", where=where, expected=_NUMBER, found=_shown(found)
            )


def require_object(value: Any, where: object) -> Mapping[str, Any]:
    """``value``, if it is a JSON object.

    Raises:
        DataError: it is not.
    """
    if not isinstance(value, Mapping):
        raise DataError("not an object", where=where, expected="{…}", found=_shown(value))
    return value


def _type_of(name: str) -> str:
    for names, kind in ((_TEXTS, "a string"), (_FLAGS, "true or false"), (_COUNTS, "an integer")):
        if name in names:
            return kind
    return _NUMBER if name in _NUMBERS else ""


def _shown(value: Any) -> str:
    return repr(value)[:60]
