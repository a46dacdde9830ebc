"""Times contenders in turn, round by round, so that a disturbance of the machine hits all alike."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch


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


def finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def machine(device: torch.device) -> str:
    """The device, or the processor with its load."""
    if device.type != "cpu":
        return torch.cuda.get_device_name(device)
    name = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor() or platform.machine(),
    )
    load = os.getloadavg()[0]
    return f"{name}, {os.cpu_count()} cores, load {load:.1f} at the start"
