"""Each rule as a plain torch optimizer: its float64 reference, torch's own form, its traits."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_replay.errors import ConfigError
from megatron_replay.optim import TAM, AdaMuon, AdamW, MoClip, MoFO, MuonClip
from megatron_replay.optim.rule import UpdateRule
from tests.optim import reference_rules
from tests.optim.loop import assert_same_state, flat, states

BETAS = {"betas": (reference_rules.BETA1, reference_rules.BETA2)}
#: As ``reference_rules.RULES`` builds them; attention is only clipped where the model is known.
BUILD: dict[str, Callable[..., UpdateRule]] = {
    "adamw": AdamW,
    "moclip": MoClip,
    "moclip zero": functools.partial(MoClip, obtuse="zero", max_angle=60.0),
    "moclip tensor": functools.partial(MoClip, angle_scope="tensor"),
    "mofo": MoFO,
    "tam": TAM,
    "adamuon": AdaMuon,
    "muonclip": MuonClip,
}
#: Whole matrices, one that Muon leaves alone, and a vector.
SHAPES = {
    "model.layers.0.mlp.up_proj.weight": (6, 4),
    "model.layers.0.mlp.down_proj.weight": (3, 8),
    "model.embed_tokens.weight": (10, 4),
    "model.norm.weight": (5,),
}


def values(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


def gradients(steps: int) -> list[dict[str, np.ndarray]]:
    """Now with the momentum, now against it."""
    drift = values(100)
    return [
        {n: math.cos(0.9 * k) * drift[n] + 0.6 * noise for n, noise in values(k).items()}
        for k in range(1, steps + 1)
    ]


def build(
    rule: str, dtype: torch.dtype = torch.float64, **changes: Any
) -> tuple[UpdateRule, list[Any]]:
    """The rule over the parameters of ``values(0)``, with Megatron's exclusions from decay."""
    params = {n: torch.nn.Parameter(torch.tensor(v, dtype=dtype)) for n, v in values(0).items()}
    groups = [
        {"params": [p], "weight_decay": 0.1 if p.dim() > 1 else 0.0, "orthogonalize": "layers" in n}
        for n, p in params.items()
    ]
    return BUILD[rule](groups, lr=0.02, **BETAS, **changes), list(params.values())


def take_steps(optimizer: UpdateRule, params: list[Any], rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for param, grad in zip(params, row.values(), strict=True):
            param.grad = torch.tensor(grad, dtype=param.dtype)
        optimizer.step()


@pytest.mark.parametrize("clip_grad", [0.0, 2.0])
@pytest.mark.parametrize("rule", BUILD)
def test_twelve_steps_equal_the_reference(rule, clip_grad, monkeypatch):
    monkeypatch.setattr(reference_rules.Muon, "attention_clip", math.inf)
    rows = gradients(12)
    optimizer, params = build(rule, clip_grad=clip_grad)
    take_steps(optimizer, params, rows)
    expected = reference_rules.run(rule, values(0), rows, lr=0.02, weight_decay=0.1, clip=clip_grad)
    for param, name in zip(params, SHAPES, strict=True):
        found = param.detach().numpy()
        np.testing.assert_allclose(found, expected[name], rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("rule", BUILD)
def test_fp32_is_near_the_reference_in_both_forms(rule, backend, monkeypatch):
    monkeypatch.setattr(reference_rules.Muon, "attention_clip", math.inf)
    rows = gradients(6)
    optimizer, params = build(rule, torch.float32, clip_grad=2.0, backend=backend)
    take_steps(optimizer, params, rows)
    expected = reference_rules.run(rule, values(0), rows, lr=0.02, weight_decay=0.1, clip=2.0)
    for param, name in zip(params, SHAPES, strict=True):
        found = param.detach().numpy()
        # Muon's kind amplifies rounding: Newton-Schulz is steep at 0.
        atol = 2e-4 if "mu" in rule else 2e-6
        np.testing.assert_allclose(found, expected[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_is_torchs(dtype):
    ours, params = build("adamw", dtype)
    theirs, others = build("adamw", dtype)
    reference = torch.optim.AdamW(theirs.param_groups, lr=0.02, **BETAS)
    for row in gradients(10):
        for param, grad in zip(others, row.values(), strict=True):
            param.grad = torch.tensor(grad, dtype=dtype)
        reference.step()
        take_steps(ours, params, [row])
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    np.testing.assert_allclose(flat(params), flat(others), rtol=tolerance, atol=tolerance)


def test_clipping_is_torchs():
    ours, params = build("adamw", clip_grad=1.5)
    theirs, others = build("adamw")
    for row in gradients(5):
        for param, grad in zip(others, row.values(), strict=True):
            param.grad = torch.tensor(grad)
        norm = torch.nn.utils.clip_grad_norm_(others, 1.5)
        theirs.step()
        take_steps(ours, params, [row])
        assert ours.grad_norm == pytest.approx(norm.item())
        assert ours.report()["clipped_grad_norm"] == pytest.approx(min(norm.item(), 1.5))
        for param, grad in zip(params, row.values(), strict=True):
            np.testing.assert_array_equal(param.grad.numpy(), grad)  # not rewritten
    np.testing.assert_allclose(flat(params), flat(others), rtol=1e-9)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (20, 20)])
def test_muonclip_is_torchs_muon(shape):
    """torch's orthogonalises in bf16, where a matrix may come out 1 % away."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = MuonClip([ours], lr=0.1, weight_decay=0.1)
    reference = torch.optim.Muon(
        [theirs], lr=0.1, weight_decay=0.1, nesterov=False, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(5):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 1e-2 * moved


def opposed(rule: str, cos: float, **changes: Any) -> tuple[UpdateRule, list[Any]]:
    """One step along a direction, then one whose cosine with the momentum is ``cos``."""
    optimizer, params = build(rule, **changes)
    rows = values(1)
    take_steps(optimizer, params, [rows])
    m = np.concatenate([v.ravel() for v in rows.values()])
    other = np.random.default_rng(7).standard_normal(m.size)
    across = other - other @ m / (m @ m) * m
    g = cos * m / np.linalg.norm(m) + math.sqrt(1 - cos**2) * across / np.linalg.norm(across)
    parts = np.split(g, np.cumsum([v.size for v in rows.values()])[:-1])
    grads = {n: p.reshape(v.shape) for (n, v), p in zip(rows.items(), parts, strict=True)}
    take_steps(optimizer, params, [grads])
    return optimizer, params


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(st.floats(-1.0, 1.0))
def test_tams_step_is_adamws_times_the_cosine(cos):
    (_, adamw), (tam, damped) = opposed("adamw", cos), opposed("tam", cos)
    first, starts = build("adamw")
    take_steps(first, starts, [values(1)])
    for a, t, start in zip(adamw, damped, starts, strict=True):
        kept = (1 - 0.02 * (0.1 if start.dim() > 1 else 0.0)) * start
        torch.testing.assert_close(t - kept, max(cos, 0.0) * (a - kept), atol=1e-9, rtol=1e-6)
    assert tam.report()["cosine"] == pytest.approx(cos, abs=1e-6)


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(st.floats(0.01, 1.0), st.integers(0, 1000))
def test_mofo_moves_the_largest_momenta_and_decays_all(fraction, seed):
    generator = torch.Generator().manual_seed(seed)
    param = torch.nn.Parameter(torch.randn(7, 9, generator=generator))
    start = param.detach().clone()
    optimizer = MoFO([param], lr=0.1, weight_decay=0.5, fraction=fraction)
    param.grad = torch.randn(7, 9, generator=generator)
    optimizer.step()
    k = max(1, int(fraction * 63))
    moved = (param - 0.95 * start).abs() > 1e-4
    largest = torch.zeros(63, dtype=torch.bool)
    largest[param.grad.abs().flatten().topk(k).indices] = True
    assert torch.equal(moved.flatten(), largest)


@pytest.mark.parametrize(("rule", "size"), [("adamuon", 0.2), ("muonclip", None)])
def test_muons_kind_moves_as_far_as_adamw_usually_does(rule, size):
    param = torch.nn.Parameter(torch.zeros(30, 50))
    optimizer = BUILD[rule]([param], lr=0.1)
    param.grad = torch.randn(30, 50, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    root_mean_square = param.detach().square().mean().sqrt().item() / 0.1
    # 0.2 sqrt(50) U V^T: its 30 singular values are about 1, over 1500 elements.
    assert root_mean_square == pytest.approx(size or 0.2, rel=1e-4 if size else 0.2)
    assert optimizer.report()["update_rms_over_lr"] == pytest.approx(root_mean_square, rel=1e-5)


@pytest.mark.parametrize("rule", BUILD)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(rule, bad):
    for dtype in (torch.float32, torch.float64):
        optimizer, params = build(rule, dtype)
        rows = gradients(3)
        take_steps(optimizer, params, rows[:2])
        before, kept = flat(params), copy.deepcopy(optimizer.state_dict())
        rows[2]["model.layers.0.mlp.down_proj.weight"][1, 2] = bad
        with pytest.warns(UserWarning, match=r"not finite, step skipped \(1 so far\)"):
            take_steps(optimizer, params, rows[2:])
        np.testing.assert_array_equal(flat(params), before)
        assert_same_state(optimizer.state_dict(), kept)
        assert optimizer.skipped_steps == 1
        assert optimizer.report() == {}
        assert optimizer.last_angle is None
        take_steps(optimizer, params, rows[:1])
        assert np.isfinite(flat(params)).all()
        assert {int(s) for s in states(optimizer, "step")} == {3}


@pytest.mark.parametrize("rule", BUILD)
def test_a_checkpoint_continues_bitwise(rule):
    rows = gradients(8)
    first, params = build(rule, torch.float32)
    take_steps(first, params, rows[:4])
    second, others = build(rule, torch.float32)
    for ours, theirs in zip(others, params, strict=True):
        ours.data.copy_(theirs.data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take_steps(first, params, rows[4:])
    take_steps(second, others, rows[4:])
    np.testing.assert_array_equal(flat(others), flat(params))
    assert_same_state(second.state_dict(), first.state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("rule", BUILD)
def test_a_copy_steps_as_the_original_does(rule, duplicate):
    rows = gradients(4)
    optimizer, params = build(rule)
    take_steps(optimizer, params, rows[:2])
    twin = duplicate(optimizer)
    twins = [p for group in twin.param_groups for p in group["params"]]
    take_steps(optimizer, params, rows[2:])
    take_steps(twin, twins, rows[2:])
    np.testing.assert_array_equal(flat(twins), flat(params))


def test_no_step_warns_of_anything_else():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rule in BUILD:
            optimizer, params = build(rule)
            take_steps(optimizer, params, gradients(1))


@pytest.mark.parametrize(
    ("rule", "setting", "value"),
    [
        ("mofo", "fraction", 0.0), ("mofo", "fraction", 1.1),
        ("tam", "angle_scope", "layer"),
        ("adamw", "angle_scope", "tensor"), ("adamw", "clip_grad", math.inf),
    ],
)  # fmt: skip
def test_an_unusable_setting_is_named(rule, setting, value):
    name = BUILD[rule].__name__
    with pytest.raises(ConfigError, match=rf"{name}: unusable {setting} \(expected .*; found"):
        build(rule, **{setting: value})


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_backward_through_weights_that_have_moved_is_refused(backend):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([param], lr=0.1, backend=backend)
    loss = param.square().sum()
    param.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def quadratic_descends(make: Callable[[list[Tensor]], UpdateRule]) -> float:
    param = torch.nn.Parameter(torch.tensor([[1.0]]))
    optimizer = make([param])
    for _ in range(400):
        param.grad = param.detach().clone()
        optimizer.step()
    return param.abs().item()


@pytest.mark.parametrize("rule", ["adamw", "moclip", "moclip zero", "mofo", "adamuon", "muonclip"])
def test_none_stalls_on_a_one_dimensional_quadratic(rule):
    assert quadratic_descends(lambda params: BUILD[rule](params, lr=0.02)) < 0.1


@pytest.mark.parametrize("rule", BUILD)
@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", math.inf), ("lr", 1e39), ("lr", torch.tensor(math.inf)), ("weight_decay", math.inf),
     ("weight_decay", 1e300), ("weight_decay", 3e38), ("eps", math.inf), ("eps", 1e300)],
)  # fmt: skip
def test_numbers_that_are_infinite_in_float32(rule: str, name: str, value: Any) -> None:
    """Refused as AdamW refuses others, of a group of its own, too; 3e38 is, times the rate."""
    param = torch.nn.Parameter(torch.ones(2, 2))
    if not (rule.startswith("moclip") and name == "eps"):
        with pytest.raises(ValueError, match=f"Invalid .*{name}"):
            BUILD[rule]([param], **{"lr": 10.0, name: value})
    with pytest.raises(ValueError, match=f"Invalid .*{name}"):
        BUILD[rule]([{"params": [param], name: value}], lr=10.0)
    for bad in ({"lr": math.nan}, {"betas": (0.9, 1.0)}, {"betas": (math.nan, 0.9)}):
        with pytest.raises(ValueError, match="Invalid"):
            BUILD[rule]([{"params": [param], **bad}], lr=10.0)
