"""How steady a run was: loss, gradient norm, spikes.

Pure functions of numbers, in float64. Shape: N steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_replay.errors import DataError

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Spikes:
    """Excursions of a series.

    Attributes:
        indices: first step of each excursion, counted from 0, ascending.
        judged: steps that had a full window before them; 0 spikes of 0 judged says nothing.
    """

    indices: tuple[int, ...]
    judged: int

    @property
    def count(self) -> int:
        """Number of excursions."""
        return len(self.indices)

    @property
    def rate(self) -> float:
        """Excursions per judged step; 0 if none was judged."""
        return self.count / self.judged if self.judged else 0.0


def loss_variance(losses_N: npt.ArrayLike) -> float:
    """Variance of the loss about its own straight line, over the last half of the steps.

    mean((L - a - b·t)²) with a, b by least squares: progress is not counted as noise. Divides by
    the number of steps; 0 for one or two of them, through which a line passes exactly.

    Raises:
        DataError: no step, or a value that is not finite.
    """
    losses = _series(losses_N, "losses")
    last_half = losses[len(losses) // 2 :]
    deviation = last_half - last_half.mean()
    steps = np.arange(len(last_half)) - (len(last_half) - 1) / 2
    if len(last_half) > 1:
        deviation -= steps * (steps @ deviation) / (steps @ steps)
    return float(np.mean(deviation**2)) if len(last_half) > 2 else 0.0


def loss_std(losses_N: npt.ArrayLike) -> float:
    """Square root of ``loss_variance``: in nats. The paper gives one number under both names."""
    return math.sqrt(loss_variance(losses_N))


def gradient_norm_cv(norms_N: npt.ArrayLike, *, warmup_steps: int = 0) -> float:
    """Coefficient of variation std/mean of the gradient norm before clipping, after warm-up.

    Raises:
        DataError: no step is left after warm-up, a value is not finite, or the mean is 0.
    """
    norms = _series(norms_N, "gradient norms")
    if not 0 <= warmup_steps < len(norms):
        raise DataError(
            "no step is left after warm-up",
            where="gradient norms",
            expected=f"warmup_steps of 0 to {len(norms) - 1}",
            found=warmup_steps,
        )
    after = norms[warmup_steps:]
    mean = after.mean()
    if mean == 0.0:
        raise DataError("the mean is 0: std/mean is undefined", where="gradient norms")
    return float(after.std() / mean)


def spikes(values_N: npt.ArrayLike, *, window: int = 128, sigmas: float = 6.0) -> Spikes:
    """Steps above mean + ``sigmas``·σ of the ``window`` values before; neighbours count once.

    A step with fewer values before it is not judged: σ of a handful of values is no scale.

    Raises:
        DataError: no step, or a value that is not finite.
    """
    values = _series(values_N, "values")
    judged = max(0, len(values) - window)
    if judged == 0:
        return Spikes((), 0)
    before = np.lib.stride_tricks.sliding_window_view(values, window)[:-1]
    hit = values[window:] > before.mean(1) + sigmas * before.std(1)
    first = hit & ~np.concatenate([[False], hit[:-1]])
    return Spikes(tuple(int(i) + window for i in np.flatnonzero(first)), judged)


def _series(values: npt.ArrayLike, name: str) -> _Array:
    series: _Array = np.asarray(values, np.float64)
    if series.ndim != 1 or len(series) == 0:
        raise DataError(
            "expected a series of numbers", where=name, found=f"an array of shape {series.shape}"
        )
    bad = np.flatnonzero(~np.isfinite(series))
    if len(bad):
        raise DataError("a value is not finite", where=f"{name}[{bad[0]}]", found=series[bad[0]])
    return series
