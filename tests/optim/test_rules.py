"""Each rule as a plain torch optimizer: its float64 reference, torch's own, states, refusals."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.errors import ConfigError
from megatron_replay.optim import AdamW, MoClip, MoFO, MuonClip
from megatron_replay.optim.mofo import kth_largest_magnitudes
from tests.optim import reference_rules
from tests.optim.loop import (
    BETAS,
    BUILD,
    SHAPES,
    assert_same_state,
    build,
    flat,
    gradients,
    parameters,
    states,
    take_steps,
    values,
)


@pytest.mark.parametrize("clip_grad", [0.0, 2.0])
@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(torch.float64, "torch"), (torch.float32, "torch"), (torch.float32, "cpu")],
)
@pytest.mark.parametrize("rule", BUILD)
def test_steps_equal_the_reference(rule, dtype, backend, clip_grad, monkeypatch):
    monkeypatch.setattr(reference_rules.Muon, "attention_clip", math.inf)
    rows = gradients(12 if dtype == torch.float64 else 6)
    optimizer, params = build(rule, dtype, clip_grad=clip_grad, backend=backend)
    take_steps(optimizer, params, rows)
    expected = reference_rules.run(rule, values(0), rows, lr=0.02, weight_decay=0.1, clip=clip_grad)
    atol = 1e-9
    if dtype == torch.float32:  # Muon's kind amplifies rounding: Newton-Schulz is steep at 0
        atol = 2e-4 if "mu" in rule else 2e-6
    for param, name in zip(params, SHAPES, strict=True):
        found = param.detach().numpy()
        np.testing.assert_allclose(found, expected[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("clip", [0.0, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_is_torchs_and_so_is_clipping(dtype, clip):
    ours, params = build("adamw", dtype, clip_grad=clip)
    theirs, others = build("adamw", dtype)
    reference = torch.optim.AdamW(theirs.param_groups, lr=0.02, **BETAS)
    for row in gradients(10):
        for param, grad in zip(others, row.values(), strict=True):
            param.grad = torch.tensor(grad, dtype=dtype)
        norm = torch.nn.utils.clip_grad_norm_(others, clip or math.inf).item()
        reference.step()
        take_steps(ours, params, [row])
        assert ours.grad_norm == pytest.approx(norm)
        assert ours.report()["clipped_grad_norm"] == pytest.approx(min(norm, clip or math.inf))
        for param, grad in zip(params, row.values(), strict=True):  # not rewritten
            assert torch.equal(param.grad, torch.tensor(grad, dtype=dtype))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-9
    np.testing.assert_allclose(flat(params), flat(others), rtol=tolerance, atol=tolerance)


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
    assert (ours - theirs).norm() < 1e-2 * (theirs - start).norm()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_the_kth_largest_magnitude_is_that_of_sorting(dtype, data):
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


def test_the_kth_largest_of_many_and_of_none():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    ordered = x.abs().sort(descending=True).values
    found = kth_largest_magnitudes([[x], [x], [x]], [1, 20_000, 100_000])
    assert torch.equal(found, ordered[[0, 19_999, 99_999]])
    assert kth_largest_magnitudes([], []).tolist() == []


@pytest.mark.parametrize("rule", BUILD)
def test_the_reported_update_is_what_the_weights_moved(rule):
    optimizer, params = build(rule, clip_grad=2.0)
    take_steps(optimizer, params, gradients(3))
    decayed = [p.detach() * (0.998 if p.dim() > 1 else 1.0) for p in params]
    take_steps(optimizer, params, gradients(4)[3:])
    rms = np.sqrt(np.mean(((flat(params) - flat(decayed)) / 0.02) ** 2))
    assert optimizer.report()["update_rms_over_lr"] == pytest.approx(rms, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", BUILD)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(rule, bad, dtype):
    optimizer, params = build(rule, dtype)
    rows = gradients(3)
    take_steps(optimizer, params, rows[:2])
    before, kept = flat(params), copy.deepcopy(optimizer.state_dict())
    rows[2]["model.layers.0.mlp.down_proj.weight"][1, 2] = bad
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()  # python's default filter shows every one: they count
        take_steps(optimizer, params, rows[2:] * 2)
    said = [str(warning.message) for warning in caught]
    assert [f"({count} so far)" in text for count, text in enumerate(said, 1)] == [True, True]
    np.testing.assert_array_equal(flat(params), before)
    assert_same_state(optimizer.state_dict(), kept)
    assert (optimizer.skipped_steps, optimizer.report(), optimizer.last_angle) == (2, {}, None)
    take_steps(optimizer, params, rows[:1])
    assert np.isfinite(flat(params)).all()
    assert {int(s) for s in states(optimizer, "step")} == {3}


@pytest.mark.parametrize("rule", BUILD)
def test_a_checkpoint_continues_bitwise(rule):
    rows = gradients(8)
    first, params = build(rule, torch.float32)
    take_steps(first, params, rows[:4])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second, others = build(rule, torch.float32, lr=9.0)  # the stored settings win, as in AdamW
    for ours, theirs in zip(others, params, strict=True):
        ours.data.copy_(theirs.data)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert_same_state(second.state_dict(), first.state_dict())
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


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_backward_through_weights_that_have_moved_is_refused(backend):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([param], lr=0.1, backend=backend)
    loss = param.square().sum()
    param.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("rule", "setting", "value"),
    [
        ("mofo", "fraction", 0.0), ("mofo", "fraction", 1.1),
        ("tam", "angle_scope", "layer"), ("moclip", "angle_scope", "layer"),
        ("adamw", "angle_scope", "tensor"), ("adamw", "clip_grad", math.inf),
        ("moclip", "max_angle", 0.0), ("moclip", "max_angle", 90.1),
        ("moclip", "max_angle", math.nan), ("moclip", "obtuse", "nearest"),
        ("moclip tensor", "obtuse", "zero"),
    ],
)  # fmt: skip
def test_an_unusable_setting_is_named(rule, setting, value):
    name = type(build(rule)[0]).__name__
    with pytest.raises(ConfigError, match=rf"{name}: unusable {setting}.* \(expected .*; found"):
        build(rule, **{setting: value})


@pytest.mark.parametrize("rule", BUILD)
@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", math.inf), ("lr", 1e39), ("lr", torch.tensor(math.inf)), ("lr", math.nan),
     ("lr", -1.0), ("betas", (0.9, 1.0)), ("betas", (math.nan, 0.9)), ("weight_decay", math.inf),
     ("weight_decay", 1e300), ("weight_decay", 3e38), ("eps", math.inf), ("eps", 1e300)],
)  # fmt: skip
def test_numbers_with_which_no_step_can_be_taken(rule: str, name: str, value: Any) -> None:
    """Refused as AdamW refuses others, of a group of its own, too; 3e38 is, times the rate."""
    param = torch.nn.Parameter(torch.ones(2, 2))
    wanted = "Invalid .*" + {"lr": "(lr|learning rate)", "betas": "beta"}.get(name, name)
    if not (rule.startswith("moclip") and name == "eps"):
        with pytest.raises(ValueError, match=wanted):
            BUILD[rule]([param], **{"lr": 10.0, name: value})
    with pytest.raises(ValueError, match=wanted):
        BUILD[rule]([{"params": [param], name: value}], lr=10.0)


@pytest.mark.parametrize(
    ("param", "grad", "wanted"),
    [
        *((torch.ones(2, dtype=dtype), torch.ones(2, dtype=dtype), "unusable parameter .*fp32")
          for dtype in (torch.bfloat16, torch.float16, torch.complex64)),
        (torch.ones(4, 2), torch.ones(4, 2).to_sparse(), "unusable gradient .*sparse"),
    ],
)  # fmt: skip
def test_a_tensor_that_cannot_be_stepped_is_refused(param, grad, wanted):
    param = torch.nn.Parameter(param)
    param.grad = grad
    with pytest.raises(ConfigError, match=wanted):
        MoClip([param], lr=0.1).step()


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "clip_grad"])
def test_options_that_a_group_cannot_have_are_refused(option):
    params = parameters()
    with pytest.raises(ConfigError, match=option):
        MoClip([{"params": params, option: True}], lr=0.1)
    if option != "clip_grad":
        adamw = torch.optim.AdamW(params, lr=0.1, **{option: True})
        with pytest.raises(ConfigError, match=option):
            MoClip(params, lr=0.1).load_state_dict(adamw.state_dict())


@pytest.mark.parametrize(
    ("other", "shape", "wanted"),
    [
        (torch.optim.RMSprop, (3, 2), "unusable state of another optimizer"),
        (torch.optim.Adagrad, (3, 2), "unusable state of another optimizer"),
        (MoClip, (4, 2), r"unusable exp_avg of another model \(expected \(3, 2\); found \(4, 2\)"),
    ],
)
def test_the_state_of_another_optimizer_or_model_is_refused(other, shape, wanted):
    params, theirs = ([torch.nn.Parameter(torch.ones(size))] for size in ((3, 2), shape))
    stepped = other(theirs, lr=0.1)
    theirs[0].grad = torch.ones(shape)
    stepped.step()
    with pytest.raises(ConfigError, match=f"MoClip: {wanted}"):
        MoClip(params, lr=0.1).load_state_dict(stepped.state_dict())
