"""MoClip a second time, from its geometry alone: explicit vectors in float64, no (a, b)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Vector = np.ndarray


def turned_gradient(g: Vector, m: Vector, max_angle: float, obtuse: str) -> Vector:
    """g' by decomposing g along and across m."""
    if not m.any() or not g.any():
        return g.copy()
    axis = m / np.linalg.norm(m)
    parallel = (g @ axis) * axis
    perpendicular = g - parallel
    along, across = g @ axis, np.linalg.norm(perpendicular)
    if across < 1e-12 * np.linalg.norm(g):  # rounding of a vector on the axis
        across, perpendicular = 0.0, np.zeros_like(g)
    if math.degrees(math.atan2(across, along)) <= max_angle:
        return g.copy()
    if obtuse == "zero" and along < 0:
        return np.zeros_like(g)
    side = perpendicular / across if across > 0 else perpendicular
    limit = math.radians(max_angle)
    if max_angle == 90:
        return perpendicular
    shortened = min(across, math.tan(limit) * abs(along)) * side
    return shortened + parallel


def run(
    start: Vector,
    gradients: list[Vector],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    max_angle: float = 45.0,
    obtuse: str = "line",
) -> dict[str, Any]:
    """All steps on one flat vector; the parameters, m and v after the last."""
    theta, (beta1, beta2) = start.copy(), betas
    m, v, dropped = np.zeros_like(theta), np.zeros_like(theta), 0
    for step, g in enumerate(gradients, start=1):
        new = turned_gradient(g, m, max_angle, obtuse)
        if obtuse == "zero" and m @ g < 0:
            dropped += 1
            if dropped > 3:
                new, dropped = g, 0
        else:
            dropped = 0
        m = beta1 * m + (1 - beta1) * new
        v = beta2 * v + (1 - beta2) * g**2
        m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
        theta = (1 - lr * weight_decay) * theta
        theta = theta - lr * np.arctan2(m_hat, np.sqrt(v_hat))
    return {"param": theta, "exp_avg": m, "exp_avg_sq": v}
