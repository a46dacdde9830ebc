"""``rows.jsonl``: one run a line, with what was measured on it and what it was made with.

A table is made from rows: every seed of every method is a run, and so a row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_replay.errors import ConfigError, DataError
from megatron_replay.evaluation.entries import (
    require_entry,
    require_numbers,
    restored,
    strict,
)
from megatron_replay.evaluation.json_lines import append_line, parse_object, whole_lines
from megatron_replay.files import is_number
from megatron_replay.run_log import CONFIG, read_resolved_config, summarize_run

FORMAT = 1
#: The tables that a row can be listed in, by the names that ``--table`` takes.
TABLES = ("methods", "positions", "angles", "coverage", "remedies", "sweep")
#: What seeds of one method differ in, and where a run writes: no part of its configuration's hash.
_NOT_HASHED = {"training": ("seed", "save", "tensorboard_dir")}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run, or one base model, evaluated.

    Attributes:
        method: the line it belongs to, together with ``variant``.
        tables: those of `TABLES` that it is listed in; a base model's are where it is compared.
        variant: what a sweep varies: ``bucket``, ``45``, ``0.95``.
        base: the base model's name, never mixed with another in one line; ``size`` neither.
        size: of the model: ``0.9M``.
        seed: of the run.
        lr, optimizer, loss: from the resolved configuration; None and empty for a base model.
        config_hash: SHA-256 of the resolved configuration without seed and output paths.
        command: makes the run (a base model: its evaluation) again.
        evaluation: the model's entry in the JSON of ``tools/evaluate.py``.
        run: `RunSummary` without its probes, with the last one's ``outside_mass``; None for a base.
        stage0_seconds: what collecting the candidates took, where the run used any.
    """

    method: str
    tables: tuple[str, ...]
    variant: str = ""
    base: str = ""
    size: str = ""
    seed: int
    lr: float | None
    optimizer: str
    loss: str
    config_hash: str
    command: str
    evaluation: dict[str, Any]
    run: dict[str, Any] | None
    stage0_seconds: float | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.tables if name not in TABLES]
        if unknown:
            raise ConfigError("no such table", expected=" or ".join(TABLES), found=unknown[0])
        if not self.method:
            raise ConfigError("a row without a method")

    @property
    def is_base(self) -> bool:
        """Whether this is the model that the runs started from."""
        return self.run is None


def row_of_run(
    run: Path,
    evaluation: Mapping[str, Any],
    *,
    method: str,
    tables: Sequence[str],
    seed: int,
    variant: str = "",
    base: str = "",
    size: str = "",
    stage0_seconds: float | None = None,
    command: str,
) -> Row:
    """Make a row of a Stage 1 run's directory and its model's ``evaluation``.

    Raises:
        ConfigError: a table has no such name.
        DataError: the run's metrics or configuration cannot be read.
    """
    summary = asdict(summarize_run(run))
    probes = summary.pop("probes")
    summary["outside_mass"] = probes[-1]["probe"].get("outside_mass") if probes else None
    config = read_configuration(run)
    try:
        lr, optimizer = float(config["optimizer"]["lr"]), str(config["optimizer"]["optimizer"])
        loss = _loss_name(config["loss"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"not a resolved configuration: {error!r}",
            where=run / CONFIG,
            expected="optimizer: {lr, optimizer} and loss: {loss}",
        ) from error
    return Row(
        method=method,
        tables=tuple(tables),
        variant=variant,
        base=base,
        size=size,
        seed=seed,
        lr=lr,
        optimizer=optimizer,
        loss=loss,
        config_hash=configuration_hash(config),
        command=command,
        evaluation=dict(evaluation),
        run=summary,
        stage0_seconds=stage0_seconds,
    )


def base_row(
    evaluation: Mapping[str, Any],
    *,
    tables: Sequence[str] = ("methods", "remedies", "sweep"),
    base: str = "",
    size: str = "",
    seed: int = 0,
    command: str,
) -> Row:
    """Make the row of a base model: the first line, and what gains are counted from."""
    return Row(
        method="Base",
        tables=tuple(tables),
        base=base,
        size=size,
        seed=seed,
        lr=None,
        optimizer="",
        loss="",
        config_hash="",
        command=command,
        evaluation=dict(evaluation),
        run=None,
    )


def read_configuration(run: Path) -> dict[str, Any]:
    """The resolved configuration in a run's directory.

    Raises:
        DataError: it is missing, or no mapping of sections.
    """
    return read_resolved_config(run / CONFIG)


def configuration_hash(config: Mapping[str, Mapping[str, Any]]) -> str:
    """SHA-256 of the settings, in the order of their names, without seed and output paths."""
    decisive = {
        section: {k: v for k, v in settings.items() if k not in _NOT_HASHED.get(section, ())}
        for section, settings in config.items()
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _loss_name(loss: Mapping[str, Any]) -> str:
    """``full``, ``restricted``, ``restricted document ghost``: what is not the default is named."""
    if loss["loss"] == "full":
        return "full"
    scope, tail = loss.get("candidate_scope", "position"), loss.get("tail", "none")
    named = [] if scope == "position" else [str(scope)]
    if tail != "none":
        named.append(f"{tail} {loss['tail_samples']}" if tail == "sampled" else str(tail))
    for name, written in (("full_loss_every", "full every"), ("kl_weight", "KL")):
        if loss.get(name):
            named.append(f"{written} {loss[name]}")
    return " ".join([str(loss["loss"]), *named])


def append_row(path: Path, row: Row) -> None:
    """Append one line with one write, synced; writers take turns.

    A kill can only leave the last line torn: the next append drops it, and says so.

    Raises:
        OutputError: the file cannot be written, holds something else, or stays locked.
    """
    content = strict({"format": FORMAT, **asdict(row)})
    line = json.dumps(content, ensure_ascii=False, allow_nan=False)
    append_line(path, line, _is_row, what="rows")


def _is_row(line: bytes) -> bool:
    """Whether a file's first line is a row, or one that was torn while it was written."""
    begin = f'{{"format": {FORMAT}, "method": '.encode()
    value = parse_object(line) or {}
    return line.startswith(begin[: len(line)]) or (
        value.get("format") == FORMAT and "method" in value
    )


def read_rows(path: Path) -> list[Row]:
    """All rows of a file; a torn last line is dropped, and said.

    Raises:
        DataError: the file is missing or empty, or a line is not a row.
    """
    rows = [
        _parse(f"{path}:{number}", line)
        for number, line in enumerate(whole_lines(path), start=1)
        if line.strip()
    ]
    if not rows:
        raise DataError("no rows", where=path)
    return rows


_NUMBER = (int, float)
_KINDS: dict[str, tuple[type, ...]] = {
    "method": (str,),
    "tables": (list,),
    "variant": (str,),
    "base": (str,),
    "size": (str,),
    "seed": (int,),
    "lr": (*_NUMBER, type(None)),
    "optimizer": (str,),
    "loss": (str,),
    "config_hash": (str,),
    "command": (str,),
    "evaluation": (dict,),
    "run": (dict, type(None)),
    "stage0_seconds": (*_NUMBER, type(None)),
}


def _parse(where: str, line: bytes) -> Row:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", where=where) from error
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise DataError("not a row", where=where, expected=f'an object with "format": {FORMAT}')
    for name in sorted(_KINDS.keys() | values.keys()):
        if name not in _KINDS or name not in values:
            problem = "unknown" if name in values else "missing"
            raise DataError(f"{problem} field {name!r}", where=where, expected=", ".join(_KINDS))
        right = isinstance(values[name], _KINDS[name]) and not isinstance(values[name], bool)
        if not right or (isinstance(values[name], _NUMBER) and not is_number(values[name])):
            expected = " or ".join("null" if k is type(None) else k.__name__ for k in _KINDS[name])
            found = json.dumps(values[name])[:60]
            raise DataError(
                f"{name!r} is of another type", where=where, expected=expected, found=found
            )
    require_entry(values["evaluation"], f"{where}: evaluation")
    values["evaluation"] = restored(values["evaluation"])
    if values["run"] is not None:
        _require_run(values["run"], f"{where}: run")
        if values["lr"] is None:
            raise DataError("a run without a learning rate", where=where)
    try:
        return Row(**values | {"tables": tuple(values["tables"])})
    except ConfigError as error:
        raise DataError(str(error), where=where) from error


def _require_run(run: dict[str, Any], where: str) -> None:
    """Numbers, or null where a run was too short for one; a step's time divides by its steps."""
    known = {name: value for name, value in run.items() if value is not None and name != "config"}
    require_numbers(known, where)
    if known.get("iterations", 0) <= 0:
        raise DataError("a run without a step", where=where, found=run.get("iterations"))
