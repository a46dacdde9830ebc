"""A backend chosen by name runs or is refused with the reason; "auto" is the best that can run."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from megatron_replay import kernels
from megatron_replay.errors import ConfigError
from megatron_replay.kernels import ATTENTION, HEAD, LAYERS, SELECTION
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
    SELECTION: ("auto", "torch", "cpu", "triton", "ascend"),
    ATTENTION: ("auto", "torch", "ascend"),
    LAYERS: ("auto", "torch", "ascend"),
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
    assert SELECTION.resolve("auto", FINE.half()) == "cpu"
    assert ATTENTION.resolve("auto", FINE) == "torch"
    assert HEAD.describe("auto", FINE) == "cpu kernels"
    assert HEAD.describe("torch", FINE) == ATTENTION.describe("auto", FINE) == "torch kernels"


@pytest.mark.parametrize(
    ("backends", "tensor", "reason", "instead"),
    [
        *((OPTIMIZER, tensor, reason, "torch") for reason, tensor in UNFIT.items()),
        (HEAD, FINE.half(), r"torch\.float16", "union"),  # no dtype of the CPU's head
        (SELECTION, FINE.double(), r"torch\.float64", "torch"),
        (SELECTION, FINE.to("meta"), "a tensor on meta", "torch"),
    ],
)
def test_auto_is_another_where_the_compiled_one_cannot_run(backends, tensor, reason, instead):
    """And its description has the reason; by its name the compiled one is refused."""
    assert backends.resolve("auto", tensor) == backends.resolve(instead, tensor) == instead
    described = backends.describe("auto", tensor)
    assert described.startswith(f"{instead} kernels")
    assert tensor.is_meta or re.search(reason, described)
    assert re.search(reason, backends.why_not("cpu", FINE, tensor))
    with pytest.raises(ConfigError, match=rf"{backends.what}: .*{reason}"):
        backends.choose("cpu", tensor)


@pytest.fixture
def fresh():
    """Backends are imported anew, and again after the test."""
    kernels.load.cache_clear()
    yield
    kernels.load.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_without_the_compiled_module_auto_still_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron_replay.kernels._cpu", None)
    monkeypatch.delitem(sys.modules, "megatron_replay.kernels.cpu_optimizer", raising=False)
    monkeypatch.delattr("megatron_replay.kernels._cpu", raising=False)
    assert OPTIMIZER.resolve("auto", FINE) == "torch"
    with pytest.raises(ConfigError, match=r"_cpu is not installed .*pip install -e \."):
        OPTIMIZER.choose("cpu", FINE)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("backends", [HEAD, SELECTION], ids=lambda backends: backends.what)
def test_the_operators_of_npus_need_their_module(monkeypatch, operators, backends):
    """Without CANN there is none; with an emulated one in its place it loads."""
    assert re.search(r"set_env.sh.*pip install -e \.", backends.why_not("ascend"))
    kernels.load.cache_clear()
    monkeypatch.setitem(sys.modules, "megatron_replay.kernels._ascend", operators)
    assert backends.why_not("ascend") is None


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
    parts = [[FINE]] * 4
    with pytest.raises(ConfigError, match="unusable copies"):
        OPTIMIZER.choose("cpu", FINE).momentum_step(*parts, ONES, bounded=True, copies=[copy])


def test_other_sizes_are_a_mistake_of_ours():
    passes, parts = OPTIMIZER.choose("cpu", FINE), [[FINE]] * 4
    with pytest.raises(AssertionError):
        passes.dot_products([torch.zeros(3)], [torch.zeros(4)])
    with pytest.raises(AssertionError):
        passes.momentum_step(*parts, ONES.repeat(2, 1), bounded=True)


def test_no_tensors_make_no_sums():
    kernels = OPTIMIZER.choose("cpu", FINE)
    assert kernels.dot_products([], []).shape == (0, 3)
    assert kernels.square_sums([]).shape == (0,)
