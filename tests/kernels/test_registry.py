"""A form asked for by name runs or is refused with its reason; "auto" takes the best that can."""

from __future__ import annotations

import sys

import pytest
import torch

from megatron_replay.errors import ConfigError
from megatron_replay.functional.momentum_step import Coefficients
from megatron_replay.kernels import HEAD, OPTIMIZER, SELECTION, registry
from megatron_replay.kernels.ascend import operators as ascend_operators

FINE = torch.zeros(4, 4)
ONES = Coefficients(*[1.0] * 10).pack(FINE)
UNFIT = {
    "a tensor of torch.bfloat16": FINE.bfloat16(),
    "a tensor of torch.float64": FINE.double(),
    "not contiguous": torch.zeros(4, 8)[:, ::2],
    "a tensor on meta": FINE.to("meta"),
}


def test_auto_is_the_compiled_form_where_it_fits():
    assert OPTIMIZER.why_not("cpu", FINE) is None
    assert OPTIMIZER.choose("auto", FINE).name == "cpu"
    assert OPTIMIZER.choose("cpu", FINE).name == "cpu"
    assert OPTIMIZER.choose("torch", FINE).name == "torch"


@pytest.mark.parametrize("reason", UNFIT)
def test_auto_is_the_torch_form_elsewhere_and_a_name_is_refused(reason):
    assert OPTIMIZER.choose("auto", UNFIT[reason]).name == "torch"
    assert OPTIMIZER.choose("torch", UNFIT[reason]).name == "torch"
    assert reason in OPTIMIZER.why_not("cpu", FINE, UNFIT[reason])
    with pytest.raises(ConfigError, match=reason):
        OPTIMIZER.choose("cpu", UNFIT[reason])


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match="expected auto, torch, cpu, triton; found 'cublas'"):
        OPTIMIZER.choose("cublas", FINE)


def test_triton_does_not_run_on_the_cpu():
    with pytest.raises(ConfigError, match="a tensor on cpu, where it runs on cuda"):
        OPTIMIZER.choose("triton", FINE)


@pytest.fixture
def not_built(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron_replay.kernels._cpu", None)
    monkeypatch.delitem(sys.modules, "megatron_replay.kernels.cpu.optimizer", raising=False)
    monkeypatch.delattr("megatron_replay.kernels._cpu", raising=False)
    registry._load.cache_clear()
    yield
    registry._load.cache_clear()


@pytest.mark.usefixtures("not_built")
def test_without_the_module_auto_still_runs_and_can_say_why():
    assert OPTIMIZER.choose("auto", FINE).name == "torch"
    assert "was not built" in OPTIMIZER.why_not("cpu", FINE)
    with pytest.raises(ConfigError, match=r"was not built; pip install .* builds it"):
        OPTIMIZER.choose("cpu", FINE)


@pytest.mark.parametrize("reason", UNFIT)
@pytest.mark.parametrize("part", range(4))
def test_a_tensor_that_the_compiled_form_cannot_take_is_refused(reason, part):
    """``like`` was fine; one of the others is not. Nothing is changed."""
    parts = [[torch.ones(4, 4), torch.ones(4, 4)] for _ in range(4)]
    parts[part][1] = UNFIT[reason]
    with pytest.raises(ConfigError, match=reason):
        OPTIMIZER.choose("cpu", FINE).momentum_step(*parts, ONES, bounded=True)
    assert all(tensors[0].eq(1).all() for tensors in parts)


@pytest.mark.parametrize("copy", [FINE, torch.zeros(4, 8).bfloat16()[:, ::2]])
def test_copies_are_contiguous_bf16_or_refused(copy):
    with pytest.raises(ConfigError, match="unusable copies"):
        OPTIMIZER.choose("cpu", FINE).momentum_step(
            [FINE], [FINE], [FINE], [FINE], ONES, bounded=True, copies=[copy]
        )


def test_other_sizes_are_a_mistake_of_ours():
    with pytest.raises(AssertionError, match="exp_avgs"):
        OPTIMIZER.choose("cpu", FINE).dot_products([torch.zeros(3)], [torch.zeros(4)])
    with pytest.raises(AssertionError):
        OPTIMIZER.choose("cpu", FINE).momentum_step(
            [FINE], [FINE], [FINE], [FINE], torch.zeros(2, 10), bounded=True
        )


def test_no_tensors_make_no_sums():
    kernels = OPTIMIZER.choose("cpu", FINE)
    assert kernels.dot_products([], []).shape == (0, 3)
    assert kernels.square_sums([]).shape == (0,)


def test_the_head_s_forms():
    assert HEAD.names == ("auto", "torch", "union", "cpu", "triton", "ascend")
    assert HEAD.resolve("auto", FINE) == HEAD.resolve("auto", FINE.bfloat16()) == "cpu"
    assert HEAD.describe("auto", FINE) == "cpu kernels"
    assert HEAD.describe("torch", FINE) == "torch kernels"


def test_auto_says_what_keeps_it_from_better():
    """fp16 is no dtype of the CPU's kernels: dense products over unions it is."""
    half = FINE.half()
    assert HEAD.resolve("auto", half) == "union"
    assert HEAD.describe("auto", half) == (
        "union kernels, not the faster cpu ones: a tensor of torch.float16, where it takes "
        "torch.float32 or torch.bfloat16"
    )
    with pytest.raises(ConfigError, match="the restricted head: the cpu form cannot run"):
        HEAD.choose("cpu", half)


@pytest.mark.parametrize(("name", "device"), [("triton", "cuda"), ("ascend", "npu")])
def test_a_head_of_another_device_is_refused(name, device):
    with pytest.raises(ConfigError, match=f"a tensor on cpu, where it runs on {device}"):
        HEAD.choose(name, FINE)


def test_the_npu_s_head_needs_its_module(monkeypatch, operators):
    """Without CANN there is none; with the emulated one in its place it runs."""
    assert "pip install -e ." in registry._load(HEAD, "ascend")
    registry._load.cache_clear()
    monkeypatch.setitem(sys.modules, "megatron_replay.kernels._ascend", operators)
    monkeypatch.delitem(sys.modules, "megatron_replay.kernels.ascend.head", raising=False)
    ascend_operators.load.cache_clear()
    try:
        assert callable(registry._load(HEAD, "ascend"))
    finally:
        registry._load.cache_clear()
        ascend_operators.load.cache_clear()
        sys.modules.pop("megatron_replay.kernels.ascend.head", None)


def test_selection_s_forms():
    assert SELECTION.names == ("auto", "torch", "cpu", "triton")
    assert SELECTION.choose("auto", FINE).name == "cpu"
    assert SELECTION.choose("auto", FINE.half()).name == "cpu"
    assert SELECTION.choose("torch", FINE).name == "torch"
