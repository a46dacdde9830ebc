"""What was measured of each model: the JSON that ``tools/evaluate.py`` writes, and its scores.

An evaluation is checked where it is read (`read_evaluation`), so that no other code checks it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_replay.errors import DataError
from megatron_replay.files import is_number, read_json

FORMAT = 2
BASE = "base"
Result = dict[str, Any]
#: Kinds of benchmarks, and the key of their score, a share from 0 to 1.
KINDS = {"sql": "accuracy", "choices": "accuracy", "lm_eval": "score"}
#: Measurements that have a perplexity.
_TEXTS = ("data", "general")

# The schema of what is read again. A name that ends with "!" must be there; "*" is any other name;
# fields that are not listed pass unchecked.
_TEXT, _NUMBER, _COUNT, _FLAG = "a string", "a number", "an integer", "true or false"
_OR_NULL = " or null"  # lm-eval does not always return them
_IS: dict[str, Callable[[Any], bool]] = {
    _TEXT: lambda value: isinstance(value, str),
    _NUMBER: is_number,
    _COUNT: lambda value: isinstance(value, int) and is_number(value),
    _FLAG: lambda value: isinstance(value, bool),
}
_SAMPLE: Result = {"question!": _TEXT, "gold!": _TEXT, "answer!": _TEXT, "right!": _FLAG}
_BENCHMARK: Result = {
    "questions": _COUNT + _OR_NULL, "standard_error": _NUMBER + _OR_NULL, "general": _FLAG,
    "hits": _TEXT, "empty_gold": _COUNT, "left_out": _COUNT, "unfinished": _COUNT,
    "unwrapped": _COUNT, "failures": {"*": _COUNT},
    "samples": [_SAMPLE],
}  # fmt: skip
_PERPLEXITY: Result = {
    "perplexity!": _NUMBER, "delta_perplexity": _NUMBER, "loss": _NUMBER, "accuracy": _NUMBER
}  # fmt: skip
_KEPT: Result = {
    "key!": _TEXT, "sha256": _TEXT, "relative_l2_percent": _NUMBER,
    "sql": {"*": _BENCHMARK | {"accuracy!": _NUMBER}},
    "choices": {"*": _BENCHMARK | {"accuracy!": _NUMBER}},
    "lm_eval": {"*": _BENCHMARK | {"score!": _NUMBER, "metric!": _TEXT}},
    "data": _PERPLEXITY, "general": _PERPLEXITY,
    "candidates": {"outside_mass": _NUMBER, "restricted_loss": _NUMBER, "full_loss": _NUMBER},
    "retention_percent": _NUMBER,
}  # fmt: skip
_SHOWN = _KEPT | {
    "name!": _TEXT, "path!": _TEXT, "sha256!": _TEXT, "relative_l2_percent!": _NUMBER
}  # fmt: skip
_EVALUATION: Result = {
    "models!": [_SHOWN], "kept": [_KEPT], "command!": _TEXT, "settings!": {},
    "inputs!": {"*": {"path!": _TEXT, "sha256!": _TEXT}},
}  # fmt: skip
#: Measures of a model that diverged may be infinite or no number, which JSON cannot write.
_BEYOND = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def read_evaluation(path: Path) -> Result:
    """Read what ``tools/evaluate.py`` wrote.

    Raises:
        DataError: it is missing, damaged, or of another format.
    """
    document = read_json(path, DataError, fix="Give the JSON that tools/evaluate.py wrote")
    if document.get("format") != FORMAT:
        raise DataError(
            "not an evaluation, or one of another format",
            where=path,
            expected=f'"format": {FORMAT}',
            found=document.get("format"),
            fix="Measure again with tools/evaluate.py, into another file",
        )
    document = dict(_checked(document, _EVALUATION, path))
    if not document["models"]:
        raise DataError("damaged: no results", where=f"{path}: models")
    return document


def _checked(value: Any, schema: Any, where: object) -> Any:
    """``value``, if it fits the schema, with numbers for the texts of ``_BEYOND``."""
    if schema is None:
        return value
    if isinstance(schema, list) and isinstance(value, list):
        return [_checked(one, schema[0], f"{where}[{i}]") for i, one in enumerate(value)]
    if isinstance(schema, dict) and isinstance(value, dict):
        for name in (name[:-1] for name in schema if name.endswith("!")):
            if name not in value:
                raise DataError(f"{name!r} is missing", where=where, found=", ".join(value)[:80])
        return {
            name: _checked(
                inside,
                schema.get(f"{name}!", schema.get(name, schema.get("*"))),
                f"{where}: {name}",
            )
            for name, inside in value.items()
        }
    expected = "a list" if isinstance(schema, list) else "an object"
    if isinstance(schema, str):
        expected = schema
        kind = schema.removesuffix(_OR_NULL)
        if kind == _NUMBER and isinstance(value, str):
            value = _BEYOND.get(value, value)
        if _IS[kind](value) or (value is None and kind != schema):
            return value
    raise DataError("of another type", where=where, expected=expected, found=repr(value)[:60])


def printable(text: str) -> str:
    """``text`` with bytes of file names that are not UTF-8 as escapes such as ``\\udce9``."""
    return text.encode("utf-8", "backslashreplace").decode()


def strict(value: Any) -> Any:
    """``value`` with the texts "NaN" and "Infinity" for numbers that JSON cannot write."""
    if isinstance(value, Mapping):
        return {name: strict(inside) for name, inside in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(inside) for inside in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def value_at(model: Mapping[str, Any], path: str | Sequence[str]) -> Any:
    """``value_at(m, "general.perplexity")``; None where it was not measured."""
    value: Any = model
    for key in path.split(".") if isinstance(path, str) else path:
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def scores(model: Mapping[str, Any], *, general: bool) -> dict[str, float]:
    """Score of each general benchmark, or of each task of the domain, in per cent."""
    return {
        name: 100 * result[score]
        for kind, score in KINDS.items()
        for name, result in model.get(kind, {}).items()
        if bool(result.get("general")) is general
    }


def domain_mean(model: Mapping[str, Any]) -> tuple[float, float | None]:
    """Mean over the domain's tasks, in per cent, and its standard error, the tasks independent.

    The error is None where a task has none.
    """
    found = scores(model, general=False)
    results = {name: result for kind in KINDS for name, result in model.get(kind, {}).items()}
    errors = [results[name].get("standard_error") for name in found]
    mean = sum(found.values()) / len(found)
    return mean, None if None in errors else 100 * math.hypot(*errors) / len(errors)


def standard_error(correct: int, total: int) -> float:
    """``√(p(1-p)/n)`` of ``correct / total``, with p shrunk as Agresti and Coull (1998) do.

    ``p = (correct + 2)/(total + 4)``, n = total + 4: the plain formula claims an error of zero for
    0 of n.
    """
    n = total + 4
    p = (correct + 2) / n
    return math.sqrt(p * (1 - p) / n)


def add_differences(result: Result, base: Result) -> None:
    """Add what compares a model with the base.

    ``ΔPPL = exp(CE of the model) − exp(CE of the base)``, on the same tokens; retention
    ``100 · score / base score`` of every general benchmark, in per cent, and its mean.

    Raises:
        DataError: the two were measured on different things, or the base scores 0 in a general
            benchmark: there is nothing to keep.
    """
    found, of_base = scores(result, general=True), scores(base, general=True)
    texts = [name for name in _TEXTS if name in result]
    if (texts, found.keys()) != ([name for name in _TEXTS if name in base], of_base.keys()):
        raise DataError(
            "damaged: an earlier result lacks what the base's has, or the base's what it has",
            where=result["name"],
            fix="Measure again, into another file",
        )
    for name in texts:
        change = result[name]["perplexity"] - base[name]["perplexity"]
        result[name]["delta_perplexity"] = change
    for name, score in of_base.items():
        if score == 0:
            raise DataError(
                "the base scores 0, so retention is undefined",
                where=f"general benchmark {name}",
                fix="Leave it out, or measure it as one of the domain",
            )
    if found:
        kept = {name: 100 * score / of_base[name] for name, score in found.items()}
        result["retention"] = kept
        result["retention_percent"] = sum(kept.values()) / len(kept)
