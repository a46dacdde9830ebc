"""MoClip where AdamW would stand: groups, checkpoints, closures, schedulers, and refusals."""

from __future__ import annotations

import copy
import io
import math
import warnings

import numpy as np
import pytest
import torch

from megatron_replay.errors import ConfigError
from megatron_replay.optim import MoClip
from tests.optim.loop import (
    assert_same_state,
    flat,
    gradients,
    parameters,
    states,
    take_steps,
)


def test_parameters_without_gradient_are_left_alone():
    params = parameters()
    lonely = torch.nn.Parameter(torch.ones(4))
    optimizer = MoClip([*params, lonely], lr=0.1, weight_decay=0.5)
    alone = parameters()
    reference = MoClip(alone, lr=0.1, weight_decay=0.5)
    take_steps(optimizer, params, gradients(3))
    take_steps(reference, alone, gradients(3))
    assert torch.equal(lonely.detach(), torch.ones(4))
    assert lonely not in optimizer.state
    np.testing.assert_array_equal(flat(params), flat(alone))


def test_nothing_to_do_is_no_step():
    optimizer = MoClip(parameters(), lr=0.1)
    assert optimizer.step() is None
    assert optimizer.last_angle is None


def test_an_empty_first_group_is_allowed():
    """Megatron gives every rank the same list of groups; some are empty on some ranks."""
    params, alone = parameters(), parameters()
    optimizer = MoClip([{"params": []}, {"params": params}], lr=0.1)
    take_steps(optimizer, params, gradients(2))
    take_steps(MoClip(alone, lr=0.1), alone, gradients(2))
    np.testing.assert_array_equal(flat(params), flat(alone))


def test_each_group_has_its_learning_rate_and_decay_but_the_angle_is_one():
    params, rows = parameters(), gradients(1)
    decayed = MoClip(
        [{"params": params[:1], "lr": 0.2, "weight_decay": 0.5}, {"params": params[1:]}], lr=0.1
    )
    start = [p.detach().clone() for p in params]
    take_steps(decayed, params, rows)
    for i, (lr, decay) in enumerate([(0.2, 0.5), (0.1, 0.0), (0.1, 0.0)]):
        # First step: m_hat = g, v_hat = g^2, so the update is 45 degrees by the gradient's sign.
        expected = (1 - lr * decay) * start[i] - lr * math.pi / 4 * rows[0][i].sign()
        torch.testing.assert_close(params[i].detach(), expected)
    assert decayed.last_angle.a.shape == ()


def test_parameters_of_two_precisions_share_one_angle():
    params = parameters()
    params[1] = torch.nn.Parameter(params[1].detach().float())
    alone = parameters()
    take_steps(MoClip(params, lr=0.1), params, gradients(4))
    take_steps(MoClip(alone, lr=0.1), alone, gradients(4))
    np.testing.assert_allclose(flat(params), flat(alone), rtol=1e-5)


def test_a_checkpoint_continues_bitwise():
    for obtuse in ("line", "zero"):
        ours, rows = parameters(torch.float32), gradients(12)
        first = MoClip(ours, lr=0.05, weight_decay=0.1, obtuse=obtuse)
        take_steps(first, ours, rows[:6])
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        resumed = [torch.nn.Parameter(p.detach().clone()) for p in ours]
        second = MoClip(resumed, lr=9.0, obtuse=obtuse)  # the stored settings win, as in AdamW
        second.load_state_dict(torch.load(file, weights_only=True))
        assert_same_state(second.state_dict(), first.state_dict())
        take_steps(first, ours, rows[6:])
        take_steps(second, resumed, rows[6:])
        assert_same_state(second.state_dict(), first.state_dict())
        np.testing.assert_array_equal(flat(resumed), flat(ours))


def test_patience_survives_a_checkpoint():
    def opposed(optimizer: MoClip, param: torch.nn.Parameter, grads: list[float]) -> list[float]:
        seen = []
        for grad in grads:
            param.grad = torch.tensor([grad])
            optimizer.step()
            seen.append(optimizer.last_angle.a.item())
        return seen

    param = torch.nn.Parameter(torch.zeros(1))
    first = MoClip([param], lr=0.01, betas=(0.99, 0.999), obtuse="zero")
    assert opposed(first, param, [1.0, -1.0, -1.0]) == [1.0, 0.0, 0.0]
    second = MoClip([param], lr=0.01, obtuse="zero")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert opposed(second, param, [-1.0, -1.0]) == [0.0, 1.0]


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
    assert [s.item() for s in states(back, "step")] == [4.0] * 3
    take_steps(back, params, rows[4:])
    assert back.param_groups[0]["eps"] == 1e-8  # 0 would divide 0 by 0
    assert np.isfinite(flat(params)).all()
    assert set(back.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}


def test_closure_is_called_once_with_gradients_enabled():
    param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer, calls = MoClip([param], lr=0.1), []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 5.0
    assert calls == [True]
    torch.testing.assert_close(param.detach(), torch.tensor([1.0, -2.0]).sign() * (
        torch.tensor([1.0, 2.0]) - 0.1 * math.pi / 4))  # fmt: skip


def test_torchs_scheduler_sets_the_learning_rate():
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = MoClip([param], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5**k)
    moves = []
    for _ in range(3):
        before = param.detach().clone()
        param.grad = torch.ones(2)
        optimizer.step()
        scheduler.step()
        moves.append((before - param.detach())[0].item())
    # A constant gradient keeps m_hat = sqrt(v_hat): every move is lr pi / 4.
    assert moves == pytest.approx([0.1 * 0.5**k * math.pi / 4 for k in range(3)], rel=1e-5)


def test_the_report_says_what_the_step_did():
    param = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = MoClip([param], lr=0.1, betas=(0.5, 0.5), max_angle=45.0)
    take_steps(optimizer, [param], [[torch.tensor([4.0, 0.0])]])
    first = optimizer.report()
    assert (first["degrees"], first["clipped"], first["momentum_over_grad_norm"]) == (0, 0, 0)
    take_steps(optimizer, [param], [[torch.tensor([-3.0, 3 * math.sqrt(3)])]])  # m = (2, 0)
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


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_angle", 0.0), ("max_angle", 90.1), ("max_angle", math.nan), ("obtuse", "nearest"),
        ("angle_scope", "layer")
    ],
)  # fmt: skip
def test_an_unusable_setting_is_named(setting, value):
    with pytest.raises(ConfigError, match=rf"MoClip: unusable {setting} \(expected .*; found"):
        MoClip(parameters(), lr=0.1, **{setting: value})


def test_adamws_own_checks_stay():
    for changes in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"weight_decay": -0.1}):
        with pytest.raises(ValueError, match="Invalid"):
            MoClip(parameters(), **{"lr": 0.1, **changes})


def test_what_would_be_epsilon_is_not_taken_for_weight_decay():
    with pytest.raises(TypeError, match="positional"):
        MoClip(parameters(), 0.1, (0.9, 0.95), 1e-8)


def test_zero_has_no_tensor_scope():
    with pytest.raises(ConfigError, match="angle_scope='tensor'"):
        MoClip(parameters(), lr=0.1, obtuse="zero", angle_scope="tensor")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64])
def test_a_parameter_of_another_precision_is_refused(dtype):
    param = torch.nn.Parameter(torch.ones(2, dtype=dtype))
    param.grad = torch.ones(2, dtype=dtype)
    with pytest.raises(ConfigError, match="fp32 masters"):
        MoClip([param], lr=0.1).step()


def test_a_sparse_gradient_is_refused():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="unusable gradient"):
        MoClip(embedding.parameters(), lr=0.1).step()


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_adamws_variants_are_refused_also_in_a_checkpoint(option):
    params = parameters()
    with pytest.raises(ConfigError, match=option):
        MoClip([{"params": params, option: True}], lr=0.1)
    adamw = torch.optim.AdamW(params, lr=0.1, **{option: True})
    with pytest.raises(ConfigError, match=option):
        MoClip(params, lr=0.1).load_state_dict(adamw.state_dict())


@pytest.mark.parametrize("other", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad])
def test_another_optimizers_state_is_refused_in_words(other):
    params = [torch.nn.Parameter(torch.ones(3, 2))]
    theirs = other(params, lr=0.1, **({"momentum": 0.9} if other is torch.optim.SGD else {}))
    params[0].grad = torch.ones(3, 2)
    theirs.step()
    with pytest.raises(ConfigError, match="MoClip: the state is another optimizer's"):
        MoClip(params, lr=0.1).load_state_dict(theirs.state_dict())


def test_the_state_of_another_model_is_refused_in_words():
    params, larger = [torch.nn.Parameter(torch.ones(3, 2))], [torch.nn.Parameter(torch.ones(4, 2))]
    theirs = MoClip(larger, lr=0.1)
    larger[0].grad = torch.ones(4, 2)
    theirs.step()
    with pytest.raises(ConfigError, match="exp_avg is of another model"):
        MoClip(params, lr=0.1).load_state_dict(theirs.state_dict())


def test_a_compiled_step_is_the_plain_one():
    """``torch.compile(optimizer.step)`` works as AdamW's does; dynamo leaves ours alone."""
    torch.manual_seed(0)
    plain, compiled = ([torch.nn.Parameter(torch.ones(3, 2))] for _ in range(2))
    optimizers = [MoClip(params, lr=0.1) for params in (plain, compiled)]
    steps = [optimizers[0].step, torch.compile(optimizers[1].step, backend="eager")]
    for _ in range(3):
        gradient = torch.randn(3, 2)
        for params, step in zip((plain, compiled), steps, strict=True):
            params[0].grad = gradient.clone()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # dynamo's notices about what it leaves alone
                step()
    assert torch.equal(plain[0], compiled[0])
