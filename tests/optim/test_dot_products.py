"""The sums that the angle is made of keep their precision."""

from __future__ import annotations

import pytest
import torch

from megatron_replay.optim.momentum_step import dot_products


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
