"""The equations of optim/momentum_step.py in float64 numpy, written from the docstring."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_replay.optim.momentum_step import Coefficients

#: fp32's relative spacing, and its smallest number.
EPS, TINY = 2.0**-23, 2.0**-149


@dataclass
class Problem:
    """The parts of each tensor's step, and its bf16 copies."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    copies: list[Tensor]

    def step_with(self, kernels, coefficients, *, bounded, copies=True) -> Tensor:
        return kernels.momentum_step(
            self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, coefficients,
            bounded=bounded, copies=self.copies if copies else None,
        )  # fmt: skip

    def lists(self) -> list[list[Tensor]]:
        return [self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.copies]

    def parts(self) -> Iterable[Tensor]:
        for part in self.lists():
            yield from part

    def clone(self) -> Problem:
        return Problem(*([tensor.clone() for tensor in part] for part in self.lists()))


def problem(sizes: list[int], *, seed: int = 0) -> Problem:
    rng = np.random.default_rng(seed)

    def normal(size: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(size).astype(np.float32))

    params, grads, exp_avgs = ([normal(size) for size in sizes] for _ in range(3))
    exp_avg_sqs = [normal(size).square_() for size in sizes]
    return Problem(params, grads, exp_avgs, exp_avg_sqs, [param.bfloat16() for param in params])


def check_step(before: Problem, after: Problem, rows: list[Coefficients], *, bounded: bool) -> None:
    """Every number is as near as its operations in fp32 allow: a few times EPS of their terms."""
    for i, c in enumerate(rows):
        p, g, m, v = (
            part[i].double().numpy()
            for part in (before.params, before.grads, before.exp_avgs, before.exp_avg_sqs)
        )
        new_p, new_m, new_v = (
            part[i].double().numpy() for part in (after.params, after.exp_avgs, after.exp_avg_sqs)
        )
        near(new_m, c.keep_m * m + c.take_g * g, abs(c.keep_m * m) + abs(c.take_g * g))
        near(new_v, *[c.keep_v * v + c.take_v * (c.clip * g) ** 2] * 2)
        u = update(new_m, new_v, c, bounded=bounded)
        near(new_p, c.decay * p - c.move * u, abs(c.decay * p) + abs(c.move * u))
        assert torch.equal(after.copies[i], after.params[i].bfloat16())


def update(m: np.ndarray, v: np.ndarray, c: Coefficients, *, bounded: bool) -> np.ndarray:
    root = c.scale_v * np.sqrt(v)
    return np.arctan2(m, root) if bounded else m / (root + c.eps)


def near(found: np.ndarray, expected: np.ndarray, terms: np.ndarray) -> None:
    assert np.all(abs(found - expected) <= 4 * EPS * terms + 4 * TINY)


def ulps(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """How far fp32 numbers are from float64 ones, in spacings of fp32 at the latter."""
    return abs(found - expected) / np.spacing(abs(expected).astype(np.float32)).astype(np.float64)


def bits(tensor: Tensor) -> Tensor:
    """As integers: NaN equals itself, and -0 is not 0."""
    return tensor.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()])
