"""The three platforms: what this project needs of a kind of device and its collectives."""

from __future__ import annotations

import abc
import importlib
import importlib.util
import os
import resource
import time
import warnings
from typing import Any, ClassVar

import torch
from torch.profiler import ProfilerActivity

from megatron_replay.errors import ConfigError
from megatron_replay.platform.megatron_core import check_version, install

#: An NPU is free again so long after the process that used it has ended.
RESTART_SECONDS = 10.0


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

    @classmethod
    def communicator_bytes(cls) -> int:
        """Device memory that the collectives of each process group hold; 0 where it is small."""
        return 0

    def profiler(self) -> Any:
        """A profiler of host and device with torch.profiler's start, stop, export_chrome_trace."""
        return torch.profiler.profile(activities=[ProfilerActivity.CPU])


def _require_device(devices: Any, local_rank: int, variable: str) -> None:
    """Raise ConfigError unless this node has a device for each of its processes."""
    if local_rank >= devices.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no device",
            expected=f"a visible device ({variable}) for each process of --nproc_per_node",
            found=f"{devices.device_count()} devices, {variable}={os.environ.get(variable, '')}",
        )


class CPU(Platform):
    """The host's processors with gloo; always there, and the reference for the other two."""

    name = "cpu"
    communication_backend = "gloo"
    validated = True

    @classmethod
    def available(cls) -> bool:
        """Every machine has one."""
        return True

    def prepare(self, local_rank: int = 0) -> None:
        """Give megatron-core a stand-in for the accelerator it expects."""
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
        """Bind this process to GPU ``local_rank``; megatron-core needs no patch."""
        check_version()
        # One hardware queue, so that a collective starts before the product that it overlaps with.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        _require_device(torch.cuda, local_rank, "CUDA_VISIBLE_DEVICES")
        self.device = torch.device("cuda", local_rank)
        torch.cuda.set_device(self.device)

    def peak_memory_bytes(self) -> int:
        """Peak bytes of the caching allocator."""
        return torch.cuda.max_memory_allocated(self.device)

    def profiler(self) -> Any:
        """Records kernels and copies as well as the host's calls."""
        return torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])


class NPU(Platform):
    """It needs CANN, its set_env.sh sourced, and the torch_npu release made for that CANN."""

    # With HCCL, through torch_npu and without MindSpeed. Not run on an NPU yet.
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
        except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: beside a CUDA torch
            # Otherwise "auto" would choose the CPU, and the run would be days slower.
            raise ConfigError(
                f"torch_npu is installed and cannot be imported: {str(error).splitlines()[0]}",
                where="--platform",
                fix="Source CANN's set_env.sh, install torch's CPU build (docs/ascend.md), or give "
                "--platform cpu",
            ) from error
        return bool(_npu().is_available())

    def prepare(self, local_rank: int = 0) -> None:
        """Bind this process to NPU ``local_rank``.

        ``transfer_to_npu`` maps cuda to npu and nccl to hccl everywhere in torch, except in the
        result of ``Tensor.type()``, which megatron-core compares with ``torch.cuda.FloatTensor``,
        and in the RNG tracker's ``default_generators``. ``install`` patches both.

        After a restart by torchrun it waits first: HCCL's error EJ0001 asks for so many seconds
        between the end of one process on a device and the start of the next.
        """
        is_first = self.device.type == "cpu"
        if is_first and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            time.sleep(RESTART_SECONDS)
        # Its import sets a filter that shows every warning, then warns at length: discard both.
        with warnings.catch_warnings(record=True):
            importlib.import_module("torch_npu.contrib.transfer_to_npu")
        _require_device(_npu(), local_rank, "ASCEND_RT_VISIBLE_DEVICES")
        self.device = torch.device("npu", local_rank)
        _npu().set_device(self.device)
        install(_npu(), self.device, extra={})

    @classmethod
    def communicator_bytes(cls) -> int:
        """A buffer of HCCL_BUFFSIZE MiB to send and one to receive (CANN's documentation).

        Raises:
            ConfigError: that is no number above 0.
        """
        size = os.environ.get("HCCL_BUFFSIZE") or "200"
        if not size.isdecimal() or int(size) < 1:
            raise ConfigError(
                "no size", where="HCCL_BUFFSIZE", expected="a number of MiB", found=size
            )
        return 2 * int(size) << 20

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
