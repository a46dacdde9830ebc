"""Runs megatron-core 0.16.1 on a device that is not CUDA, without changing global torch.

megatron-core calls ``torch.cuda`` in some forty places (current_device, RNG states, streams) and
makes tensors with ``device="cuda"``. Inside its modules, and only there, the name ``torch`` is
bound to a stand-in whose ``cuda`` is the platform's own module. Two methods of Tensor are patched
as well, for callers in megatron-core only: ``Tensor.type()`` returns CUDA's spelling and
``Tensor.cuda()`` moves to the platform's device.

Every patched symbol is a private detail of that release. So the version is pinned and checked here,
and tests/test_platform.py fails when a symbol has gone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from megatron_replay.errors import ConfigError

SUPPORTED_VERSION = "0.16.1"
_PACKAGE = "megatron.core"
#: The parts that this project uses; imported once, without warnings.
_PARTS = ("distributed", "models.gpt.gpt_layer_specs", "optimizer", "pipeline_parallel")
_FACTORIES = "arange as_tensor empty empty_like full ones ones_like tensor zeros zeros_like".split()


class _Module(types.ModuleType):
    """A module with its own attributes first, then those of ``fallbacks``."""

    def __init__(self, name: str, *fallbacks: types.ModuleType) -> None:
        super().__init__(name)
        self.__dict__["_fallbacks"] = fallbacks

    def __getattr__(self, name: str) -> Any:
        for fallback in self.__dict__["_fallbacks"]:
            if hasattr(fallback, name):
                return getattr(fallback, name)
        raise AttributeError(name)


def install(
    device_module: types.ModuleType, device: torch.device, *, extra: dict[str, Any]
) -> None:
    """Bind ``torch`` inside megatron-core to a stand-in for ``device_module`` (torch.cpu, ...).

    Args:
        device_module: replaces ``torch.cuda`` for megatron-core.
        device: replaces "cuda" where megatron-core makes tensors.
        extra: functions that ``device_module`` lacks.

    Raises:
        ConfigError: megatron-core is of another release.
        RuntimeError: megatron.core was imported before.
    """
    global _installed
    if _installed:
        return
    check_version()
    if any(name.startswith(_PACKAGE) for name in sys.modules):
        raise RuntimeError("platform.prepare() must come before the first import of megatron.core")
    stand_in = _torch_stand_in(device_module, device, extra)
    sys.meta_path.insert(0, _ImportHook(lambda module: _rebind(module, stand_in)))
    _patch_tensor(stand_in, device)
    _import_quietly()
    _installed = True


_installed = False


def check_version() -> None:
    """Raise ConfigError unless megatron-core is the release that the patches are for."""
    try:
        found = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != SUPPORTED_VERSION:
        raise ConfigError(
            "unsupported megatron-core",
            expected=SUPPORTED_VERSION,
            found=found,
            fix=f"pip install megatron-core=={SUPPORTED_VERSION}",
        )


def _torch_stand_in(
    device_module: types.ModuleType, device: torch.device, extra: dict[str, Any]
) -> _Module:
    def redirected(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def make(*args: Any, **kwargs: Any) -> Any:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = device
            return factory(*args, **kwargs)

        return make

    stand_in = _Module("torch", torch)
    cuda = stand_in.__dict__["cuda"] = _Module("torch.cuda", device_module, torch.cuda)
    cuda.__dict__.update(extra)
    for name in _FACTORIES:
        setattr(stand_in, name, redirected(getattr(torch, name)))
    return stand_in


class _ImportHook(importlib.abc.MetaPathFinder):
    """Calls ``after`` on every module of megatron-core once it has been executed."""

    def __init__(self, after: Callable[[types.ModuleType], None]) -> None:
        self._after = after

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(_PACKAGE):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None or not hasattr(spec.loader, "exec_module"):
            return spec
        execute = spec.loader.exec_module

        def execute_and_rebind(module: types.ModuleType) -> None:
            execute(module)
            self._after(module)

        spec.loader.exec_module = execute_and_rebind  # type: ignore[method-assign]
        return spec


def _rebind(module: types.ModuleType, stand_in: _Module) -> None:
    if getattr(module, "torch", None) is torch:
        module.torch = stand_in  # type: ignore[attr-defined]
    if module.__name__ == f"{_PACKAGE}.tensor_parallel.random":
        # Same signatures, without torch.cuda.default_generators and the CUDA graph API.
        def get_state(
            device: int | str | torch.device = "cuda", clone: bool = False, graph_safe: bool = False
        ) -> torch.Tensor:
            state: torch.Tensor = stand_in.cuda.get_rng_state()
            return state

        def set_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
            stand_in.cuda.set_rng_state(new_state)

        module._get_cuda_rng_state = get_state  # type: ignore[attr-defined]
        module._set_cuda_rng_state = set_state  # type: ignore[attr-defined]


def _patch_tensor(stand_in: _Module, device: torch.device) -> None:
    original_type, original_cuda = torch.Tensor.type, torch.Tensor.cuda

    def called_by_megatron() -> bool:
        return sys._getframe(2).f_globals.get("torch") is stand_in

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original_type(self, *args, **kwargs)
        if isinstance(answer, str) and called_by_megatron():
            return "torch.cuda." + answer.rsplit(".", 1)[1]
        return answer

    def tensor_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if called_by_megatron():
            return self.to(device)
        return original_cuda(self, *args, **kwargs)

    torch.Tensor.type = tensor_type  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = tensor_cuda  # type: ignore[method-assign, assignment]


def _import_quietly() -> None:
    """Import the parts that we use, while ``torch.compile`` does nothing, without warnings.

    megatron-core decorates helpers with ``jit_fuser = torch.compile`` at import: on a CPU that
    loads inductor for nothing (3 s of import), on an NPU it fails. Its modules also warn that
    Transformer Engine and apex are absent, which is intended here.
    """

    def no_compile(function: Callable[..., Any] | None = None, **_: Any) -> Any:
        return function if function is not None else (lambda f: f)

    compile_, torch.compile = torch.compile, no_compile  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for part in _PARTS:
                importlib.import_module(f"{_PACKAGE}.{part}")
    finally:
        torch.compile = compile_
    # The RNG tracker warns when the CPU's generator is used inside a "GPU" context: on the CPU they
    # are the same. The linear layers require one CUDA queue, so that a collective starts before the
    # matmul it overlaps with; elsewhere the variable has no effect.
    logging.getLogger(f"{_PACKAGE}.tensor_parallel.random").setLevel(logging.ERROR)
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


@contextlib.contextmanager
def torch_optimizer_state() -> Iterator[None]:
    """Surround a distributed optimizer's ``state_dict`` and ``load_state_dict`` with this.

    Patches ``distrib_optimizer.HAVE_APEX_OR_TE``: where apex or Transformer Engine is installed,
    megatron-core treats every optimizer as one of theirs, which count steps in their groups. Ours
    counts them in its state, as torch's does, and would lose the count.
    """
    from megatron.core.optimizer import distrib_optimizer

    found = distrib_optimizer.HAVE_APEX_OR_TE
    distrib_optimizer.HAVE_APEX_OR_TE = False
    try:
        yield
    finally:
        distrib_optimizer.HAVE_APEX_OR_TE = found


def fuses_gradient_accumulation(device: torch.device) -> bool:
    """Whether the weight-gradient product can add to fp32 ``main_grad`` itself.

    megatron-core does so with an extension of NVIDIA's apex, used where it is installed. Neither
    Ascend's apex nor PyPI's package of that name has it. Not run.
    """
    if device.type != "cuda":
        return False
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
