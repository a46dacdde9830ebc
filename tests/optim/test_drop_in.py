"""MoClip beside torch's AdamW, in any training loop, and at its edges."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from megatron_replay.errors import ConfigError
from megatron_replay.optim import MoClip
from megatron_replay.optim.angle import READINGS
from tests.optim.training import SHAPES, parameters, random_like, take_step


def scalar(value: float, **settings_: Any) -> tuple[nn.Parameter, MoClip]:
    param = nn.Parameter(torch.tensor([value], dtype=torch.float64))
    return param, MoClip([param], **{"lr": 0.01, **settings_})


def test_moments_are_adamws_while_nothing_is_clipped() -> None:
    """A gradient that keeps its direction is never turned."""
    states = []
    for make in (torch.optim.AdamW, MoClip):
        params = parameters()
        optimizer = make(params, lr=1e-3, weight_decay=0.1)
        for k in (1.0, 0.2, 3.0, 0.5):
            for param, grad in zip(params, random_like(SHAPES, seed=1), strict=True):
                param.grad = k * grad
            optimizer.step()
        states.append(optimizer.state_dict()["state"])
    for ours, theirs in zip(states[1].values(), states[0].values(), strict=True):
        assert list(ours) == list(theirs) == ["step", "exp_avg", "exp_avg_sq"]
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(
    st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=6),
    st.sampled_from(sorted(READINGS)),
)
def test_lemma_3_bounds_every_step(grads: list[float], obtuse: str) -> None:
    param = nn.Parameter(torch.zeros(1))
    optimizer = MoClip([param], lr=0.5, obtuse=obtuse, atan_a=1.27)
    for grad in grads:
        before = param.detach().clone()
        param.grad = torch.tensor([grad])
        optimizer.step()
        assert (param - before).abs().item() <= 0.5 * 1.27 * math.pi / 2 * (1 + 1e-6)


def test_no_gradient_no_movement() -> None:
    """atan2(0, 0) = 0: a coordinate that never had a gradient stays, without an epsilon."""
    param = nn.Parameter(torch.ones(3))
    optimizer = MoClip([param], lr=0.1)
    for _ in range(3):
        param.grad = torch.tensor([0.0, 1.0, -1.0])
        optimizer.step()
    assert param[0] == 1.0
    assert param[1] < 1.0 < param[2]


def distance_left(**chosen: Any) -> float:
    """|x| after 300 steps down x^2 / 2 from 1."""
    x, optimizer = scalar(1.0, lr=0.05, **chosen)
    for _ in range(300):
        x.grad = x.detach().clone()
        optimizer.step()
    return abs(x.item())


def test_line_does_not_stall_where_momentum_overshoots() -> None:
    assert distance_left() < 0.002


def test_zero_stalls_unless_patience_lets_a_gradient_through() -> None:
    assert distance_left(obtuse="zero", obtuse_patience=10**9) > 0.2
    assert distance_left(obtuse="zero") < 0.01


def test_patience_counts_obtuse_gradients_in_a_row_and_is_saved() -> None:
    def passed(optimizer: MoClip, param: nn.Parameter, signs: str) -> list[bool]:
        answer = []
        for sign in signs:
            param.grad = torch.full((1,), float(sign + "1"), dtype=torch.float64)
            optimizer.step()
            assert optimizer.last_angle is not None
            answer.append(not optimizer.last_angle.clipped.item())
        return answer

    x, optimizer = scalar(0.0, obtuse="zero", obtuse_patience=2)
    assert passed(optimizer, x, "+--+--") == [True, False, False, True, False, False]
    resumed_x, resumed = scalar(x.item(), obtuse="zero", obtuse_patience=2)
    resumed.load_state_dict(optimizer.state_dict())
    assert passed(resumed, resumed_x, "-") == [True]
    # The count begins again. (That gradient turned m only partly: it still points the other way.)
    assert passed(resumed, resumed_x, "--") == [False, False]


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(scope: str, value: float) -> None:
    params = parameters()
    optimizer = MoClip(params, lr=0.1, weight_decay=0.1, angle_scope=scope)
    take_step(optimizer, params, seed=1)
    before = copy.deepcopy([p.detach() for p in params]), copy.deepcopy(optimizer.state_dict())
    for param, grad in zip(params, random_like(SHAPES, seed=2), strict=True):
        param.grad = grad
    params[1].grad[2] = value
    with pytest.warns(UserWarning, match=r"not finite, step skipped \(1 so far\)"):
        optimizer.step()
    assert optimizer.skipped_steps == 1
    assert optimizer.last_angle is None
    assert all(map(torch.equal, before[0], params))
    torch.testing.assert_close(optimizer.state_dict(), before[1], rtol=0, atol=0)
    take_step(optimizer, params, seed=3)
    assert optimizer.last_angle is not None
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("obtuse", ["line", "zero"])
def test_resuming_is_bitwise(obtuse: str) -> None:
    params = parameters(torch.float32)
    optimizer = MoClip(params, lr=0.05, weight_decay=0.1, obtuse=obtuse)
    for seed in range(1, 6):
        take_step(optimizer, params, seed)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumed_params = copy.deepcopy(params)
    resumed = MoClip(resumed_params, lr=9.0, obtuse=obtuse)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for seed in range(6, 11):
        take_step(optimizer, params, seed)
        take_step(resumed, resumed_params, seed)
    assert all(map(torch.equal, params, resumed_params))
    torch.testing.assert_close(resumed.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


def test_a_checkpoint_goes_from_adamw_to_moclip_and_back() -> None:
    param = nn.Parameter(torch.ones(2))
    adamw: torch.optim.Optimizer = torch.optim.AdamW([param], lr=0.1, eps=1e-6)
    for optimizer in (adamw, MoClip([param], lr=0.2), torch.optim.AdamW([param], lr=0.3)):
        if optimizer is not adamw:
            optimizer.load_state_dict(adamw.state_dict())
        param.grad = torch.tensor([0.0, 1.0])
        optimizer.step()
        adamw = optimizer
    assert adamw.state[param]["step"] == 3
    assert adamw.param_groups[0]["lr"] == 0.1
    assert adamw.param_groups[0]["eps"] == 1e-6
    assert param.isfinite().all()


def test_what_moclip_saves_is_safe_for_adamw() -> None:
    """AdamW divides by sqrt(v) + eps: with MoClip's absent epsilon it would be 0 / 0."""
    param = nn.Parameter(torch.ones(2))
    optimizer = MoClip([param], lr=0.1)
    adamw = torch.optim.AdamW([param], lr=0.1)
    adamw.load_state_dict(optimizer.state_dict())
    param.grad = torch.tensor([0.0, 1.0])
    adamw.step()
    assert param.isfinite().all()


def test_in_any_loop() -> None:
    """Closures, schedulers, parameters without a gradient, groups added later, copies."""
    torch.manual_seed(0)
    model, unused = nn.Linear(3, 1), nn.Parameter(torch.ones(1))
    optimizer = MoClip([model.weight, unused], lr=0.05)
    optimizer.add_param_group({"params": [model.bias], "lr": 0.01})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.99**k)
    inputs = torch.randn(32, 3)
    targets = inputs @ torch.tensor([[1.0], [2.0], [-1.0]])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        return loss

    losses = []
    for _ in range(100):
        losses.append(optimizer.step(closure).item())
        schedule.step()
    assert losses[-1] < 0.05 * losses[0]
    assert unused.item() == 1.0
    assert unused not in optimizer.state
    twin = copy.deepcopy(optimizer)
    assert (twin.max_angle, twin.skipped_steps, twin.obtuse) == (45.0, 0, "line")
    for group in twin.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    twin.step()


def test_without_gradients_nothing_happens() -> None:
    params = parameters()
    optimizer = MoClip(params, lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert optimizer.last_angle is None
    assert all(map(torch.equal, params, parameters()))


def test_the_last_angle_says_what_happened() -> None:
    param = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = MoClip([param], lr=0.1, betas=(0.0, 0.9), max_angle=45.0)
    for grad in ([2.0, 0.0], [-3.0, 3 * math.sqrt(3)]):  # the second at 120 degrees
        param.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
        if grad[1] == 0:
            assert optimizer.last_angle is not None
            first = optimizer.last_angle.as_floats()
    assert first == {
        "degrees": 0, "cosine": 1, "a": 1, "b": 0, "clipped": 0, "obtuse": 0, "grad_norm": 2,
        "momentum_norm": 0,
    }  # fmt: skip
    a = 1 / math.sqrt(3)  # tan 45 |cos 120| / sin 120
    assert optimizer.last_angle.as_floats() == pytest.approx(
        {
            "degrees": 120, "cosine": -0.5, "a": a, "b": -6 / 4 * (1 - a), "clipped": 1,
            "obtuse": 1, "grad_norm": 6, "momentum_norm": 2,
        }
    )  # fmt: skip


def test_tensor_scope_reports_means_and_whole_norms() -> None:
    params = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = MoClip(params, lr=0.1, angle_scope="tensor")
    for second in (1.0, -1.0):
        params[0].grad, params[1].grad = torch.tensor([3.0]), torch.tensor([4 * second])
        optimizer.step()
    assert optimizer.last_angle is not None
    numbers = optimizer.last_angle.as_floats()
    assert numbers["obtuse"] == 0.5
    assert numbers["degrees"] == pytest.approx(90)
    assert numbers["grad_norm"] == pytest.approx(5)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"max_angle": 0.0}, "unusable max_angle .expected degrees above 0, at most 90; found 0.0"),
        ({"max_angle": 91.0}, "max_angle"),
        ({"max_angle": math.nan}, "max_angle"),
        ({"obtuse": "none"}, "expected line, zero, reflect, project, rotate; found 'none'"),
        ({"obtuse_patience": -1}, "obtuse_patience"),
        ({"angle_scope": "layer"}, "angle_scope"),
        ({"angle_scope": "tensor", "obtuse": "zero"}, "obtuse with angle_scope='tensor'"),
        ({"second_moment": "both"}, "second_moment"),
        ({"atan_a": 0.0}, "atan_a"),
        ({"atan_b": math.inf}, "atan_b"),
    ],
)
def test_settings_that_cannot_work(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scalar(0.0, **chosen)


@pytest.mark.parametrize(
    "chosen", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"weight_decay": -1.0}]
)
def test_what_adamw_refuses(chosen: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Invalid"):
        scalar(0.0, **chosen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64])
def test_only_fp32_and_fp64_parameters(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.ones(2, dtype=dtype))
    param.grad = torch.ones_like(param)
    with pytest.raises(ConfigError, match=r"expected float32 or float64; found torch\."):
        MoClip([param], lr=0.1).step()


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match=r"unusable gradient .expected a dense one"):
        MoClip(embedding.parameters(), lr=0.1).step()


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "differentiable"])
def test_variants_of_adamw_are_refused_not_ignored(option: str) -> None:
    param = nn.Parameter(torch.ones(1))
    with pytest.raises(ConfigError, match=f"option {option} of a group"):
        MoClip([{"params": [param], option: True}], lr=0.1)
    saved = torch.optim.AdamW([param], lr=0.1, **{option: True}).state_dict()
    optimizer = MoClip([param], lr=0.2)
    with pytest.raises(ConfigError, match=f"option {option} of a group"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.2  # nothing was loaded
