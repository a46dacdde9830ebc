"""The k-th largest magnitude, digit by digit, against sorting."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.optim.mofo import kth_largest_magnitudes

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@PROPERTY
@given(data=st.data())
def test_equals_sorting(dtype, data):
    width = 32 if dtype == torch.float32 else 64
    numbers = st.floats(width=width, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0])
    tensors = data.draw(
        st.lists(st.lists(numbers, min_size=1, max_size=40), min_size=1, max_size=4)
    )
    ranks = [data.draw(st.integers(1, len(t))) for t in tensors]
    parts = []
    for tensor in tensors:
        cut = data.draw(st.integers(0, len(tensor)))
        whole = torch.tensor(tensor, dtype=dtype)
        parts.append([whole[:cut], whole[cut:]])
    found = kth_largest_magnitudes(parts, ranks)
    expected = [np.sort(np.abs(np.array(t)))[-k] for t, k in zip(tensors, ranks, strict=True)]
    assert found.tolist() == expected


def test_ranks_far_apart_in_one_call():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    ordered = x.abs().sort(descending=True).values
    found = kth_largest_magnitudes([[x], [x], [x]], [1, 20_000, 100_000])
    assert torch.equal(found, ordered[[0, 19_999, 99_999]])


def test_nothing_to_look_at():
    assert kth_largest_magnitudes([], []).tolist() == []
