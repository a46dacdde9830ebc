"""``metrics.jsonl`` and TensorBoard: a line and an event per logged iteration, across resumes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from megatron_replay.errors import OutputError
from megatron_replay.files import atomic_file, make_directory, open_regular, output_error


class MetricsLog:
    """Appends to ``directory/metrics.jsonl`` and to TensorBoard; only the writer rank has one.

    A run that resumes at iteration k drops the lines after k first: they belong to steps whose
    weights were lost, and will be taken again. A run that starts anew (k = 0) drops all.

    Attributes:
        kept: the lines up to k, for whatever must go on as if the run had never stopped.
    """

    def __init__(self, directory: Path, tensorboard_dir: Path, *, resume_iteration: int) -> None:
        self._path = directory / "metrics.jsonl"
        keep_lines_until(self._path, resume_iteration)
        self.kept = read_metrics(self._path) if self._path.exists() else []
        self._file = open(self._path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        first = resume_iteration + 1 if resume_iteration else 0
        make_directory(tensorboard_dir)
        self._events = SummaryWriter(str(tensorboard_dir), purge_step=first)

    def write(self, iteration: int, values: dict[str, Any]) -> None:
        """Log ``values`` (numbers, or one level of named ones) under ``iteration``.

        A text goes into ``metrics.jsonl`` only.

        Raises:
            OutputError: the disk is full.
        """
        try:
            self._file.write(json.dumps({"iteration": iteration, **_finite(values)}) + "\n")
        except OSError as error:
            raise output_error(self._path, error) from error
        for name, value in values.items():
            for tag, number in _scalars(name, value):
                self._events.add_scalar(tag, number, iteration)

    def close(self) -> None:
        """Flush both."""
        self._file.close()
        self._events.close()


def keep_lines_until(path: Path, iteration: int) -> None:
    """Drop the lines of later iterations; all, where ``iteration`` is 0.

    Raises:
        OutputError: the file is damaged, or cannot be written.
    """
    if not os.path.lexists(path):
        return
    lines = _read_lines(path)
    kept = [line for line, value in lines if iteration and value["iteration"] <= iteration]
    if sum(map(len, kept)) < path.stat().st_size:
        with atomic_file(path) as handle:
            handle.writelines(kept)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a ``metrics.jsonl``.

    Raises:
        OutputError: the file is damaged.
    """
    return [value for _, value in _read_lines(path)]


def _read_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Each line and what it says; a last one that a kill has torn is left out."""
    with open_regular(path, OutputError) as handle:
        lines = handle.read().splitlines(keepends=True)
    found = []
    for number, line in enumerate(lines, start=1):
        value = _parsed(line)
        if value is not None:
            found.append((line, value))
        elif number < len(lines) or line.endswith(b"\n"):
            raise OutputError(
                "damaged: no line of this run's",
                where=f"{path}:{number}",
                expected='{"iteration": 1, ...} with numbers',
                found=line[:60].decode(errors="replace"),
                fix="Remove that line, then rerun the same command",
            )
    return found


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line's object; None where it is none, or lacks the numbers that a resumed run reads."""
    try:
        value = json.loads(line)
        is_sound = type(value["iteration"]) is int and value["iteration"] >= 0
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if "loss" in value:
        numbers = (value.get("seconds"), value.get("positions"), value.get("data_wait_seconds", 0))
        is_sound &= all(type(number) in (int, float) for number in numbers)
        is_sound &= all(_is_number_or_null(value.get(n)) for n in ("loss", "grad_norm"))
        update = value.get("update") or {}
        is_sound &= isinstance(update, dict) and all(map(_is_number_or_null, update.values()))
    if "general" in value:
        general = value["general"]
        is_sound &= isinstance(general, dict) and {"perplexity", "sample"} <= general.keys()
        is_sound = is_sound and _is_number_or_null(general["perplexity"])
    return value if is_sound else None


def _is_number_or_null(value: Any) -> bool:
    return value is None or type(value) in (int, float)


def _scalars(name: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, dict):
        return [scalar for key, v in value.items() for scalar in _scalars(f"{name}/{key}", v)]
    return [] if value is None or isinstance(value, str) else [(name, float(value))]


def _finite(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
