"""Times contenders in turn, round by round, so that a disturbance of the machine hits all alike;
measures the peak memory of a pass.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Times:
    """Nanoseconds of each round, over a given number of units."""

    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def least(self) -> float:
        return min(self.values)


def interleave(
    work: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    each: int,
    device: torch.device,
    warm_up: bool = True,
) -> dict[str, Times]:
    """Run each once unmeasured, then ``rounds`` times in turn: nanoseconds over ``each``."""
    times = {name: Times() for name in work}
    for run in work.values() if warm_up else ():
        run()
    for _ in range(rounds):
        for name, run in work.items():
            finish(device)
            start = time.perf_counter_ns()
            run()
            finish(device)
            times[name].values.append((time.perf_counter_ns() - start) / each)
    return times


@dataclass(frozen=True)
class Measured:
    """Seconds, of CPU time on a CPU, and peak memory in bytes of each round."""

    seconds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def add(self, run: Callable[[], object], device: torch.device) -> None:
        clock = time.process_time if device.type == "cpu" else time.perf_counter

        def timed() -> None:
            start = clock()
            run()
            finish(device)
            self.seconds.append(clock() - start)

        gc.collect()
        if device.type == "cpu":
            ctypes.CDLL(None).malloc_trim(0)  # what earlier arms freed is no longer resident
        self.memory.append(peak_bytes(timed, device))


def finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def machine(device: torch.device) -> str:
    """The device, or the processor with its load."""
    if device.type != "cpu":
        return torch.cuda.get_device_name(device)
    named = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    name = named[1] if named else platform.machine()
    load = os.getloadavg()[0]
    return f"{name}, {os.cpu_count()} cores, load {load:.1f} at the start"


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Peak bytes of one ``run``; exact only in a process whose allocator holds no free memory.

    CPU: the kernel's high-water mark of resident memory (VmHWM), reset before the run. Other
    devices: their allocator's peak.
    """
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        run()
        torch.accelerator.synchronize(device)
        return torch.accelerator.max_memory_allocated(device) - before
    _CLEAR.write_text("5")
    before = _kib(_STATUS, "VmRSS")
    run()
    return 1024 * (_kib(_STATUS, "VmHWM") - before)


def available_bytes() -> int:
    """Free memory by the kernel's estimate."""
    return _kib(Path("/proc/meminfo"), "MemAvailable") * 1024


def _kib(path: Path, name: str) -> int:
    lines = path.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))
