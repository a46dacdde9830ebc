"""The interface of a platform."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import torch
from torch.profiler import ProfilerActivity


class Platform(abc.ABC):
    """A kind of device with its collectives.

    Attributes:
        name: "cpu", "cuda" or "npu".
        communication_backend: torch.distributed's name of its collectives.
        validated: False where this project has never run on it; printed at start.
    """

    name: ClassVar[str]
    communication_backend: ClassVar[str]
    validated: ClassVar[bool]

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    @classmethod
    @abc.abstractmethod
    def available(cls) -> bool:
        """Whether this machine has such a device and the software for it."""

    @abc.abstractmethod
    def prepare(self, local_rank: int = 0) -> None:
        """Choose the device of this process and make ``megatron.core`` importable on it.

        Must run before the first import of megatron; a second call does nothing.
        """

    @abc.abstractmethod
    def peak_memory_bytes(self) -> int:
        """Peak bytes that this process has held on its device (in host memory, for cpu)."""

    def profiler(self) -> Any:
        """A profiler of host and device with torch.profiler's start, stop, export_chrome_trace."""
        return torch.profiler.profile(activities=[ProfilerActivity.CPU])
