"""MoClip's steps against an independent float64 implementation, and as an optimizer of torch's."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.optim import MoClip
from tests.optim.loop import flat, gradients, parameters, states, take_steps

OBTUSE = ["line", "zero"]


def test_the_gradients_of_these_tests_are_clipped_and_obtuse_now_and_then():
    params, seen = parameters(), []
    optimizer = MoClip(params, lr=0.05, betas=(0.8, 0.95), max_angle=30.0)
    for row in gradients(20):
        take_steps(optimizer, params, [row])
        seen.append(optimizer.report())
    assert {s["clipped"] for s in seen} == {0.0, 1.0}
    assert {s["obtuse"] for s in seen} == {0.0, 1.0}


def test_an_unclipped_step_of_small_momentum_is_adamws_without_epsilon():
    """atan(x) is x (1 - O(x^2)): where m is 1e-4 of sqrt(v), MoClip's step is m / sqrt(v)."""
    ours, theirs = parameters(), parameters()
    moclip = MoClip(ours, lr=0.01, weight_decay=0.1)
    adamw = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1, eps=0.0)
    for params, optimizer in ((ours, moclip), (theirs, adamw)):
        take_steps(optimizer, params, gradients(1))
        for param in params:
            optimizer.state[param]["exp_avg_sq"].mul_(1e8)
            param.data.copy_(torch.ones(param.shape))
        take_steps(optimizer, params, gradients(1))
    assert moclip.report()["clipped"] == 0
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(states(moclip, key), states(adamw, key), rtol=1e-12, atol=0)
    moved, expected = (flat(params) - (1 - 0.001) for params in (ours, theirs))
    assert (abs(expected) > 0).all()
    np.testing.assert_allclose(moved, expected, rtol=1e-7)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4), min_size=1, max_size=6),
    st.sampled_from(OBTUSE),
    st.floats(1e-6, 1.0),
)
def test_lemma_3_no_coordinate_moves_further_than_lr_half_pi(rows, obtuse, lr):
    param = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = MoClip([param], lr=lr, obtuse=obtuse)
    for row in rows:
        before = param.detach().clone()
        param.grad = torch.tensor(row, dtype=torch.float64)
        optimizer.step()
        assert (param - before).abs().max() <= lr * math.pi / 2 * (1 + 1e-9)


def test_zero_gradient_moves_nothing_but_the_decay():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = MoClip([param], lr=0.1, weight_decay=0.5)
    for _ in range(2):  # atan2(0, 0) = 0
        param.grad = torch.zeros(3)
        optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((3,), 0.95**2))


def test_zero_drops_at_most_three_obtuse_gradients_in_a_row():
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = MoClip([param], lr=0.01, betas=(0.99, 0.999), obtuse="zero")
    kept = []
    for grad in [1.0] + [-1.0] * 7:
        before = optimizer.state[param]["exp_avg"].clone() if optimizer.state[param] else 0.0
        param.grad = torch.tensor([grad])
        optimizer.step()
        kept.append((optimizer.state[param]["exp_avg"] - 0.99 * before).abs().item() > 1e-4)
    assert kept == [True, False, False, False, True, True, True, True]
    # After the first pass m is below zero, so that the gradient is acute again.


def test_every_skipped_step_warns_even_under_pythons_default_filter():
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = MoClip([param], lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        for _ in range(3):
            param.grad = torch.full((2,), math.nan)
            optimizer.step()
    assert len(caught) == 3
