"""``metrics.jsonl`` and TensorBoard: a line and an event per logged iteration, across resumes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from megatron_replay.files import atomic_file, make_directory, output_error
from megatron_replay.run_log import METRICS, read_metrics, read_raw_lines


class MetricsLog:
    """Appends to ``metrics.jsonl`` and to ``tensorboard/`` in a run's directory, on one rank.

    A run that resumes at iteration k drops the lines after k first: they belong to steps whose
    weights were lost, and will be taken again. A run that starts anew (k = 0) drops all.

    Attributes:
        kept: the lines up to k, for whatever must go on as if the run had never stopped.
    """

    def __init__(self, directory: Path, *, resume_iteration: int) -> None:
        self._path = directory / METRICS
        keep_lines_until(self._path, resume_iteration)
        self.kept = read_metrics(self._path) if self._path.exists() else []
        self._file = open(self._path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        first = resume_iteration + 1 if resume_iteration else 0
        events = make_directory(directory / "tensorboard")
        self._events = SummaryWriter(str(events), purge_step=first)

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
    lines = read_raw_lines(path)
    kept = [line for line, value in lines if iteration and value["iteration"] <= iteration]
    if sum(map(len, kept)) < path.stat().st_size:
        with atomic_file(path) as handle:
            handle.writelines(kept)


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
