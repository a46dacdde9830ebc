"""torch_npu's fused operators, by their stand-ins, in a process that computes on the CPU."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from unittest import mock

from megatron_replay import kernels
from tests.npu_stub import fusion_attention, layers

_BACKENDS = [f"{kernels.__name__}.ascend_{name}" for name in ("attention", "layers")]
_OPERATORS = types.SimpleNamespace(
    npu_fusion_attention=fusion_attention.npu_fusion_attention,
    npu_rms_norm=layers.npu_rms_norm,
    npu_rotary_mul=layers.npu_rotary_mul,
    npu_swiglu=layers.npu_swiglu,
)


@contextlib.contextmanager
def chosen() -> Iterator[None]:
    """While it lasts, "auto" chooses them for tensors on the CPU."""
    with (
        mock.patch.dict(kernels.DEVICE, {"ascend": "cpu"}),
        mock.patch.object(kernels, "load", kernels.load.__wrapped__),
    ):
        theirs = {name: sys.modules.pop(name, None) for name in ("torch_npu", *_BACKENDS)}
        sys.modules["torch_npu"] = _OPERATORS  # type: ignore[assignment]
        try:
            yield
        finally:
            for name, module in theirs.items():
                sys.modules.pop(name, None)
                if module is not None:
                    sys.modules[name] = module
