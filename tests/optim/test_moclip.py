"""MoClip's steps by hand, and MoClip where AdamW would stand."""

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
from tests.optim.loop import flat, gradients, parameters, states, take_steps


def test_the_gradients_of_these_tests_are_clipped_and_obtuse_now_and_then():
    params, seen = parameters(), []
    optimizer = MoClip(params, lr=0.05, betas=(0.8, 0.95), max_angle=30.0)
    for row in gradients(12):
        take_steps(optimizer, params, [row])
        seen.append(optimizer.report())
    assert {s["clipped"] for s in seen} == {s["obtuse"] for s in seen} == {0.0, 1.0}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4), min_size=1, max_size=6),
    st.sampled_from(["line", "zero"]),
    st.floats(1e-6, 1.0),
)
def test_lemma_3_no_coordinate_moves_further_than_lr_half_pi(rows, obtuse, lr):
    param = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = MoClip([param], lr=lr, obtuse=obtuse)
    for row in rows:
        before = param.detach().clone()
        take_steps(optimizer, [param], [{"": np.array(row)}])
        assert (param - before).abs().max() <= lr * math.pi / 2 * (1 + 1e-9)


def test_zero_gradient_moves_nothing_but_the_decay():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = MoClip([param], lr=0.1, weight_decay=0.5)
    take_steps(optimizer, [param], [{"": np.zeros(3)}] * 2)  # atan2(0, 0) = 0
    torch.testing.assert_close(param.detach(), torch.full((3,), 0.95**2))


@pytest.mark.parametrize("reload", [False, True])
def test_zero_drops_at_most_three_obtuse_gradients_in_a_row(reload):
    """After the first pass m is below zero, so that the gradient is acute again."""
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer, kept = MoClip([param], lr=0.01, betas=(0.99, 0.999), obtuse="zero"), []
    for grad in [1.0] + [-1.0] * 7:
        if reload:  # the count of dropped gradients is in the checkpoint
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = MoClip([param], lr=0.01, obtuse="zero")
            optimizer.load_state_dict(state)
        before = optimizer.state[param]["exp_avg"].clone() if optimizer.state[param] else 0.0
        take_steps(optimizer, [param], [{"": np.array([grad])}])
        kept.append((optimizer.state[param]["exp_avg"] - 0.99 * before).abs().item() > 1e-4)
    assert kept == [True, False, False, False, True, True, True, True]


def test_the_report_says_what_the_step_did():
    param = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = MoClip([param], lr=0.1, betas=(0.5, 0.5), max_angle=45.0)
    take_steps(optimizer, [param], [{"": np.array([4.0, 0.0])}])
    first = optimizer.report()
    assert (first["degrees"], first["clipped"], first["momentum_over_grad_norm"]) == (0, 0, 0)
    take_steps(optimizer, [param], [{"": np.array([-3.0, 3 * math.sqrt(3)])}])  # m = (2, 0)
    # g' = (-3, 3); m_hat = (-2/3, 2), v_hat = (34/3, 18).
    u = [math.atan2(-2 / 3, math.sqrt(34 / 3)), math.atan2(2, math.sqrt(18))]
    assert optimizer.report() == pytest.approx(
        {
            "degrees": 120.0, "cosine": -0.5, "a": 1 / math.sqrt(3),
            "b": -6 * (1 - 1 / math.sqrt(3)) / 4, "clipped": 1.0, "obtuse": 1.0,
            "grad_norm": 6.0, "clipped_grad_norm": 6.0, "momentum_over_grad_norm": 1 / 3,
            "turned_over_grad_norm": 1 / math.sqrt(2), "snr": -6 / 42,
            "update_rms_over_lr": math.sqrt((u[0] ** 2 + u[1] ** 2) / 2),
        },
        rel=1e-6,
    )  # fmt: skip


def test_what_has_no_gradient_is_left_alone_and_a_group_may_be_empty():
    """Megatron gives every rank the same list of groups; some are empty on some ranks."""
    params, alone = parameters(), parameters()
    lonely = torch.nn.Parameter(torch.ones(4))
    optimizer = MoClip([{"params": []}, {"params": [*params, lonely]}], lr=0.1, weight_decay=0.5)
    assert optimizer.step() is None
    assert optimizer.last_angle is None
    take_steps(optimizer, params, gradients(3))
    take_steps(MoClip(alone, lr=0.1, weight_decay=0.5), alone, gradients(3))
    assert torch.equal(lonely.detach(), torch.ones(4))
    assert lonely not in optimizer.state
    np.testing.assert_array_equal(flat(params), flat(alone))


def test_each_group_has_its_learning_rate_and_decay_but_the_angle_is_one():
    params, rows = parameters(), gradients(1)
    groups = [{"params": params[:1], "lr": 0.2, "weight_decay": 0.5}, {"params": params[1:]}]
    optimizer, start = MoClip(groups, lr=0.1), [p.detach().clone() for p in params]
    take_steps(optimizer, params, rows)
    for i, grad in enumerate(rows[0].values()):
        # First step: m_hat = g, v_hat = g^2, so the update is 45 degrees by the gradient's sign.
        lr, decay = (0.2, 0.5) if i == 0 else (0.1, 0.0)
        expected = (1 - lr * decay) * start[i] - lr * math.pi / 4 * torch.tensor(grad).sign()
        torch.testing.assert_close(params[i].detach(), expected)
    assert optimizer.last_angle.a.shape == ()


def test_parameters_of_two_precisions_share_one_angle():
    params, alone = parameters(), parameters()
    params[1] = torch.nn.Parameter(params[1].detach().float())
    for ours in (params, alone):
        take_steps(MoClip(ours, lr=0.1), ours, gradients(4))
    np.testing.assert_allclose(flat(params), flat(alone), rtol=1e-5)


@pytest.mark.parametrize("adamw_options", [{}, {"foreach": True}, {"fused": True}])
def test_adamws_checkpoint_continues_under_moclip_and_back(adamw_options):
    params, rows = parameters(torch.float32), gradients(6)
    adamw = torch.optim.AdamW(params, lr=0.05, **adamw_options)
    take_steps(adamw, params, rows[:2])
    moclip = MoClip(params, lr=0.05)
    moclip.load_state_dict(adamw.state_dict())
    for key in ("step", "exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(states(moclip, key), states(adamw, key), rtol=0, atol=0)
    take_steps(moclip, params, rows[2:4])
    back = torch.optim.AdamW(params, lr=0.05)
    back.load_state_dict(moclip.state_dict())
    assert [s.item() for s in states(back, "step")] == [4.0] * len(params)
    take_steps(back, params, rows[4:])
    assert back.param_groups[0]["eps"] == 1e-8  # 0 would divide 0 by 0
    assert np.isfinite(flat(params)).all()
    assert set(back.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}


def test_a_closure_and_a_scheduler_of_torchs():
    param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = MoClip([param], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5**k)
    calls, moves = [], []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = param @ torch.tensor([1.0, -1.0])
        loss.backward()
        return loss

    for _ in range(3):
        before = param.detach().clone()
        assert optimizer.step(closure).item() == (before[0] - before[1]).item()
        scheduler.step()
        moves += (before - param.detach()).abs().tolist()
    assert calls == [True] * 3
    # A constant gradient keeps m_hat = sqrt(v_hat): every move is lr pi / 4.
    expected = [0.1 * 0.5**k * math.pi / 4 for k in (0, 0, 1, 1, 2, 2)]
    assert moves == pytest.approx(expected, rel=1e-5)


def test_what_would_be_epsilon_is_not_taken_for_weight_decay():
    with pytest.raises(TypeError, match="positional"):
        MoClip(parameters(), 0.1, (0.9, 0.95), 1e-8)


def test_a_compiled_step_is_the_plain_one():
    """``torch.compile(optimizer.step)`` works as AdamW's does; dynamo leaves ours alone."""
    plain, compiled = parameters(torch.float32), parameters(torch.float32)
    take_steps(MoClip(plain, lr=0.1), plain, gradients(3))
    optimizer = MoClip(compiled, lr=0.1)
    optimizer.step = torch.compile(optimizer.step, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's notices about what it leaves alone
        take_steps(optimizer, compiled, gradients(3))
    np.testing.assert_array_equal(flat(plain), flat(compiled))
