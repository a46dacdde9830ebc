"""Twenty steps of MoClip against numpy in float64: whole vectors, split along and across m."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron_replay.optim import MoClip
from megatron_replay.optim.angle import READINGS
from tests.optim.training import parameters, take_step

Vector = NDArray[np.float64]


def turned_gradient(g: Vector, m: Vector, max_angle: float, obtuse: str) -> Vector:
    """g' from g's components along and across m, up to 89 degrees."""
    if not m.any() or not g.any():
        return g
    unit = m / np.linalg.norm(m)
    along, limit = g @ unit, np.radians(max_angle)
    perpendicular = g - along * unit
    across = np.linalg.norm(perpendicular)
    if np.arctan2(across, along) <= limit:
        return g
    if obtuse in ("project", "rotate"):
        edge = np.cos(limit) * unit + np.sin(limit) * perpendicular / across
        return edge * (np.linalg.norm(g) if obtuse == "rotate" else max(0.0, g @ edge))
    if obtuse == "zero" and along < 0:
        return np.zeros_like(g)
    shortened = perpendicular * min(1.0, np.tan(limit) * abs(along) / across)
    return unit * (abs(along) if obtuse == "reflect" else along) + shortened


@dataclass
class Reference:
    """The update over a list of flat parameters, each with its own lr and weight decay."""

    params: list[Vector]
    lrs: list[float]
    weight_decays: list[float]
    beta1: float
    beta2: float
    max_angle: float
    obtuse: str
    angle_scope: str
    second_moment: str
    atan_a: float
    atan_b: float
    t: int = 0

    def __post_init__(self) -> None:
        self.m = [np.zeros_like(p) for p in self.params]
        self.v = [np.zeros_like(p) for p in self.params]

    def turned(self, grads: list[Vector]) -> list[Vector]:
        if self.angle_scope == "tensor":
            return [
                turned_gradient(g, m, self.max_angle, self.obtuse)
                for g, m in zip(grads, self.m, strict=True)
            ]
        whole = turned_gradient(
            np.concatenate(grads), np.concatenate(self.m), self.max_angle, self.obtuse
        )
        return np.split(whole, np.cumsum([g.size for g in grads])[:-1])

    def step(self, grads: list[Vector]) -> None:
        self.t += 1
        for i, (g, turned) in enumerate(zip(grads, self.turned(grads), strict=True)):
            h = g if self.second_moment == "raw" else turned
            self.m[i] = self.beta1 * self.m[i] + (1 - self.beta1) * turned
            self.v[i] = self.beta2 * self.v[i] + (1 - self.beta2) * h**2
            m_hat = self.m[i] / (1 - self.beta1**self.t)
            v_hat = self.v[i] / (1 - self.beta2**self.t)
            update = self.atan_a * np.arctan2(m_hat, self.atan_b * np.sqrt(v_hat))
            decayed = (1 - self.lrs[i] * self.weight_decays[i]) * self.params[i]
            self.params[i] = decayed - self.lrs[i] * update


@pytest.mark.parametrize(
    ("obtuse", "scope", "second_moment"),
    [
        (obtuse, scope, second_moment)
        for obtuse, scope, second_moment in itertools.product(
            READINGS, ("model", "tensor"), ("raw", "clipped")
        )
        if not (obtuse == "zero" and scope == "tensor")
    ],
)
def test_twenty_steps_equal_the_reference(obtuse: str, scope: str, second_moment: str) -> None:
    chosen: dict[str, Any] = {
        "max_angle": 60.0, "obtuse": obtuse, "angle_scope": scope, "second_moment": second_moment,
        "atan_a": 1.27, "atan_b": 0.8,
    }  # fmt: skip
    params = parameters()
    groups = [
        {"params": params[:1], "lr": 0.02, "weight_decay": 0.3},
        {"params": params[1:], "weight_decay": 0.1},
    ]
    optimizer = MoClip(groups, lr=0.05, betas=(0.8, 0.95), obtuse_patience=99, **chosen)
    reference = Reference(
        [p.detach().numpy().ravel().copy() for p in params],
        lrs=[0.02, 0.05, 0.05], weight_decays=[0.3, 0.1, 0.1], beta1=0.8, beta2=0.95, **chosen,
    )  # fmt: skip
    clipped, obtuse_steps = 0, 0
    for seed in range(1, 21):
        take_step(optimizer, params, seed, scale=(-1.0) ** (seed // 5))
        reference.step([p.grad.numpy().ravel() for p in params])
        assert optimizer.last_angle is not None
        clipped += int(optimizer.last_angle.clipped.sum())
        obtuse_steps += int(optimizer.last_angle.obtuse.sum())
        for param, expected in zip(params, reference.params, strict=True):
            np.testing.assert_allclose(param.detach().numpy().ravel(), expected, rtol=0, atol=1e-12)
    assert clipped > 5  # the comparison saw clipping, and gradients against the momentum
    assert obtuse_steps > 2


def test_fp32_follows_fp64() -> None:
    trained = []
    for dtype in (torch.float32, torch.float64):
        params = parameters(dtype)
        optimizer = MoClip(params, lr=0.05)
        for seed in range(1, 21):
            take_step(optimizer, params, seed)
        trained.append([p.double() for p in params])
    for single, double in zip(*trained, strict=True):
        torch.testing.assert_close(single, double, rtol=0, atol=5e-6)
