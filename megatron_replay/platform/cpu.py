"""CPU with gloo: the default of tests and quick start, and the reference for the other two."""

from __future__ import annotations

import resource

import torch

from megatron_replay.platform.base import Platform
from megatron_replay.platform.megatron_core import install


class CPU(Platform):
    """The host's processors; always there."""

    name = "cpu"
    communication_backend = "gloo"
    validated = True

    @classmethod
    def available(cls) -> bool:
        """Every machine has one."""
        return True

    def prepare(self, local_rank: int = 0) -> None:
        """Give megatron-core a stand-in for the accelerator it expects."""
        self.device = torch.device("cpu")
        install(
            torch.cpu,
            self.device,
            extra={
                "get_rng_state": lambda *_, **__: torch.get_rng_state(),
                "set_rng_state": lambda state, *_: torch.set_rng_state(state),
                "manual_seed": torch.manual_seed,
                "default_stream": torch.cpu.current_stream,
                "empty_cache": lambda: None,
            },
        )

    def peak_memory_bytes(self) -> int:
        """Peak resident set; Linux counts it in KiB."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
