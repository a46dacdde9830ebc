"""The choice of a platform, the patches of megatron-core, and the private details they depend on.

When megatron-core is upgraded, these tests name the patches and subclasses to check.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import subprocess
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
from megatron_replay.platform import PLATFORMS, devices, megatron_core
from megatron_replay.platform.devices import CPU, CUDA, NPU


def has(monkeypatch, *present: type[platform.Platform]) -> None:
    """Let the machine have only these."""
    for kind in PLATFORMS:
        monkeypatch.setattr(kind, "available", classmethod(lambda cls: cls in present))


def test_auto_takes_the_accelerator_and_a_name_is_never_replaced(monkeypatch):
    for present in ((CPU,), (CPU, CUDA), (CPU, NPU)):
        has(monkeypatch, *present)
        assert type(platform.select("auto")) is present[-1]
        assert type(platform.select("cpu")) is CPU
        for kind in (CUDA, NPU):
            if kind not in present:
                with pytest.raises(ConfigError, match=f"--platform: .* {kind.name} "):
                    platform.select(kind.name)


def test_a_restarted_rank_waits_before_it_opens_its_npu(monkeypatch):
    waited = []
    monkeypatch.setattr(devices.time, "sleep", waited.append)
    for restarts, seconds in (("0", []), ("2", [10.0])):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        with pytest.raises(ModuleNotFoundError, match="torch_npu"):
            NPU().prepare(0)
        assert waited == seconds


def test_a_rank_without_a_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    with pytest.raises(ConfigError, match=r"local rank 4 .*found 4 devices, .*=0,1,2,3"):
        devices.CUDA().prepare(4)


@pytest.mark.parametrize("name", ["gpu", "CPU", ""])
def test_unknown_platform(name):
    with pytest.raises(ConfigError, match=rf"expected auto, npu, cuda, cpu; found '{name}'"):
        platform.select(name)


def test_the_memory_of_the_cpu_is_in_bytes():
    cpu = platform.select("cpu")
    cpu.prepare()
    assert cpu.device == torch.device("cpu")
    assert 50 << 20 < cpu.peak_memory_bytes() < 1 << 40


@pytest.mark.parametrize(
    "error",
    [
        "ImportError('libhccl.so: cannot open')",
        "RuntimeError('Two accelerators\\nERR00007')",
    ],
)
def test_a_broken_torch_npu_is_an_error_for_auto_too(monkeypatch, tmp_path, error):
    """Otherwise "auto" would choose the CPU. The second: beside torch's CUDA build."""
    (tmp_path / "torch_npu.py").write_text(f"raise {error}")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("auto", "npu"):
        with pytest.raises(ConfigError, match=r"(libhccl|Two acc).*set_env\.sh.*CPU build"):
            platform.select(name)


@pytest.mark.parametrize("found", ["0.16.0", "0.17.0", None])
def test_another_megatron_core_is_refused(monkeypatch, found):
    def version(_):
        if found is None:
            raise importlib.metadata.PackageNotFoundError
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ConfigError, match=rf"expected 0\.16\.1; found {found or 'none'}\)"):
        CUDA().prepare()


IMPORTED_BEFORE = """
import importlib, megatron.core
from megatron_replay.platform import select
try:
    select("cpu").prepare()
except RuntimeError as error:
    print(error)
"""


def test_preparing_after_the_first_import_is_a_bug_and_twice_is_not():
    CPU().prepare()
    CPU().prepare()
    line = [sys.executable, "-W", "ignore", "-c", IMPORTED_BEFORE]
    done = subprocess.run(line, capture_output=True, text=True)
    assert "before the first import" in done.stdout, done.stderr


def test_torch_itself_is_unchanged():
    assert torch.cuda is sys.modules["torch.cuda"]
    assert torch.cuda.current_device.__module__ == "torch.cuda"
    assert torch.cuda.get_rng_state.__module__ == "torch.cuda.random"
    for name in ("arange", "empty", "ones_like", "tensor", "zeros"):
        assert inspect.isbuiltin(getattr(torch, name)), name
    assert torch.compile.__module__ == "torch"
    assert torch.compile.__name__ == "compile"
    assert torch.ones(1).type() == "torch.FloatTensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64
    assert torch.ones(1).type("torch.IntTensor").dtype == torch.int32


@pytest.mark.skipif(torch.cuda.is_available(), reason="it works there")
def test_outside_megatron_torch_still_refuses_cuda():
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(1).cuda()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.empty(1, device="cuda")


def inside(module: types.ModuleType, source: str):
    """The value of an expression, evaluated as if it stood in ``module``."""
    return eval(source, module.__dict__)


@pytest.mark.parametrize("name", ["optimizer.optimizer", "fusions.fused_softmax"])
def test_inside_megatron_the_accelerator_is_the_platform(name):
    """One module imported with the rest, one imported now."""
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


def test_the_rng_functions_of_the_tracker_are_ours():
    before = torch.get_rng_state()
    state = megatron_random._get_cuda_rng_state(device="cuda", clone=True, graph_safe=True)
    assert torch.equal(state, before)
    torch.rand(3)
    megatron_random._set_cuda_rng_state(new_state=state, device=0, graph_safe=False)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("function", "used"),  # with dots: among others
    [
        (GPTModel._postprocess, "self hidden_states ..."),
        (GPTModel.__init__, "config transformer_layer_spec vocab_size max_sequence_length "
         "pre_process post_process share_embeddings_and_output_weights position_embedding_type "
         "rotary_base ..."),
        (GPTModel.forward, "self input_ids position_ids attention_mask ..."),
        (TransformerBlockSubmodules, "layer_specs layer_norm"),
        (FP32Optimizer, "optimizer config init_state_fn"),
        (Float16OptimizerWithFloat16Params, "optimizer config grad_scaler init_state_fn"),
        (Float16OptimizerWithFloat16Params._copy_main_params_to_model_params, "self"),
        (DistributedOptimizer.__init__, "model_chunks per_model_buffers data_parallel_group "
         "data_parallel_group_gloo data_parallel_group_idx distributed_optimizer_instance_id ..."),
        (DistributedOptimizer._copy_main_params_to_model_params, "self"),
        (DistributedOptimizer.zero_grad, "self set_to_none"),
        (DistributedOptimizer._get_model_param_range_map, "self param"),
        (megatron_optimizer._get_param_groups, "model_chunks config config_overrides"),
        (megatron_optimizer.get_standard_config_overrides, "config"),
        (schedules.forward_backward_no_pipelining,
         "forward_step_func collect_non_loss_data forward_only ..."),
    ],
)  # fmt: skip
def test_signatures_we_call_and_override(function, used):
    found = list(inspect.signature(function).parameters)
    names = used.removesuffix(" ...").split()
    if names[0] == "self":  # called by position
        assert found[: len(names)] == names
    assert set(names) <= set(found)
    assert used.endswith("...") or found == names


@pytest.mark.parametrize(
    ("module", "line"),
    [
        # By keyword, all of it: ours takes the rest as **_.
        ("models.gpt.gpt_model",
         "return self._postprocess(\n            hidden_states=hidden_states,"),
        # Set by us, read there.
        ("optimizer.optimizer", "self.grad_stats_parallel_group"),
        ("optimizer.optimizer", "(self, 'tp_group'"),
        ("optimizer.optimizer", "self._copy_main_params_to_model_params()"),
        *(("optimizer.distrib_optimizer", f"            self.{name},\n")
          for name in ("model_float16_groups", "model_fp32_groups", "shard_fp32_groups",
                       "shard_fp32_from_float16_groups")),
        # Ours passes it the count of steps, which it requests and does not load.
        ("optimizer.distrib_optimizer",
         "for key in dst_tensors:\n                dst_tensors[key].copy_(tensors[key])"),
        # One tensor for the counts of all parameters: ours counts out of place.
        ("optimizer.distrib_optimizer", 's["step"] = step'),
        ("optimizer.distrib_optimizer", "if not HAVE_APEX_OR_TE:"),
        # Where one of these is gone, remove the patch from platform.
        ("dist_checkpointing.strategies.filesystem_async", 'mp.get_context("spawn")'),
        ("tensor_parallel.random", "def _get_cuda_rng_state(\n"),
        ("tensor_parallel.random", "torch.cuda.default_generators[idx]"),
        ("tensor_parallel.random", "def _set_cuda_rng_state(new_state"),
        ("optimizer.optimizer", "'torch.cuda.FloatTensor'"), ("jit", "torch.compile"),
    ],
)  # fmt: skip
def test_lines_that_we_replace_or_rely_on(module, line):
    assert line in inspect.getsource(importlib.import_module(f"megatron.core.{module}"))


def test_a_sharded_optimizer_keeps_its_count_of_steps_beside_apex(monkeypatch):
    from megatron.core.optimizer import distrib_optimizer

    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    with megatron_core.torch_optimizer_state():
        assert distrib_optimizer.HAVE_APEX_OR_TE is False
    assert distrib_optimizer.HAVE_APEX_OR_TE is True


def test_the_layer_spec_has_the_modules_we_replace():
    layer = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm").submodules
    for name in ("input_layernorm", "pre_mlp_layernorm"):
        assert hasattr(layer, name)
    for name in ("core_attention", "q_layernorm", "k_layernorm"):
        assert hasattr(layer.self_attention.submodules, name)


def calculate_loss(output, function, *, collect: bool) -> tuple:
    stored: list = []
    found = schedules.forward_step_calc_loss(
        model=None, output_tensor=output, loss_func=function, vp_stage=None,
        config=SimpleNamespace(calculate_per_token_loss=True, timers=None),
        collect_non_loss_data=collect, num_microbatches=5, forward_data_store=stored,
        cp_group_size=1, is_last_stage=True,
    )  # fmt: skip
    return found, stored


def test_the_loss_function_returns_a_sum_and_its_count_or_collected_data():
    """(sum, count, report): the sum is not divided when the loss is computed per token."""
    three = lambda x: (x.sum(), torch.tensor(2, dtype=torch.int32), "report")  # noqa: E731
    (total, count), stored = calculate_loss(torch.tensor([1.0, 2.0]), three, collect=False)
    assert (total.item(), count.item(), stored) == (3.0, 2, ["report"])
    both = lambda output, non_loss_data: (output, non_loss_data)  # noqa: E731
    assert calculate_loss("hidden", both, collect=True)[1] == [("hidden", True)]
