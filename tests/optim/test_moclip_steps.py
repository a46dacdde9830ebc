"""MoClip's steps against an independent float64 implementation, and as an optimizer of torch's."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.optim import MoClip
from tests.optim import geometry
from tests.optim.loop import assert_same_state, flat, gradients, parameters, states, take_steps

OBTUSE = ["line", "zero"]


@pytest.mark.parametrize("obtuse", OBTUSE)
@pytest.mark.parametrize("max_angle", [30.0, 90.0])
def test_twenty_steps_equal_the_independent_implementation(obtuse, max_angle):
    settings_ = {
        "lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.1, "max_angle": max_angle,
        "obtuse": obtuse,
    }  # fmt: skip
    params, rows = parameters(), gradients(20)
    expected = geometry.run(flat(params), [flat(row) for row in rows], **settings_)
    optimizer = MoClip(params, **settings_)
    take_steps(optimizer, params, rows)
    np.testing.assert_allclose(flat(params), expected["param"], rtol=1e-9, atol=1e-11)
    for key in ("exp_avg", "exp_avg_sq"):
        np.testing.assert_allclose(
            flat(states(optimizer, key)), expected[key], rtol=1e-9, atol=1e-11
        )


def test_fp32_stays_near_the_independent_implementation():
    params, rows = parameters(torch.float32), gradients(20)
    expected = geometry.run(flat(params), [flat(row) for row in rows], lr=0.05)
    take_steps(MoClip(params, lr=0.05), params, rows)
    np.testing.assert_allclose(flat(params), expected["param"], rtol=1e-5, atol=1e-6)


def test_the_gradients_of_these_tests_are_clipped_and_obtuse_now_and_then():
    params, seen = parameters(), []
    optimizer = MoClip(params, lr=0.05, betas=(0.8, 0.95), max_angle=30.0)
    for row in gradients(20):
        take_steps(optimizer, params, [row])
        seen.append(optimizer.report())
    assert {s["clipped"] for s in seen} == {0.0, 1.0}
    assert {s["obtuse"] for s in seen} == {0.0, 1.0}


def test_tensor_scope_is_one_run_for_each_tensor():
    params, rows = parameters(), gradients(10)
    expected = [
        geometry.run(flat([p]), [flat([row[i]]) for row in rows], lr=0.05)["param"]
        for i, p in enumerate(params)
    ]
    take_steps(MoClip(params, lr=0.05, angle_scope="tensor"), params, rows)
    np.testing.assert_allclose(flat(params), np.concatenate(expected), rtol=1e-9, atol=1e-11)


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
    assert moclip.last_angle.clipped.item() is False
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


@pytest.mark.parametrize("obtuse", OBTUSE)
def test_a_one_dimensional_quadratic_is_descended(obtuse):
    param = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = MoClip([param], lr=0.02, obtuse=obtuse)
    for _ in range(400):
        optimizer.zero_grad()
        (0.5 * param.square().sum()).backward()
        optimizer.step()
    assert param.abs().item() < 0.1


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


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_a_step_with_a_non_finite_gradient_changes_nothing_and_says_so(bad, scope):
    params, rows = parameters(), gradients(3)
    optimizer = MoClip(params, lr=0.1, weight_decay=0.1, angle_scope=scope)
    take_steps(optimizer, params, rows[:2])
    before, kept = flat(params), copy.deepcopy(optimizer.state_dict())
    rows[2][1][0] = bad
    with pytest.warns(UserWarning, match=r"not finite, step skipped \(1 so far\)"):
        take_steps(optimizer, params, rows[2:])
    np.testing.assert_array_equal(flat(params), before)
    assert_same_state(optimizer.state_dict(), kept)
    assert optimizer.skipped_steps == 1
    assert optimizer.last_angle is None
    take_steps(optimizer, params, rows[:1])  # and goes on
    assert optimizer.skipped_steps == 1
    assert np.isfinite(flat(params)).all()


def test_every_skipped_step_warns_even_under_pythons_default_filter():
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = MoClip([param], lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        for _ in range(3):
            param.grad = torch.full((2,), math.nan)
            optimizer.step()
    assert len(caught) == 3
