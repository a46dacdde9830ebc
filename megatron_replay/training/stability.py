"""How steady a run is while it runs: spikes as they come, noise at intervals, two warnings.

The numbers are those of ``functional.stability``, over the logged steps. Both classes here are fed
one logged step at a time; fed the lines of an earlier ``metrics.jsonl`` first, they go on as if the
run had never stopped.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_replay.errors import DataError
from megatron_replay.functional import gradient_norm_cv, loss_std, loss_variance, spikes

#: ``functional.spikes``: steps that a step is judged by, and how far above them a spike lies.
_SPIKE_WINDOW, _SPIKE_SIGMAS = 128, 6.0
#: docs/method.md: logged steps that a warning averages over, and its two limits.
WATCHED_STEPS, OBTUSE_LIMIT, UPDATE_LIMIT = 50, 0.5, 0.02


@dataclass
class SpikeCounter:
    """``functional.spikes`` of a series that is still growing, at the cost of one window a step.

    Attributes:
        count: excursions so far; neighbours count once.
        judged: steps that had a full window before them.
    """

    window: int = _SPIKE_WINDOW
    count: int = 0
    judged: int = 0
    _recent: deque[float] = field(init=False, repr=False)
    _above: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        self._recent = deque(maxlen=self.window + 1)

    def observe(self, value: float) -> float | None:
        """Take the next value; the limit it exceeds, where it is the first of an excursion."""
        self._recent.append(value)
        if len(self._recent) <= self.window:
            return None
        recent = np.array(self._recent)
        was_above, self._above = self._above, bool(spikes(recent, window=self.window).count)
        self.judged += 1
        if was_above or not self._above:
            return None
        self.count += 1
        return float(recent[:-1].mean() + _SPIKE_SIGMAS * recent[:-1].std())

    def values(self, name: str) -> dict[str, float | None]:
        """Count and rate for the log; None while no step could be judged."""
        if not self.judged:
            return {f"{name}_spikes": None, f"{name}_spike_rate": None}
        return {f"{name}_spikes": self.count, f"{name}_spike_rate": self.count / self.judged}


class StabilityMonitor:
    """Loss and gradient norm of every logged step. Keeps two numbers a step: 16 MB for a million.

    Args:
        warmup_iters: iterations that the gradient norm's variation leaves out.

    Attributes:
        spiking: of the last step, the limit that a spike beginning with it exceeds, by "loss" and
            "gradient".
    """

    def __init__(self, *, warmup_iters: int) -> None:
        self.spiking: dict[str, float] = {}
        self._warmup_iters = warmup_iters
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._in_warmup = self._non_finite = 0
        self._spikes = {"loss": SpikeCounter(), "gradient": SpikeCounter()}

    def observe(self, iteration: int, loss: float | None, grad_norm: float | None) -> list[str]:
        """Take the next logged step; a line for each spike that begins with it.

        A step with a number that is not finite (None in the log) is counted, and left out of both.
        """
        self.spiking = {}
        if not _finite(loss) or not _finite(grad_norm):
            self._non_finite += 1
            return []
        assert loss is not None and grad_norm is not None  # noqa: PT018
        self._losses.append(loss)
        self._norms.append(grad_norm)
        self._in_warmup += iteration <= self._warmup_iters
        found = []
        for name, value in (("loss", loss), ("gradient", grad_norm)):
            limit = self._spikes[name].observe(value)
            if limit is not None:
                self.spiking[name] = limit
                found.append(
                    f"{'loss' if name == 'loss' else 'gradient norm'} spikes to {value:.4g}, above "
                    f"mean + {_SPIKE_SIGMAS:g} sigma = {limit:.4g} of the {_SPIKE_WINDOW} logged "
                    "steps before"
                )
        return found

    def values(self) -> dict[str, float | None]:
        """The numbers of all steps so far, for the log. O(steps); None where there is none yet."""
        return {
            "steps": len(self._losses),
            "non_finite": self._non_finite,
            "loss_std": _or_none(loss_std, self._losses),
            "loss_variance": _or_none(loss_variance, self._losses),
            "gradient_norm_cv": _or_none(gradient_norm_cv, self._norms[self._in_warmup :]),
            **self._spikes["loss"].values("loss"),
            **self._spikes["gradient"].values("gradient"),
        }

    def summary(self) -> str:
        """What to tell the user when training is done."""
        values, judged = self.values(), self._spikes["loss"].judged
        if not self._losses:
            return f"none of the {self._non_finite} logged steps was finite."
        last = self._losses[-max(1, len(self._losses) // 10) :]
        cv = values["gradient_norm_cv"]
        parts = [
            f"loss {np.mean(last):.4f} over the last tenth of {len(self._losses)} logged steps",
            f"std {values['loss_std']:.4f} about its own line over the last half",
            "no step after warm-up" if cv is None else f"gradient-norm CV {cv:.3f} after warm-up",
            f"{self._spikes['loss'].count} loss and {self._spikes['gradient'].count} gradient-norm "
            f"spikes in {judged} steps judged"
            if judged
            else f"too short to judge spikes, which takes more than {_SPIKE_WINDOW} logged steps",
            f"{self._non_finite} steps not finite",
        ]
        return ", ".join(parts) + "."


class AngleWatch:
    """Warns once when gradients work against the momentum, and once when hardly anything moves.

    Fed with what a step did to the weights (``StepResult.update``). A quantity is judged by its
    mean over the last ``WATCHED_STEPS`` steps that had it, never by fewer.
    """

    def __init__(self) -> None:
        self._rules: dict[str, tuple[Callable[[float], bool], Callable[[float], str]]] = {
            "obtuse": (lambda mean: mean > OBTUSE_LIMIT, _obtuse_warning),
            "update_rms_over_lr": (lambda mean: mean < UPDATE_LIMIT, _still_warning),
        }
        self._recent = {name: deque[float](maxlen=WATCHED_STEPS) for name in self._rules}
        self._said: set[str] = set()

    def observe(self, update: Mapping[str, float | None]) -> list[str]:
        """Take the next logged step's update; the warnings that it is the first to earn."""
        warnings = []
        for name, (is_bad, warning) in self._rules.items():
            value, recent = update.get(name), self._recent[name]
            if not _finite(value):
                continue
            recent.append(float(value))  # type: ignore[arg-type]
            mean = math.fsum(recent) / len(recent)
            if len(recent) == WATCHED_STEPS and name not in self._said and is_bad(mean):
                self._said.add(name)
                warnings.append(warning(mean))
        return warnings


def _obtuse_warning(share: float) -> str:
    return (
        f"the gradient pointed against the momentum in {100 * share:.0f} % of the last "
        f"{WATCHED_STEPS} logged steps: the steps undo each other, by noise or by overshooting. "
        "Raise --global-batch-size, or lower --lr if the loss swings"
    )


def _still_warning(ratio: float) -> str:
    return (
        f"the weights hardly move: the RMS of an update was {ratio:.2g} x lr over the last "
        f"{WATCHED_STEPS} logged steps, where AdamW's is about 0.2 to 1. The gradient is mostly "
        "noise, or is turned away. Raise --global-batch-size, --max-angle or --lr, and compare "
        "with an AdamW whose learning rate moves the weights as far"
    )


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _or_none(metric: Callable[[list[float]], float], series: list[float]) -> float | None:
    """None where the metric is not defined: no step yet, or a mean of 0."""
    try:
        return metric(series)
    except DataError:
        return None
