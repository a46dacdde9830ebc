"""Compiled backends, and the choice of one: by name, or the best that can run for a tensor.

A backend chosen by name runs or is refused with the reason; it is never replaced by another. "auto"
is the one compiled for the tensor's device, or else one that runs anywhere; ``describe`` names it,
and the reason if it is not the fastest, for the caller to print once. A backend that is installed
and cannot be loaded is an error, also under "auto".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from megatron_replay.errors import ConfigError
from megatron_replay.kernels.layers import TORCH_LAYERS, LayerBackend
from megatron_replay.kernels.packed_attention import TORCH_ATTENTION, AttentionBackend
from megatron_replay.loss.backends import HeadBackend
from megatron_replay.loss.blocks import DENSE, UNION
from megatron_replay.optional import BUILD, optional_module
from megatron_replay.selection.shard_selection import TORCH_SELECTION, SelectionBackend

Backend = TypeVar("Backend")

#: The type of device that each compiled backend runs on.
DEVICE = {"cpu": "cpu", "triton": "cuda", "ascend": "npu"}
_CPU, _ASCEND = f"{__name__}._cpu", f"{__name__}._ascend"
#: What a compiled backend needs, unless its ``Backends.needs`` says otherwise.
_NEEDS = {"cpu": _CPU, "triton": "triton", "ascend": _ASCEND}
_INSTALL = {
    _CPU: BUILD,
    _ASCEND: f"source CANN's set_env.sh, then {BUILD} (csrc/ascend/README.md)",
    "triton": "pip install triton",
    "torch_npu": "pip install torch_npu, of the release for your CANN (docs/ascend.md)",
}
_ALL = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True, eq=False)
class Backends(Generic[Backend]):
    """The backends of one piece of work.

    Attributes:
        what: the work, for messages.
        anywhere: backends that run on any tensor, by name; "auto" is the last of them where no
            compiled one can run.
        compiled: the dtypes of each compiled backend, by name.
        module: of a compiled backend, ``kernels/<name>_<module>.py``.
        bind: makes the backend out of its name and module; its module's ``backend()``.
        contiguous: whether compiled backends need contiguous tensors.
        needs: the module that a backend needs, where it is not that of ``_NEEDS``.
    """

    what: str
    anywhere: Mapping[str, Backend]
    compiled: Mapping[str, tuple[torch.dtype, ...]]
    module: str
    bind: Callable[[str, Any], Backend] = lambda _, module: module.backend()
    contiguous: bool = False
    needs: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The names that ``choose`` accepts."""
        return ("auto", *self.anywhere, *self.compiled)

    def resolve(self, name: str, like: Tensor) -> str:
        """``name``, or for "auto" the best backend that can run for tensors such as ``like``.

        Raises:
            ConfigError: no such backend, it cannot run for ``like``, or it cannot be loaded.
        """
        if name not in self.names:
            raise ConfigError(
                f"no such backend of {self.what}", expected=", ".join(self.names), found=repr(name)
            )
        if name == "auto":
            best = self.best(like)
            return list(self.anywhere)[-1] if best is None or self.why_not(best, like) else best
        if reason := self.why_not(name, like):
            raise ConfigError(
                f"{self.what}: the {name} backend cannot run",
                expected=f"tensors of {self._dtypes(name)} on {DEVICE[name]}, and compiled kernels",
                found=reason,
                fix="Choose auto, or " + " or ".join(self.anywhere),
            )
        return name

    def choose(self, name: str, like: Tensor) -> Backend:
        """The backend that ``resolve`` names."""
        name = self.resolve(name, like)
        return self.anywhere[name] if name in self.anywhere else cast(Backend, load(self, name))

    def why_not(self, name: str, *tensors: Tensor) -> str | None:
        """Why the backend cannot run for ``tensors``; None where it can. Raises as ``load``."""
        if name in self.anywhere:
            return None
        for tensor in tensors:
            if tensor.device.type != DEVICE[name]:
                return f"a tensor on {tensor.device}, where it runs on {DEVICE[name]}"
            if tensor.dtype not in self.compiled[name]:
                return f"a tensor of {tensor.dtype}, where it takes {self._dtypes(name)}"
            if self.contiguous and not tensor.is_contiguous():
                return "a tensor that is not contiguous"
        found = load(self, name)
        return found if isinstance(found, str) else None

    def describe(self, name: str, like: Tensor) -> str:
        """The backend for tensors such as ``like``, and why it is not a faster one; for logs."""
        chosen, best = self.resolve(name, like), self.best(like)
        if name != "auto" or best is None or best == chosen:
            return f"{chosen} kernels"
        return f"{chosen} kernels, not the faster {best} ones: {self.why_not(best, like)}"

    def best(self, like: Tensor) -> str | None:
        """The backend compiled for the device of ``like``, whether it can run or not; or None."""
        return next((x for x in self.compiled if DEVICE[x] == like.device.type), None)

    def _dtypes(self, name: str) -> str:
        return " or ".join(map(str, self.compiled[name]))


@functools.cache
def load(backends: Backends[Backend], name: str) -> Any:
    """The compiled backend, imported at its first use; or a string, if it is not installed.

    Raises:
        ConfigError: it is installed and cannot be imported.
    """
    needed = backends.needs.get(name, _NEEDS[name])
    install = _INSTALL[needed]
    if optional_module(needed, install=install) is None:
        return f"{needed} is not installed (to install it: {install})"
    module = optional_module(f"{__name__}.{name}_{backends.module}", install=install)
    return backends.bind(name, module)


#: The restricted head; "torch" is its definition, at the cost of the full softmax.
HEAD = Backends[HeadBackend](
    what="the restricted head", anywhere={"torch": DENSE, "union": UNION},
    compiled={"cpu": _ALL[:2], "triton": _ALL, "ascend": _ALL}, module="head",
)  # fmt: skip
#: Candidate selection in Stage 0.
SELECTION = Backends[SelectionBackend](
    what="candidate selection", anywhere={"torch": TORCH_SELECTION},
    compiled={"cpu": _ALL, "triton": _ALL, "ascend": _ALL}, module="selection",
)  # fmt: skip
#: Attention inside documents.
ATTENTION = Backends[AttentionBackend](
    what="attention", anywhere={"torch": TORCH_ATTENTION},
    compiled={"ascend": _ALL}, module="attention", needs={"ascend": "torch_npu"},
)  # fmt: skip
#: Norm, activation and rotation of a layer.
LAYERS = Backends[LayerBackend](
    what="norm, activation and rotation", anywhere={"torch": TORCH_LAYERS},
    compiled={"ascend": _ALL}, module="layers", needs={"ascend": "torch_npu"},
)  # fmt: skip
