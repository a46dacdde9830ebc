"""The sums that the angle is made of keep their precision; and one reading against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.functional.momentum_step import dot_products
from megatron_replay.optim.angle import rotation_coefficients


def test_dot_products_of_large_tensors_keep_their_precision() -> None:
    """One BLAS call over these is 1e-2 off: small terms vanish beside a large fp32 sum."""
    m = torch.full((1 << 24,), 0.1)
    expected = (1 << 24) * float(m[0]) ** 2
    for value in dot_products([m], [m])[0].tolist():
        assert value == pytest.approx(expected, rel=1e-4)


def test_dot_products_of_any_strides() -> None:
    m, g = torch.randn(6, 4, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64).T
    expected = [(m * g).sum(), (m * m).sum(), (g * g).sum()]
    torch.testing.assert_close(dot_products([m], [g])[0], torch.stack(expected))


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(st.floats(0, 180), st.floats(1, 89))
def test_project_is_the_nearest_point_of_the_cone(phi: float, cap: float) -> None:
    def at(degrees: float, length: float = 1.0) -> np.ndarray:
        return length * np.array([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])

    m, g = at(0), at(phi)
    sums = [torch.tensor(x, dtype=torch.float64) for x in (m @ g, m @ m, g @ g)]
    a, b = rotation_coefficients(*sums, max_angle=cap, obtuse="project")
    nearest = np.linalg.norm(g - (a.item() * g + b.item() * m))
    for degrees in np.linspace(-cap, cap, 9):
        for length in np.linspace(0, 2, 9):
            assert nearest <= np.linalg.norm(g - at(degrees, length)) + 1e-9
