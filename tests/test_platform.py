"""Choosing a platform, torch left as it was, and the private details of megatron-core we lean on.

When megatron-core is upgraded, these tests say which of our patches and subclasses to look at.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_replay import platform
from megatron_replay.errors import ConfigError
from megatron_replay.platform import megatron_core
from megatron_replay.platform.cpu import CPU
from megatron_replay.platform.cuda import CUDA
from megatron_replay.platform.npu import NPU
from megatron_replay.platform.registry import PLATFORMS


def has(monkeypatch, *present: type[platform.Platform]) -> None:
    """Let the machine have just these."""
    for kind in PLATFORMS:
        monkeypatch.setattr(kind, "available", classmethod(lambda cls: cls in present))


@pytest.mark.parametrize(
    ("present", "chosen"), [((CPU,), CPU), ((CPU, CUDA), CUDA), ((CPU, NPU), NPU)]
)
def test_auto_takes_the_accelerator_if_there_is_one(monkeypatch, present, chosen):
    has(monkeypatch, *present)
    assert type(platform.select()) is chosen
    assert type(platform.select("auto")) is chosen


def test_a_named_platform_is_never_replaced(monkeypatch):
    has(monkeypatch, CPU, CUDA)
    assert type(platform.select("cpu")) is CPU
    assert type(platform.select("cuda")) is CUDA
    has(monkeypatch, CPU)
    for name, needs in (("cuda", "visible GPU"), ("npu", "CANN")):
        with pytest.raises(ConfigError, match=f"--platform: .*no usable {name} device.*{needs}"):
            platform.select(name)


@pytest.mark.parametrize("name", ["gpu", "CPU", ""])
def test_unknown_platform(name):
    with pytest.raises(ConfigError, match=rf"expected auto, npu, cuda, cpu; found '{name}'"):
        platform.select(name)


def test_what_each_says_of_itself():
    assert [(p.name, p.communication_backend, p.validated) for p in PLATFORMS] == [
        ("npu", "hccl", False), ("cuda", "nccl", False), ("cpu", "gloo", True),
    ]  # fmt: skip
    cpu = platform.select("cpu")
    cpu.prepare()
    assert cpu.device == torch.device("cpu")
    assert 50 << 20 < cpu.peak_memory_bytes() < 1 << 40  # bytes, not the system's KiB


def test_npu_software_that_is_there_and_broken_is_said(monkeypatch):
    """Even for "auto", which would otherwise go on with the CPU."""
    find, load = importlib.util.find_spec, importlib.import_module

    def broken(name, *arguments):
        if name == "torch_npu":
            raise ImportError("libhccl.so: cannot open shared object file")
        return load(name, *arguments)

    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: object() if n == "torch_npu" else find(n, *a)
    )
    monkeypatch.setattr(importlib, "import_module", broken)
    for name in ("auto", "npu"):
        with pytest.raises(ConfigError, match=r"cannot be imported: libhccl.*set_env\.sh"):
            platform.select(name)


@pytest.mark.parametrize("kind", [CPU, CUDA], ids=lambda kind: kind.name)
@pytest.mark.parametrize("found", ["0.16.0", "0.17.0", None])
def test_another_megatron_core_is_refused(monkeypatch, kind, found):
    def version(_):
        if found is None:
            raise importlib.metadata.PackageNotFoundError
        return found

    monkeypatch.setattr(megatron_core, "_installed", False)
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with pytest.raises(ConfigError, match=rf"expected 0\.16\.1; found {found or 'none'}\)\. pip"):
        kind().prepare()


def test_preparing_after_the_first_import_is_a_bug_and_twice_is_not(monkeypatch):
    CPU().prepare()
    monkeypatch.setattr(megatron_core, "_installed", False)
    with pytest.raises(RuntimeError, match="before the first import"):
        CPU().prepare()


def test_torch_is_left_as_it_was():
    assert torch.cuda is sys.modules["torch.cuda"]
    assert not isinstance(torch.cuda, megatron_core._Module)
    assert torch.cuda.current_device.__module__ == "torch.cuda"
    assert torch.cuda.get_rng_state.__module__ == "torch.cuda.random"
    for name in megatron_core._FACTORIES:
        assert inspect.isbuiltin(getattr(torch, name)), name
    assert torch.compile.__module__ == "torch"
    assert torch.compile is not megatron_core._no_compile
    assert torch.ones(1).type() == "torch.FloatTensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64
    assert torch.ones(1).type("torch.IntTensor").dtype == torch.int32


@pytest.mark.skipif(torch.cuda.is_available(), reason="it works there")
def test_cuda_outside_megatron_is_refused_by_torch_as_ever():
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(1).cuda()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.empty(1, device="cuda")


def inside(module: types.ModuleType, source: str):
    """The value of an expression, evaluated as if it stood in ``module``."""
    return eval(source, module.__dict__)


@pytest.mark.parametrize("name", ["optimizer.optimizer", "fusions.fused_softmax"])
def test_inside_megatron_the_accelerator_is_the_platform(name):
    """One module imported with the rest, one imported now: the hook covers both."""
    module = importlib.import_module(f"megatron.core.{name}")
    assert module.torch is not torch
    assert inside(module, "torch.ones(1, device='cuda').device") == torch.device("cpu")
    assert inside(module, "torch.ones(1, device=torch.device('cuda', 0)).device").type == "cpu"
    assert inside(module, "torch.ones(1).cuda().device") == torch.device("cpu")
    assert inside(module, "torch.ones(1).type()") == "torch.cuda.FloatTensor"
    assert inside(module, "torch.ones(1).bfloat16().type()") == "torch.cuda.BFloat16Tensor"
    assert inside(module, "torch.Tensor") is torch.Tensor
    state = inside(module, "torch.cuda.get_rng_state()")
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(AttributeError):
        inside(module, "torch.no_such_thing")


def test_rng_functions_of_the_tracker_are_ours():
    before = torch.get_rng_state()
    state = megatron_random._get_cuda_rng_state(device="cuda", clone=True, graph_safe=True)
    assert torch.equal(state, before)
    torch.rand(3)
    megatron_random._set_cuda_rng_state(new_state=state, device=0, graph_safe=False)
    assert torch.equal(torch.get_rng_state(), before)


def source_of(name: str) -> str:
    return inspect.getsource(sys.modules[f"megatron.core.{name}"])


def test_the_patches_are_still_needed():
    """Each gone line is a patch to take out of platform/megatron_core.py."""
    assert 'mp.get_context("spawn")' in source_of("dist_checkpointing.strategies.filesystem_async")
    random = source_of("tensor_parallel.random")
    assert "def _get_cuda_rng_state(\n" in random
    assert "torch.cuda.default_generators[idx]" in random
    assert "def _set_cuda_rng_state(new_state" in random
    assert "'torch.cuda.FloatTensor'" in source_of("optimizer.optimizer")
    assert "torch.compile" in source_of("jit")


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_signatures_we_call_and_override():
    assert parameters(GPTModel._postprocess)[:2] == ["self", "hidden_states"]
    assert "return self._postprocess(\n            hidden_states=hidden_states," in source_of(
        "models.gpt.gpt_model"
    )  # by keyword, all of it: ours takes the rest as **_
    assert {
        "config", "transformer_layer_spec", "vocab_size", "max_sequence_length", "pre_process",
        "post_process", "share_embeddings_and_output_weights", "position_embedding_type",
        "rotary_base",
    } <= set(parameters(GPTModel.__init__))  # fmt: skip
    assert parameters(GPTModel.forward)[:4] == [
        "self", "input_ids", "position_ids", "attention_mask",
    ]  # fmt: skip
    assert parameters(FP32Optimizer) == ["optimizer", "config", "init_state_fn"]
    assert parameters(Float16OptimizerWithFloat16Params) == [
        "optimizer", "config", "grad_scaler", "init_state_fn",
    ]  # fmt: skip
    assert parameters(megatron_optimizer._get_param_groups) == [
        "model_chunks", "config", "config_overrides",
    ]  # fmt: skip
    assert parameters(megatron_optimizer.get_standard_config_overrides) == ["config"]
    assert {"grad_stats_parallel_group", "tp_group"} <= set(
        source_of("optimizer.optimizer").replace("'", " ").replace(".", " ").split()
    )  # set by us, read there
    assert {
        "model_chunks", "per_model_buffers", "data_parallel_group", "data_parallel_group_gloo",
        "data_parallel_group_idx", "distributed_optimizer_instance_id",
    } <= set(parameters(DistributedOptimizer.__init__))  # fmt: skip
    assert {"forward_step_func", "collect_non_loss_data", "forward_only"} <= set(
        parameters(schedules.forward_backward_no_pipelining)
    )


def test_what_our_optimizers_override_is_still_called():
    for kind in (Float16OptimizerWithFloat16Params, DistributedOptimizer):
        assert parameters(kind._copy_main_params_to_model_params) == ["self"]
        assert parameters(kind.zero_grad) == ["self", "set_to_none"]
    sharded = source_of("optimizer.distrib_optimizer")
    for name in ("model_float16_groups", "model_fp32_groups", "shard_fp32_groups",
                 "shard_fp32_from_float16_groups"):  # fmt: skip
        assert f"            self.{name},\n" in sharded
    assert parameters(DistributedOptimizer._get_model_param_range_map) == ["self", "param"]
    # Ours hands it the count of steps, which it asks for and does not load.
    assert (
        "for key in dst_tensors:\n                dst_tensors[key].copy_(tensors[key])" in sharded
    )
    # One tensor for the counts of all parameters: ours counts out of place.
    assert 's["step"] = step' in sharded
    assert "self._copy_main_params_to_model_params()" in source_of("optimizer.optimizer")


def test_a_sharded_optimizer_keeps_its_count_of_steps_beside_apex(monkeypatch):
    from megatron.core.optimizer import distrib_optimizer

    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    with megatron_core.torch_optimizer_state():
        assert distrib_optimizer.HAVE_APEX_OR_TE is False
    assert distrib_optimizer.HAVE_APEX_OR_TE is True
    assert "if not HAVE_APEX_OR_TE:" in source_of("optimizer.distrib_optimizer")


def test_layer_spec_has_the_places_we_fill():
    layer = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm").submodules
    for name in ("input_layernorm", "pre_mlp_layernorm"):
        assert hasattr(layer, name)
    for name in ("core_attention", "q_layernorm", "k_layernorm"):
        assert hasattr(layer.self_attention.submodules, name)
    assert parameters(TransformerBlockSubmodules) == ["layer_specs", "layer_norm"]


def test_a_loss_function_of_three_is_a_sum_and_its_count():
    """(sum, count, report): the sum is not divided when the loss is computed per token."""
    stored: list = []
    output, count = schedules.forward_step_calc_loss(
        model=None,
        output_tensor=torch.tensor([1.0, 2.0]),
        loss_func=lambda loss: (loss.sum(), torch.tensor(2, dtype=torch.int32), "report"),
        config=SimpleNamespace(calculate_per_token_loss=True, timers=None),
        vp_stage=None,
        collect_non_loss_data=False,
        num_microbatches=5,
        forward_data_store=stored,
        cp_group_size=1,
        is_last_stage=True,
    )
    assert (output.item(), count.item(), stored) == (3.0, 2, ["report"])


def test_collected_data_is_what_the_function_returns():
    stored: list = []
    schedules.forward_step_calc_loss(
        model=None,
        output_tensor="hidden",
        loss_func=lambda output, non_loss_data: (output, non_loss_data),
        config=SimpleNamespace(calculate_per_token_loss=True, timers=None),
        vp_stage=None,
        collect_non_loss_data=True,
        num_microbatches=1,
        forward_data_store=stored,
        cp_group_size=1,
        is_last_stage=True,
    )
    assert stored == [("hidden", True)]
