"""g' = a g + b m over all angles: the paper's lemmas, and the decomposition along and across m."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.optim.batch import cosine
from megatron_replay.optim.moclip import rotation_coefficients
from tests.optim.reference_rules import turned_gradient

OBTUSE = ["line", "zero"]
EVERYWHERE = settings(max_examples=100, deadline=None, derandomize=True, database=None)

angles_but_90 = st.one_of(st.floats(0.01, 89.99), st.floats(90.01, 179.99))
norms = st.floats(-6.0, 6.0).map(lambda exponent: 10.0**exponent)
seeds = st.integers(0, 2**31)


def pair(phi: float, m_norm: float, g_norm: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """m and g of these norms, ``phi`` degrees apart, in a random plane of six dimensions."""
    plane, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((6, 2)))
    radians = math.radians(phi)
    return m_norm * plane[:, 0], g_norm * plane @ [math.cos(radians), math.sin(radians)]


def dots(m: np.ndarray, g: np.ndarray, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.tensor(x, dtype=dtype) for x in (m @ g, m @ m, g @ g)]


def turn(
    m: np.ndarray,
    g: np.ndarray,
    max_angle: float,
    obtuse: str = "line",
    dtype: torch.dtype = torch.float64,
) -> np.ndarray:
    a, b = rotation_coefficients(*dots(m, g, dtype), max_angle=max_angle, obtuse=obtuse)
    return a.item() * g + b.item() * m


@pytest.mark.parametrize("obtuse", OBTUSE)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 5e-4)])
@EVERYWHERE
@given(angles_but_90, st.floats(10.0, 80.0), norms, norms, seeds)
def test_equals_the_explicit_decomposition(
    obtuse, dtype, tolerance, phi, limit, m_norm, g_norm, seed
):
    m, g = pair(phi, m_norm, g_norm, seed)
    expected = turned_gradient(g, m, limit, obtuse)
    found = turn(m, g, limit, obtuse, dtype)
    np.testing.assert_allclose(found, expected, atol=tolerance * g_norm, rtol=0)


@pytest.mark.parametrize("obtuse", OBTUSE)
@EVERYWHERE
@given(angles_but_90, st.floats(1.0, 89.0), seeds)
def test_lemma_2_and_descent(obtuse, phi, limit, seed):
    """g' is within max_angle of m, for ``line`` beyond 90 degrees of -m, and descends as g does."""
    m, g = pair(phi, 2.0, 3.0, seed)
    new = turn(m, g, limit, obtuse)
    # Written as a product, for g' = 0 is allowed.
    least = math.cos(math.radians(limit)) * np.linalg.norm(new) * np.linalg.norm(m)
    along = -(new @ m) if obtuse == "line" and phi > 90 else new @ m
    assert along >= least - 1e-9
    if obtuse == "line":
        assert new @ g > 0
    elif phi > 90:
        assert not new.any()


@pytest.mark.parametrize("obtuse", OBTUSE)
@pytest.mark.parametrize("limit", [1.0, 45.0, 89.0])
def test_continuous_where_clipping_begins_and_for_line_at_90_degrees(obtuse, limit):
    below, above = (turn(*pair(limit + d, 2.0, 3.0), limit, obtuse) for d in (-1e-7, 1e-7))
    np.testing.assert_allclose(below, above, atol=1e-6)
    m, g = pair(limit + 1e-7, 2.0, 3.0)
    assert rotation_coefficients(*dots(m, g), max_angle=limit, obtuse=obtuse)[1] != 0
    for d in (-1e-7, 0.0, 1e-7) if obtuse == "line" else ():
        # The part along m, 3 sin d, over cos(limit): the edge of the cone above it.
        reach = 3.0 * math.radians(2e-7) / math.cos(math.radians(limit))
        assert np.linalg.norm(turn(*pair(90 + d, 2.0, 3.0), limit)) <= reach


@pytest.mark.parametrize("obtuse", OBTUSE)
@pytest.mark.parametrize("limit", [1.0, 45.0, 90.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_changes_without_momentum_without_gradient_or_where_they_agree(
    obtuse, limit, dtype
):
    m, g = pair(60.0, 2.0, 3.0)
    for x, y in ((0 * m, g), (m, 0 * g), (0 * m, 0 * g), (m, 2 * m)):
        a, b = rotation_coefficients(*dots(x, y, dtype), max_angle=limit, obtuse=obtuse)
        assert (a.item(), b.item()) == (1.0, 0.0)
        assert cosine(*dots(x, y, dtype)).item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(("obtuse", "share"), [("line", 1.0), ("zero", 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_against_the_momentum(obtuse, share, dtype):
    m = np.array([3.0, 4.0])
    new = turn(m, -2 * m, 60.0, obtuse, dtype)
    np.testing.assert_allclose(new, share * -2 * m, rtol=1e-6, atol=1e-12)


@EVERYWHERE
@given(st.just(90.0) | angles_but_90, seeds)
def test_a_cap_of_90_degrees_changes_only_an_obtuse_gradient(phi, seed):
    m, g = pair(phi, 2.0, 3.0, seed)
    if phi == 90.0:
        m, g = np.array([1.0, 0.0]), np.array([0.0, 1.0])  # exactly
    for obtuse, expected in (("line", g - (g @ m) / (m @ m) * m), ("zero", 0 * g)):
        new = turn(m, g, 90.0, obtuse)
        if phi <= 90:
            np.testing.assert_array_equal(new, g)
        else:
            np.testing.assert_allclose(new, expected, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_norms_whose_squares_multiply_out_of_fp32_still_have_an_angle(scale):
    m, g = pair(120.0, scale, scale)
    assert cosine(*dots(m, g, torch.float32)).item() == pytest.approx(-0.5, rel=1e-5)
    expected = turned_gradient(g, m, 45.0, "line")
    found = turn(m, g, 45.0, "line", torch.float32)
    np.testing.assert_allclose(found, expected, atol=1e-5 * scale)
