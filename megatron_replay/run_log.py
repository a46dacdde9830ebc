"""Reads what a training run logged: the lines of ``metrics.jsonl``, and their summary."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_replay.errors import DataError, OutputError, ReplayError
from megatron_replay.files import is_number, open_regular

METRICS, CONFIG = "metrics.jsonl", "resolved_config.yaml"
Line = dict[str, Any]
#: The numbers of the last ``stability`` reading that a summary has under the same names.
_STABILITY = (
    "loss_std", "loss_variance", "gradient_norm_cv", "loss_spikes", "loss_spike_rate",
    "gradient_spikes", "gradient_spike_rate", "non_finite",
)  # fmt: skip
#: Readings that are not steps, and their numbers.
_READINGS = {
    "general": ("perplexity", "delta_ppl"), "probe": ("outside_mass",), "stability": _STABILITY,
    "update": (),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """The cost and the steadiness of one run; None for what was not logged."""

    iterations: int  # the last one logged
    logged: int  # iterations that have a line: tokens and seconds are None unless all have one
    tokens: int | None
    computed_share: float | None  # of the tokens, where documents share prefixes
    seconds: float | None  # in training steps
    tokens_per_second: float  # over the logged iterations
    data_wait_share: float | None  # of the steps' time
    final_loss: float  # the mean of the last tenth of the logged losses
    # Of the last ``stability`` reading, which covers all steps before it.
    loss_std: float | None
    loss_variance: float | None
    gradient_norm_cv: float | None
    loss_spikes: int | None
    loss_spike_rate: float | None
    gradient_spikes: int | None
    gradient_spike_rate: float | None
    non_finite: int | None
    relative_l2: float | None  # the weights' distance from their start, at the last reading
    general_perplexity: float | None  # of the run's sample of general text, at the last reading
    delta_ppl: float | None  # the same less that of the weights the run started from
    probes: list[Line]  # the lines of the run's own probe, in order
    outside_mass: float | None  # outside the candidate sets, at the last probe
    config: str  # the file of the run's resolved configuration


def read_metrics(path: Path, error: type[ReplayError] = OutputError) -> list[Line]:
    """The lines of a ``metrics.jsonl``; an incomplete last line, left by a kill, is dropped.

    Raises:
        ReplayError: of class ``error``: the file cannot be read, or a line is damaged.
    """
    return [value for _, value in read_raw_lines(path, error)]


def read_raw_lines(path: Path, error: type[ReplayError] = OutputError) -> list[tuple[bytes, Line]]:
    """Each line's bytes in the file, and its object; see `read_metrics`."""
    with open_regular(path, error) as handle:
        lines = handle.read().splitlines(keepends=True)
    found: list[tuple[bytes, Line]] = []
    for number, line in enumerate(lines, start=1):
        value, least = _parsed(line), found[-1][1]["iteration"] if found else 0
        if value is not None and value["iteration"] >= least:
            found.append((line, value))
        elif number < len(lines) or line.endswith(b"\n"):
            raise error(
                "damaged: not a line of metrics",
                where=f"{path}:{number}",
                expected=f'{{"iteration": {least} or more, ...}} with numbers',
                found=line[:60].decode(errors="replace"),
                fix="Remove that line, then rerun the same command",
            )
    return found


def _parsed(line: bytes) -> Line | None:
    """A line's object; None where the line has none, or a value of another type."""
    try:
        value = json.loads(line)
        is_sound = type(value["iteration"]) is int
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    readings = {name: value.get(name) or {} for name in _READINGS}
    if not is_sound or not all(isinstance(reading, dict) for reading in readings.values()):
        return None
    numbers = [value.get("relative_l2"), *readings["update"].values()]
    numbers += [readings[name].get(key) for name, keys in _READINGS.items() for key in keys]
    required = [value.get("data_wait_seconds", 0), value.get("computed_tokens", 0)]
    if "loss" in value:
        numbers += [value["loss"], value.get("grad_norm")]
        required += [value.get("seconds"), value.get("positions")]
    if "general" in value and not {"perplexity", "sample"} <= readings["general"].keys():
        return None
    numbers = [number for number in numbers if number is not None]
    return value if all(map(is_number, numbers + required)) else None


def summarize_run(directory: Path) -> RunSummary:
    """Read a run's directory.

    Raises:
        DataError: the metrics or the configuration are missing or cannot be read.
    """
    path, config = directory / METRICS, directory / CONFIG
    if not config.exists():
        raise DataError("no such file; this may not be a run's directory", where=config)
    lines = read_metrics(path, DataError)
    steps = [line for line in lines if "loss" in line]
    if not steps:
        raise DataError("no training step was logged", where=path)
    # A step without a label has no loss.
    losses = [s["loss"] for s in steps if s["positions"] != 0 and s["loss"] is not None]
    if not losses:
        raise DataError("no logged step has a finite loss", where=path)
    last = losses[-max(1, len(losses) // 10) :]
    tokens, seconds = (_total(steps, name, path) for name in ("tokens", "seconds"))
    is_complete = steps[-1]["iteration"] == len(steps)
    waits: list[Any] = [step.get("data_wait_seconds") for step in steps]
    computed: list[Any] = [step.get("computed_tokens") for step in steps]
    general, stability = _last(lines, "general") or {}, _last(lines, "stability") or {}
    return RunSummary(
        iterations=steps[-1]["iteration"],
        logged=len(steps),
        tokens=int(tokens) if is_complete else None,
        computed_share=None if None in computed else sum(computed) / tokens,
        seconds=seconds if is_complete else None,
        tokens_per_second=tokens / seconds,
        data_wait_share=None if None in waits else math.fsum(waits) / seconds,
        final_loss=math.fsum(last) / len(last),
        relative_l2=_last(lines, "relative_l2"),
        general_perplexity=general.get("perplexity"),
        delta_ppl=general.get("delta_ppl"),
        probes=[line for line in lines if line.get("probe")],
        outside_mass=(_last(lines, "probe") or {}).get("outside_mass"),
        config=str(config),
        **{name: stability.get(name) for name in _STABILITY},
    )


def _last(lines: list[Line], name: str) -> Any:
    return next((line[name] for line in reversed(lines) if name in line), None)


def _total(steps: list[Line], name: str, path: Path) -> float:
    """The sum of a number over all steps."""
    values: list[Any] = [step.get(name) for step in steps]
    if not all(is_number(value) and 0 <= value < math.inf for value in values) or not any(values):
        raise DataError(f"the lines' {name!r} have no sum", where=path, expected="positive numbers")
    return math.fsum(values)
