"""The compiled atan2 (csrc/cpu/atan2.h) is within 2 spacings of fp32, wherever it is asked."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.kernels import _cpu
from tests.kernels.levels import LEVELS
from tests.kernels.reference import ulps

ONE, INFINITY = 0x3F80_0000, 0x7F80_0000


def arctangent(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    out = np.empty_like(y)
    _cpu.arctangent(y.ctypes.data, x.ctypes.data, out.ctypes.data, out.size)
    return out


def worst(y: np.ndarray, x: np.ndarray) -> float:
    exact = np.arctan2(y.astype(np.float64), x.astype(np.float64))
    return ulps(arctangent(y, x).astype(np.float64), exact).max()


@pytest.mark.usefixtures("compiled")
def test_of_every_97th_ratio():
    """All 2^30 were tried once, at each level: atan2.h has the result."""
    q = np.arange(0, ONE, 97, dtype=np.uint32).view(np.float32)
    one = np.ones_like(q)
    assert worst(q, one) < 1.5
    assert worst(one, q) < 1.5


@pytest.mark.usefixtures("compiled")
def test_of_numbers_of_every_size():
    rng = np.random.default_rng(0)
    y = rng.integers(0, INFINITY, 1 << 20, dtype=np.uint32).view(np.float32)
    x = rng.integers(0, INFINITY, 1 << 20, dtype=np.uint32).view(np.float32)
    ratio = np.exp(3 * rng.standard_normal(1 << 20)).astype(np.float32)
    assert worst(np.where(y > 1, -y, y), x) < 2
    with np.errstate(over="ignore"):
        assert worst(x * ratio, x) < 2


numbers = st.floats(width=32, allow_nan=False)
finite = st.floats(width=32, min_value=0, allow_infinity=False)


@settings(derandomize=True, deadline=None, max_examples=300, database=None)
@given(st.lists(st.tuples(numbers, finite), min_size=1, max_size=40))
def test_of_whatever_hypothesis_finds(pairs):
    y, x = np.array(pairs, dtype=np.float32).T.copy()
    before = _cpu.level()
    for level in LEVELS[: LEVELS.index(before) + 1]:
        _cpu.use_level(level)
        assert worst(y, x) < 2
    _cpu.use_level(before)


@pytest.mark.usefixtures("compiled")
def test_at_the_corners_it_is_c_s():
    """Zeros of either sign, NaN, and a number beside an infinity; two infinities give NaN."""
    corners = [0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 3e38, -3e38, np.inf, -np.inf, np.nan]
    y, x = np.float32([(a, abs(b)) for a in corners for b in corners]).T.copy()
    found, expected = arctangent(y, x), np.arctan2(y, x)
    expected[np.isinf(y) & np.isinf(x)] = np.nan
    known = ~np.isnan(expected)
    assert np.array_equal(np.signbit(found[known]), np.signbit(expected[known]))
    np.testing.assert_allclose(found, expected, rtol=2.0**-22, atol=0, equal_nan=True)


def test_a_level_the_processor_lacks_is_refused():
    with pytest.raises(ValueError, match="no level sse9"):
        _cpu.use_level("sse9")


def test_ulps_are_counted_from_the_exact_value():
    """The yardstick itself: one bit up from pi/4 is one ulp, less what fp32 lost of pi/4."""
    (bits,) = struct.unpack("<I", struct.pack("<f", np.pi / 4))
    above = np.uint32([bits + 1]).view(np.float32).astype(np.float64)
    assert ulps(above, np.float64([np.pi / 4]))[0] == pytest.approx(1, abs=0.5)
