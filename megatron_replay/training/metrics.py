"""Logs a run in ``metrics.jsonl`` and TensorBoard, and computes stability and warnings."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from megatron_replay.files import atomic_file, make_directory, output_error
from megatron_replay.run_log import METRICS, Line, read_raw_lines

#: A spike is a value above mean + SIGMAS · std of the SPIKE_WINDOW logged steps before it.
SPIKE_WINDOW, SPIKE_SIGMAS = 128, 6.0
#: Logged steps that a warning about updates averages over, and its limits (docs/method.md).
WATCHED_STEPS, OBTUSE_LIMIT, UPDATE_LIMIT = 50, 0.5, 0.02


class MetricsLog:
    """Appends to ``metrics.jsonl`` and to ``tensorboard/`` in a run's directory, on one rank.

    A run that resumes at iteration k first drops the lines after k: their steps are repeated. A run
    from the start (k = 0) drops all lines.

    Attributes:
        kept: the lines up to k.
    """

    def __init__(self, directory: Path, *, resume_iteration: int) -> None:
        self._path = directory / METRICS
        self.kept = keep_lines_until(self._path, resume_iteration)
        self._file = open(self._path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        events = make_directory(directory / "tensorboard")
        first = resume_iteration + 1 if resume_iteration else 0
        self._events = SummaryWriter(str(events), purge_step=first)

    def write(self, iteration: int, values: dict[str, Any]) -> None:
        """Log ``values`` (numbers, texts, or one level of named ones) under ``iteration``.

        ``metrics.jsonl`` has null for a number that is not finite; TensorBoard has no texts.

        Raises:
            OutputError: the disk is full.
        """
        text = json.dumps({"iteration": iteration, **values})
        finite = json.loads(text, parse_constant=lambda _: None)
        try:
            self._file.write(json.dumps(finite) + "\n")
        except OSError as error:
            raise output_error(self._path, error) from error
        for name, value in values.items():
            nested = value if isinstance(value, dict) else {"": value}
            for key, number in nested.items():
                if isinstance(number, (int, float)):
                    self._events.add_scalar(f"{name}/{key}".rstrip("/"), number, iteration)

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        self._events.close()


def keep_lines_until(path: Path, iteration: int) -> list[Line]:
    """Drop the lines of later iterations, or all lines if ``iteration`` is 0; returns the others.

    Raises:
        OutputError: the file is damaged, or cannot be written.
    """
    if not os.path.lexists(path):
        return []
    lines = read_raw_lines(path)
    kept = [(line, value) for line, value in lines if iteration and value["iteration"] <= iteration]
    if sum(len(line) for line, _ in kept) < path.stat().st_size:
        with atomic_file(path) as handle:
            handle.writelines(line for line, _ in kept)
    return [value for _, value in kept]


class Stability:
    """How stable the loss and the gradient norm of a run are, over its logged steps.

    Steps are added one at a time, during training or from ``metrics.jsonl``, with the same result.
    Memory: two numbers per step.

    Args:
        warmup_iters: iterations that ``gradient_norm_cv`` leaves out.
    """

    def __init__(self, *, warmup_iters: int) -> None:
        self._warmup_iters = warmup_iters
        self._in_warmup = self._non_finite = 0
        self._series: dict[str, list[float]] = {"loss": [], "gradient": []}
        self._spikes = {"loss": 0, "gradient": 0}
        self._is_above = {"loss": False, "gradient": False}

    def add(self, step: Mapping[str, Any]) -> dict[str, float]:
        """Add the next logged step.

        Returns:
            Where the loss or the gradient norm begins to spike, the limit that it exceeds, by
            "loss" and "gradient". Consecutive steps above their limits are one spike.
        """
        values = {"loss": step["loss"], "gradient": step["grad_norm"]}
        if not all(value is not None and math.isfinite(value) for value in values.values()):
            self._non_finite += 1
            return {}
        self._in_warmup += step["iteration"] <= self._warmup_iters
        began = {}
        for name, value in values.items():
            before = self._series[name][-SPIKE_WINDOW:]
            limit = math.inf
            if len(before) == SPIKE_WINDOW:
                limit = float(np.mean(before) + SPIKE_SIGMAS * np.std(before))
            if value > limit and not self._is_above[name]:
                self._spikes[name] += 1
                began[name] = limit
            self._is_above[name] = value > limit
            self._series[name].append(value)
        return began

    def values(self) -> dict[str, float | None]:
        """The numbers of all steps so far, for the log; None where a number is undefined.

        - steps, non_finite: logged steps with a finite loss and gradient norm, and the others,
          which no other number counts.
        - loss_variance: mean (L - a - b·t)² over the last half of the steps t, with a and b by
          least squares, so that progress does not count as noise; in nats².
        - loss_std: its square root. The paper (arXiv 2510.09152) uses both names for one number.
        - gradient_norm_cv: std / mean of the norm before clipping, after the warm-up.
        - loss_spikes, gradient_spikes: how many there were; loss_spike_rate, gradient_spike_rate:
          per step that had ``SPIKE_WINDOW`` steps before it.
        """
        losses, norms = self._series["loss"], np.array(self._series["gradient"][self._in_warmup :])
        variance = detrended_variance(losses[len(losses) // 2 :]) if losses else None
        mean = float(norms.mean()) if len(norms) else 0.0
        judged = max(0, len(losses) - SPIKE_WINDOW)
        values: dict[str, float | None] = {
            "steps": len(losses),
            "non_finite": self._non_finite,
            "loss_std": None if variance is None else math.sqrt(variance),
            "loss_variance": variance,
            "gradient_norm_cv": float(norms.std()) / mean if mean else None,
        }
        for name, count in self._spikes.items():
            values[f"{name}_spikes"] = count if judged else None
            values[f"{name}_spike_rate"] = count / judged if judged else None
        return values

    def summary(self) -> str:
        """The numbers as a sentence."""
        values, losses = self.values(), self._series["loss"]
        if not losses:
            return "no logged step was finite."
        last, cv = losses[-max(1, len(losses) // 10) :], values["gradient_norm_cv"]
        spikes = ""
        if len(losses) > SPIKE_WINDOW:
            spikes = (
                f"{values['loss_spikes']} loss and {values['gradient_spikes']} gradient-norm "
                f"spikes after the first {SPIKE_WINDOW} steps, "
            )
        return (
            f"loss {np.mean(last):.4f} over the last tenth of {len(losses)} logged steps, std "
            f"{values['loss_std']:.4f} around its trend in the last half, gradient-norm CV "
            f"after warm-up {'undefined' if cv is None else f'{cv:.3f}'}, {spikes}"
            f"{values['non_finite']} steps not finite."
        )


def detrended_variance(values_N: list[float]) -> float:
    """Mean squared distance of N >= 1 values from their own least-squares line; 0 up to N = 2."""
    if len(values_N) <= 2:
        return 0.0
    deviation = np.array(values_N, np.float64)
    deviation -= deviation.mean()
    steps = np.arange(len(values_N)) - (len(values_N) - 1) / 2
    deviation -= steps * (steps @ deviation) / (steps @ steps)
    return float(np.mean(deviation**2))


class UpdateWarnings:
    """Warns once about gradients that oppose the momentum, and once about tiny updates.

    Reads ``StepResult.update`` of each logged step. It compares the mean of a number over the last
    ``WATCHED_STEPS`` steps that had it, never over fewer, with its limit.
    """

    def __init__(self) -> None:
        self._recent = {name: deque[float](maxlen=WATCHED_STEPS) for name in _WARNINGS}

    def add(self, update: Mapping[str, float | None]) -> list[str]:
        """Add the next logged step; returns the warnings that it causes for the first time."""
        warnings = []
        for name, recent in list(self._recent.items()):
            value = update.get(name)
            if value is None or not math.isfinite(value):
                continue
            recent.append(value)
            mean = math.fsum(recent) / len(recent)
            is_bad = mean > OBTUSE_LIMIT if name == "obtuse" else mean < UPDATE_LIMIT
            if is_bad and len(recent) == WATCHED_STEPS:
                warnings.append(_WARNINGS[name](mean))
                del self._recent[name]
        return warnings


_WARNINGS = {
    "obtuse": lambda mean: (
        f"the gradient pointed against the momentum in {100 * mean:.0f} % of the last "
        f"{WATCHED_STEPS} logged steps: consecutive updates point in opposite directions (noise, "
        "or too high a learning rate). Raise --global-batch-size, or lower --lr if the loss swings"
    ),
    "update_rms_over_lr": lambda mean: (
        f"the weights hardly move: the RMS of an update was {mean:.2g} x lr over the last "
        f"{WATCHED_STEPS} logged steps, where AdamW's is about 0.2 to 1. The gradient is mostly "
        "noise, or most of it is clipped away. Raise --global-batch-size, --max-angle or --lr, and "
        "compare with an AdamW whose learning rate moves the weights as far"
    ),
}
