"""MoClip a second time, from its geometry alone: explicit vectors in float64, no (a, b)."""

from __future__ import annotations

import math

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
