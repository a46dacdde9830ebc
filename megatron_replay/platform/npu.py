"""Ascend NPUs with HCCL, through torch_npu and without MindSpeed. Not run on an NPU yet.

``transfer_to_npu`` maps cuda to npu and nccl to hccl everywhere in torch, except in the result of
``Tensor.type()``, which megatron-core compares with ``torch.cuda.FloatTensor``, and in the RNG
tracker's ``default_generators``. ``install`` patches both.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from typing import Any

import torch

from megatron_replay.errors import ConfigError
from megatron_replay.platform.base import Platform
from megatron_replay.platform.megatron_core import install


class NPU(Platform):
    """It needs CANN, its set_env.sh sourced, and the torch_npu release made for that CANN."""

    name = "npu"
    communication_backend = "hccl"
    validated = False

    @classmethod
    def available(cls) -> bool:
        """Whether torch_npu is installed and sees a device."""
        if importlib.util.find_spec("torch_npu") is None:
            return False
        try:
            importlib.import_module("torch_npu")
        except (ImportError, OSError) as error:
            # Otherwise "auto" would choose the CPU, and the run would be days slower.
            raise ConfigError(
                f"torch_npu is installed and cannot be imported: {error}",
                where="--platform",
                fix="Source CANN's set_env.sh, or give --platform cpu",
            ) from error
        return bool(_npu().is_available())

    def prepare(self, local_rank: int = 0) -> None:
        """Bind this process to NPU ``local_rank``; patch what ``transfer_to_npu`` leaves out."""
        # Its import sets a filter that shows every warning, then warns at length: discard both.
        with warnings.catch_warnings(record=True):
            importlib.import_module("torch_npu.contrib.transfer_to_npu")
        self.device = torch.device("npu", local_rank)
        _npu().set_device(self.device)
        install(_npu(), self.device, extra={})

    def peak_memory_bytes(self) -> int:
        """Peak bytes of torch_npu's caching allocator."""
        return int(_npu().max_memory_allocated(self.device))

    def profiler(self) -> Any:
        """torch_npu's profiler, which has the same interface."""
        profiler = importlib.import_module("torch_npu.profiler")
        activities = [profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.NPU]
        return profiler.profile(activities=activities)


def _npu() -> Any:
    """``torch.npu``, which exists after the import of torch_npu."""
    return getattr(torch, "npu")  # noqa: B009 - unknown to type checkers
