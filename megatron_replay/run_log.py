"""What a training run left behind, in numbers: its cost and how steady it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from megatron_replay.errors import DataError
from megatron_replay.files import is_number, read_text
from megatron_replay.functional.stability import gradient_norm_cv, loss_std, loss_variance, spikes

METRICS, CONFIG, _WARMUP = "metrics.jsonl", "resolved_config.yaml", "lr_warmup_iters"
Line = dict[str, Any]
_GENERAL = ("perplexity", "delta_ppl")
_SCALARS = (str, int, float, type(None))


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One run.

    Attributes:
        iterations: the last one logged.
        logged: iterations that have a line; totals are None unless all have one.
        tokens: trained tokens, or None.
        seconds: time in training steps, or None.
        tokens_per_second: over the logged iterations.
        data_wait_share: of the time in their steps, what they waited for data; None where a line
            does not tell.
        full_loss_steps: logged steps of full softmax among restricted ones, which are left out of
            the losses and norms below.
        final_loss: mean over the last tenth of the logged losses.
        loss_std: standard deviation of the linearly detrended loss over the last half.
        loss_variance: its square.
        gradient_norm_cv: std/mean of the norm before clipping, after the run's warm-up; None where
            nothing comes after it.
        loss_spikes: merged excursions above mean + 6σ of the 128 values before; None where the run
            is too short to judge a single step.
        loss_spike_rate: the same per judged step.
        gradient_spikes, gradient_spike_rate: the same of the norm.
        non_finite: logged steps whose loss or norm was not a finite number; left out above.
        relative_l2: how far the run found its weights from their start, at its last reading; None
            without one, here and below.
        general_perplexity: of the run's sample of general text, at its last reading.
        delta_ppl: the same less that of the weights it started from.
        probes: the lines of the run's own probe, in order.
        config: where the run's whole configuration is.
    """

    iterations: int
    logged: int
    tokens: int | None
    seconds: float | None
    tokens_per_second: float
    data_wait_share: float | None
    full_loss_steps: int
    final_loss: float
    loss_std: float
    loss_variance: float
    gradient_norm_cv: float | None
    loss_spikes: int | None
    loss_spike_rate: float | None
    gradient_spikes: int | None
    gradient_spike_rate: float | None
    non_finite: int
    relative_l2: float | None
    general_perplexity: float | None
    delta_ppl: float | None
    probes: list[Line]
    config: str


class OneLoss:
    """Whether the next logged step is of the loss that the series of steps is read for.

    Steps of full softmax among restricted ones (--full-loss-every) are not: their losses, mostly
    above the others', and gradients are of another function, which is neither noise nor a spike.
    Where no step is restricted, they are the series.
    """

    def __init__(self) -> None:
        self._has_restricted = False

    def __call__(self, line: Mapping[str, Any]) -> bool:
        """Takes the lines of steps in order."""
        is_full = line.get("loss_form") == "full"
        self._has_restricted |= not is_full
        return not (is_full and self._has_restricted)


def read_lines_of_run(directory: Path) -> list[Line]:
    """The lines of ``metrics.jsonl``.

    Raises:
        DataError: it is missing, a line is no JSON object with an iteration, or iterations do not
            rise.
    """
    path = directory / METRICS
    lines: list[Line] = []
    for number, line in enumerate(read_text(path, DataError).split("\n"), start=1):
        if not line:
            continue
        try:
            value = json.loads(line)
            iteration = value["iteration"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise _no_metrics(path, number, line) from error  # TypeError: no object
        if type(iteration) is not int or not _has_readings(value):
            raise _no_metrics(path, number, line)
        if lines and iteration < lines[-1]["iteration"]:
            raise DataError(
                "iterations go backwards",
                where=f"{path}:{number}",
                expected=f"at least {lines[-1]['iteration']}",
                found=iteration,
            )
        lines.append(value)
    return lines


def _has_readings(line: Line) -> bool:
    """Whether what is read now and then, beside the steps, has its type, where it is there."""
    readings = [line.get(name) or {} for name in ("general", "probe")]
    if not all(isinstance(reading, dict) for reading in readings):
        return False
    general, probe = readings
    numbers = line.get("relative_l2"), *map(general.get, _GENERAL), probe.get("outside_mass")
    return all(number is None or is_number(number) for number in numbers)


def _no_metrics(path: Path, number: int, line: str) -> DataError:
    return DataError(
        "not a line of metrics",
        where=f"{path}:{number}",
        expected='a JSON object with "iteration"',
        found=line[:80],
        fix="The run was killed while it wrote: resume it, which mends the file",
    )


def read_resolved_config(path: Path) -> dict[str, dict[str, Any]]:
    """A run's resolved configuration, by section and name; values are scalars or lists of them.

    Raises:
        DataError: it is missing, or anything else.
    """
    try:
        config = yaml.safe_load(read_text(path, DataError))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"not YAML: {error}", where=path) from error
    if not (isinstance(config, dict) and all(map(_is_section, config.values()))):
        raise DataError(
            "not a resolved configuration",
            where=path,
            expected="a mapping of sections, each a mapping of settings",
        )
    return config


def _is_section(section: Any) -> bool:
    """Whether it has nothing nested: an alias within an alias could be beyond counting."""
    return isinstance(section, dict) and all(
        isinstance(name, str)
        and all(isinstance(x, _SCALARS) for x in (value if isinstance(value, list) else [value]))
        for name, value in section.items()
    )


def summarize_run(directory: Path) -> RunSummary:
    """Read a run's directory.

    Raises:
        DataError: the metrics or the configuration are missing or cannot be read.
    """
    config = directory / CONFIG
    if not config.exists():
        raise DataError("no such file: is this a run's directory?", where=config)
    warmup_iters = _warmup_iters(config)
    lines = read_lines_of_run(directory)
    steps = [line for line in lines if "loss" in line]
    if not steps:
        raise DataError("no training step is logged", where=directory / METRICS)
    of_one_loss = list(filter(OneLoss(), steps))
    judged = [
        step for step in of_one_loss if step.get("positions") != 0
    ]  # without a label: no loss
    losses, norms = _series(judged, "loss", directory), _series(judged, "grad_norm", directory)
    finite = np.isfinite(losses) & np.isfinite(norms)
    if not finite.any():
        raise DataError("no logged step is finite", where=directory / METRICS)
    tokens, seconds = _series(steps, "tokens", directory), _series(steps, "seconds", directory)
    _require_totals(directory, tokens=tokens, seconds=seconds)
    complete = steps[-1]["iteration"] == len(steps)
    losses, norms = losses[finite], norms[finite]
    iterations = np.array([step["iteration"] for step in judged])[finite]
    norms_after_warmup = norms[iterations > warmup_iters]
    loss_spikes, loss_spike_rate = _spikes(losses)
    gradient_spikes, gradient_spike_rate = _spikes(norms)
    general = _last(lines, "general") or {}
    return RunSummary(
        iterations=steps[-1]["iteration"],
        logged=len(steps),
        tokens=int(tokens.sum()) if complete else None,
        seconds=float(seconds.sum()) if complete else None,
        tokens_per_second=float(tokens.sum() / seconds.sum()),
        data_wait_share=_data_wait_share(steps, float(seconds.sum()), directory),
        full_loss_steps=len(steps) - len(of_one_loss),
        final_loss=float(losses[-max(1, len(losses) // 10) :].mean()),
        loss_std=loss_std(losses),
        loss_variance=loss_variance(losses),
        gradient_norm_cv=gradient_norm_cv(norms_after_warmup) if len(norms_after_warmup) else None,
        loss_spikes=loss_spikes,
        loss_spike_rate=loss_spike_rate,
        gradient_spikes=gradient_spikes,
        gradient_spike_rate=gradient_spike_rate,
        non_finite=int((~finite).sum()),
        relative_l2=_last(lines, "relative_l2"),
        general_perplexity=general.get("perplexity"),
        delta_ppl=general.get("delta_ppl"),
        probes=[line for line in lines if line.get("probe")],
        config=str(config),
    )


def _warmup_iters(config: Path) -> int:
    found = read_resolved_config(config).get("optimizer", {}).get(_WARMUP)
    if type(found) is not int:
        raise DataError(
            "the warm-up, which the gradient norm's CV leaves out, is not in it",
            where=config,
            expected=f"optimizer: {{{_WARMUP}: a number}}",
            found=found,
        )
    return found


def _data_wait_share(steps: list[Line], seconds: float, directory: Path) -> float | None:
    if not all("data_wait_seconds" in step for step in steps):
        return None
    return float(_series(steps, "data_wait_seconds", directory).sum()) / seconds


def _spikes(values: npt.NDArray[np.float64]) -> tuple[int | None, float | None]:
    """Count and rate."""
    found = spikes(values)
    return (found.count, found.rate) if found.judged else (None, None)


def _last(lines: list[Line], name: str) -> Any:
    return next((line[name] for line in reversed(lines) if name in line), None)


def _series(steps: list[Line], name: str, directory: Path) -> npt.NDArray[np.float64]:
    for step in steps:
        if name not in step:
            raise DataError(
                f"no {name!r} in the line of iteration {step['iteration']}",
                where=directory / METRICS,
            )
        value = step[name]  # a number that was not finite is logged as null
        if value is not None and not is_number(value):
            raise DataError(
                f"{name!r} is no number in the line of iteration {step['iteration']}",
                where=directory / METRICS,
                found=repr(value)[:60],
            )
    return np.array([np.nan if s[name] is None else s[name] for s in steps], dtype=np.float64)


def _require_totals(directory: Path, **series: npt.NDArray[np.float64]) -> None:
    """Raise DataError where a sum would be no number, or nothing to divide by."""
    for name, values in series.items():
        if not (np.isfinite(values).all() and values.min() >= 0 and values.sum() > 0):
            raise DataError(
                f"the lines' {name!r} have no sum", where=directory / METRICS, expected="numbers"
            )
