"""NVIDIA GPUs with NCCL, for which megatron-core needs no patch."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from megatron_replay.platform.base import Platform
from megatron_replay.platform.megatron_core import check_version


class CUDA(Platform):
    """It needs a CUDA build of torch and a visible GPU."""

    name = "cuda"
    communication_backend = "nccl"
    validated = False

    @classmethod
    def available(cls) -> bool:
        """Whether torch sees a GPU."""
        return torch.cuda.is_available()

    def prepare(self, local_rank: int = 0) -> None:
        """Bind this process to GPU ``local_rank``."""
        check_version()
        # One hardware queue, so that a collective starts before the product that it overlaps with.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        self.device = torch.device("cuda", local_rank)
        torch.cuda.set_device(self.device)

    def peak_memory_bytes(self) -> int:
        """Peak bytes of the caching allocator."""
        return torch.cuda.max_memory_allocated(self.device)

    def profiler(self) -> Any:
        """Records kernels and copies as well as the host's calls."""
        return torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
