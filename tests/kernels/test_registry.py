"""A backend chosen by name runs or is refused with the reason; "auto" is the best that can run."""

from __future__ import annotations

import sys

import pytest
import torch

from megatron_replay.errors import ConfigError
from megatron_replay.kernels import ATTENTION, HEAD, SELECTION, ascend_operators, registry
from megatron_replay.optim.momentum_step import OPTIMIZER, Coefficients

FINE = torch.zeros(4, 4)
ONES = Coefficients(*[1.0] * len(Coefficients._fields)).pack(FINE)
UNFIT = {
    "a tensor of torch.bfloat16": FINE.bfloat16(),
    "a tensor of torch.float64": FINE.double(),
    "not contiguous": torch.zeros(4, 8)[:, ::2],
    "a tensor on meta": FINE.to("meta"),
}
NAMES = {
    OPTIMIZER: ("auto", "torch", "cpu", "triton"),
    HEAD: ("auto", "torch", "union", "cpu", "triton", "ascend"),
    SELECTION: ("auto", "torch", "cpu", "triton"),
    ATTENTION: ("auto", "torch", "ascend"),
}


@pytest.mark.parametrize("backends", NAMES, ids=lambda backends: backends.what)
def test_names(backends):
    assert backends.names == NAMES[backends]
    with pytest.raises(ConfigError, match=rf"expected {', '.join(backends.names)}; found 'blas'"):
        backends.choose("blas", FINE)
    for name in {"triton", "ascend"}.intersection(backends.names):
        device = {"triton": "cuda", "ascend": "npu"}[name]
        with pytest.raises(ConfigError, match=f"a tensor on cpu, where it runs on {device}"):
            backends.choose(name, FINE)


def test_auto_is_the_compiled_backend_where_it_can_run():
    assert OPTIMIZER.resolve("auto", FINE) == OPTIMIZER.resolve("cpu", FINE) == "cpu"
    assert OPTIMIZER.resolve("torch", FINE) == "torch"
    assert HEAD.resolve("auto", FINE) == HEAD.resolve("auto", FINE.bfloat16()) == "cpu"
    assert SELECTION.choose("auto", FINE.half()).name == "cpu"
    assert ATTENTION.choose("auto", FINE).name == "torch"
    assert HEAD.describe("auto", FINE) == "cpu kernels"
    assert HEAD.describe("torch", FINE) == ATTENTION.describe("auto", FINE) == "torch kernels"


@pytest.mark.parametrize("reason", UNFIT)
def test_auto_is_torch_elsewhere_and_a_name_is_refused(reason):
    assert OPTIMIZER.resolve("auto", UNFIT[reason]) == "torch"
    assert OPTIMIZER.resolve("torch", UNFIT[reason]) == "torch"
    assert reason in OPTIMIZER.why_not("cpu", FINE, UNFIT[reason])
    with pytest.raises(ConfigError, match=reason):
        OPTIMIZER.choose("cpu", UNFIT[reason])


def test_the_description_has_the_reason_why_a_faster_backend_cannot_run():
    """fp16 is no dtype of the CPU's head: dense products over unions run instead."""
    half = FINE.half()
    assert HEAD.resolve("auto", half) == "union"
    described = HEAD.describe("auto", half)
    assert described.startswith("union kernels, ")
    assert "torch.float16" in described
    with pytest.raises(ConfigError, match=r"the restricted head: .*torch\.float16"):
        HEAD.choose("cpu", half)


@pytest.fixture
def fresh():
    """Backends are imported anew, and again after the test."""
    registry.load.cache_clear()
    ascend_operators.load.cache_clear()
    yield
    registry.load.cache_clear()
    ascend_operators.load.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_without_the_compiled_module_auto_still_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron_replay.kernels._cpu", None)
    monkeypatch.delitem(sys.modules, "megatron_replay.kernels.cpu_optimizer", raising=False)
    monkeypatch.delattr("megatron_replay.kernels._cpu", raising=False)
    assert OPTIMIZER.resolve("auto", FINE) == "torch"
    with pytest.raises(ConfigError, match=r"was not built; pip install .* builds it"):
        OPTIMIZER.choose("cpu", FINE)


@pytest.mark.usefixtures("fresh")
def test_the_head_of_npus_needs_its_module(monkeypatch, operators):
    """Without CANN there is none; with an emulated one in its place it loads."""
    assert "pip install -e ." in HEAD.why_not("ascend")
    registry.load.cache_clear()
    monkeypatch.setitem(sys.modules, "megatron_replay.kernels._ascend", operators)
    monkeypatch.delitem(sys.modules, "megatron_replay.kernels.ascend_head", raising=False)
    assert HEAD.why_not("ascend") is None
    sys.modules.pop("megatron_replay.kernels.ascend_head")


@pytest.mark.parametrize("reason", UNFIT)
@pytest.mark.parametrize("part", range(4))
def test_one_unfit_tensor_among_others_is_refused_and_nothing_is_changed(reason, part):
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
    kernels = OPTIMIZER.choose("cpu", FINE)
    with pytest.raises(AssertionError):
        kernels.dot_products([torch.zeros(3)], [torch.zeros(4)])
    with pytest.raises(AssertionError):
        kernels.momentum_step([FINE], [FINE], [FINE], [FINE], ONES.repeat(2, 1), bounded=True)


def test_no_tensors_make_no_sums():
    kernels = OPTIMIZER.choose("cpu", FINE)
    assert kernels.dot_products([], []).shape == (0, 3)
    assert kernels.square_sums([]).shape == (0,)
