"""Checks of a machine for tools/doctor.py: one function for each finding.

A check reads a ``Machine``, so that tests can pass another root directory and other variables.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform as host
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_replay.errors import ReplayError
from megatron_replay.platform import cann, select
from megatron_replay.platform.devices import Platform

#: Recommended environment of runs on NPUs: value and reason. docker/ascend.Dockerfile sets it.
VARIABLES = {
    "HCCL_CONNECT_TIMEOUT": ("3600", "ranks load for minutes; 120 s is the default"),
    "HCCL_EXEC_TIMEOUT": ("3600", "saving a checkpoint keeps the others waiting"),
    "CUDA_DEVICE_MAX_CONNECTIONS": ("1", "collectives start before the products they hide in"),
    "PYTORCH_NPU_ALLOC_CONF": ("expandable_segments:True", "less memory lost to fragments"),
    "TASK_QUEUE_ENABLE": ("2", "the host launches ahead of the device"),
    "CPU_AFFINITY_CONF": ("1", "ranks keep to their own cores"),
}
#: Packages that CANN's installation guide names beside those that this project needs; setup.py
#: installs them with the extra "npu".
CANN_IMPORTS = ("attrs", "decorator", "scipy", "sympy", "cffi", "protobuf", "absl-py")
#: Device files that a container needs in addition to /dev/davinci0 and so on.
_SHARED_DEVICES = ("davinci_manager", "devmm_svm", "hisi_hdc")
_SMI = tuple(f"{place}/npu-smi" for place in ("usr/local/bin", "usr/local/sbin", "usr/bin"))


@dataclass(frozen=True)
class Finding:
    """The result of a check: what was found of ``subject``, and what to do about it.

    An error prevents runs; a warning may slow or break them.
    """

    subject: str
    status: Literal["ok", "warning", "error"]
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Machine:
    """The machine below ``root`` (in place of /), with the variables of ``environment``."""

    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def distribution(self, name: str) -> str | None:
        """The version of an installed Python package; None if it is not installed."""
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    def devices(self) -> list[Path]:
        """/dev/davinci0 and so on."""
        return sorted((self.root / "dev").glob("davinci[0-9]*"))

    def is_ascend(self) -> bool:
        """Whether an Ascend device, CANN or torch_npu is here."""
        has_cann = cann.home(self.root, self.environment) is not None
        return has_cann or bool(self.devices()) or self.distribution("torch_npu") is not None


def chosen_platform(name: str) -> tuple[Finding, Platform | None]:
    """The platform that runs use for ``--platform name``; None if it cannot be used."""
    try:
        chosen = select(name)
    except ReplayError as error:
        return Finding("platform", "error", str(error), "Fix it, or use --platform cpu"), None
    why = "chosen by name" if name != "auto" else "the first of npu, cuda, cpu that is here"
    if chosen.validated:
        return Finding("platform", "ok", f"{chosen.name}: {why}"), chosen
    advice = "This project has not been run on it: compare a short run with --platform cpu"
    return Finding("platform", "warning", f"{chosen.name}: {why}", advice), chosen


def ascend_versions(machine: Machine) -> Finding:
    """CANN, torch_npu, torch and Python fit each other, and set_env.sh was sourced."""
    subject = "CANN and torch_npu"
    torch_npu = machine.distribution("torch_npu")
    place = cann.home(machine.root, machine.environment)
    if place is None:
        advice = "Install CANN, or start the container from a CANN image (docker/run.sh)"
        return Finding(subject, "error", f"torch_npu {torch_npu}, no CANN", advice)
    release = cann.version(place)
    found = f"CANN {release or 'of unknown version'} in {place}, torch_npu {torch_npu or 'none'}"
    if torch_npu is None:
        releases = ", ".join(cann.COMPATIBLE.get(release or "", ())) or "see docs/ascend.md"
        return Finding(subject, "error", found, f"pip install torch_npu== one of: {releases}")
    if release is None:
        advice = "Check by hand: no ascend_toolkit_install.info names the release of CANN"
        return Finding(subject, "warning", found, advice)
    python = ".".join(host.python_version_tuple()[:2])
    status, reason = cann.compare(release, torch_npu, python)
    if status == "error":
        return Finding(subject, "error", f"{found}: {reason}", "Install a pair of docs/ascend.md")
    torch = (machine.distribution("torch") or "none").partition("+")[0]
    if torch != cann.torch_for(torch_npu):
        # torch_npu's wheels for x86 require torch's CPU build by name.
        cpu = "--index-url https://download.pytorch.org/whl/cpu"
        advice = f"pip install torch=={cann.torch_for(torch_npu)} {cpu}"
        return Finding(subject, "error", f"{found}, torch {torch}", advice)
    if not machine.environment.get("ASCEND_HOME_PATH"):
        advice = f"source {place}/set_env.sh, or its parent's"
        return Finding(subject, "error", f"{found}; set_env.sh was not sourced", advice)
    if status == "warning":
        advice = "If torch_npu fails with an undefined symbol, install that pair"
        return Finding(subject, "warning", f"{found}: {reason}", advice)
    return Finding(subject, "ok", found)


def ascend_devices(machine: Machine) -> Finding:
    """Device files, driver and npu-smi, which a container needs from its host."""
    subject = "Ascend devices"
    devices = machine.devices()
    if not devices:
        advice = "In a container: start it by docker/run.sh. On the host: install the driver"
        return Finding(subject, "error", "no /dev/davinci*", advice)
    found = f"{len(devices)} in /dev"
    closed = [path.name for path in devices if not os.access(path, os.R_OK | os.W_OK)]
    if closed:
        advice = "Run as root, or add the user to the group that owns them (HwHiAiUser)"
        return Finding(subject, "error", f"{found}, no access to {', '.join(closed)}", advice)
    wanted = [f"dev/{name}" for name in _SHARED_DEVICES] + ["usr/local/Ascend/driver"]
    missing = [f"/{path}" for path in wanted if not (machine.root / path).exists()]
    if missing:
        advice = "Pass them to the container (docker/run.sh does)"
        return Finding(subject, "error", f"{found}, without {', '.join(missing)}", advice)
    if not any((machine.root / path).exists() for path in _SMI):
        return Finding(subject, "warning", f"{found}, no npu-smi", "Mount it (docker/run.sh does)")
    return Finding(subject, "ok", f"{found}, driver and npu-smi")


def ascend_python(machine: Machine) -> Finding:
    """CANN's own Python modules, and the packages that they import, can be found.

    Where they cannot, operators that CANN compiles at run time fail with EC0010 or 500001.
    """
    subject = "CANN's Python modules"
    home = cann.home(machine.root, machine.environment)
    listed = machine.environment.get("PYTHONPATH", "").split(os.pathsep)
    folders = [(machine.root / folder.lstrip("/")).resolve() for folder in listed if folder]
    found = [x for x in folders if home and x.is_relative_to(home.resolve()) and x.is_dir()]
    if not found:
        advice = "Source CANN's set_env.sh, after the virtual environment was activated"
        return Finding(subject, "warning", "no folder of CANN in PYTHONPATH", advice)
    missing = [name for name in CANN_IMPORTS if machine.distribution(name) is None]
    if missing:
        advice = f"pip install {' '.join(missing)}: a virtual environment has none of the system's"
        return Finding(subject, "warning", f"they import {', '.join(missing)}", advice)
    release, numpy = home and cann.version(home), machine.distribution("numpy")
    if release and numpy and not cann.runs_with_numpy(release, numpy):
        advice = "pip install 'numpy<2', if the first use of a device fails with 500001"
        return Finding(subject, "warning", f"of CANN {release}, with numpy {numpy}", advice)
    return Finding(subject, "ok", f"in {', '.join(map(str, found))}")


def ascend_environment(machine: Machine) -> Finding:
    """The variables that ``VARIABLES`` lists."""
    subject = "Ascend environment"
    other = [
        f"{name}={value} ({why}; now {machine.environment.get(name, 'unset')})"
        for name, (value, why) in VARIABLES.items()
        if machine.environment.get(name) != value
    ]
    both = ("PYTORCH_ALLOC_CONF", "PYTORCH_NPU_ALLOC_CONF")
    if all(machine.environment.get(name) for name in both):
        advice = f"unset {both[0]}: newer torch_npu ends programs that are given both"
        return Finding(subject, "warning", f"both {' and '.join(both)} are set", advice)
    if other:
        found = f"{len(other)} of {len(VARIABLES)} variables are not as recommended"
        return Finding(subject, "warning", found, "export " + "; ".join(other))
    return Finding(subject, "ok", f"all {len(VARIABLES)} variables as recommended")


def memory(machine: Machine) -> Finding:
    """Memory of the host that is not in use."""
    lines = (machine.root / "proc/meminfo").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1e6 for line in lines if ":" in line}
    found = f"{sizes['MemAvailable']:.0f} of {sizes['MemTotal']:.0f} GB available"
    if sizes["MemAvailable"] < 4:
        return Finding("memory", "warning", found, "Converting a 4B model needs about 8 GB a rank")
    return Finding("memory", "ok", found)


def space(folder: Path) -> Finding:
    """Free disk where runs write; the folder may not exist yet."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free / 1e9
    found = f"{free:.0f} GB free in {folder}"
    if free < 20:
        advice = "A checkpoint with optimizer state of a 4B model takes 56 GB: choose another disk"
        return Finding("disk", "error" if free < 1 else "warning", found, advice)
    return Finding("disk", "ok", found)


#: The finding on a machine with nothing of Ascend.
NO_ASCEND = Finding("Ascend", "ok", "no Ascend device, CANN or torch_npu here")
#: The checks of one with anything of it, in the doctor's order.
ASCEND_CHECKS = (ascend_versions, ascend_python, ascend_devices, ascend_environment)
