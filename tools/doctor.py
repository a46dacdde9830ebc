"""Look over this machine: versions, devices, variables, kernels, a collective, the head's numbers.

    python tools/doctor.py
    python tools/doctor.py --json

Each finding is ok, a warning or an error, with what to do. The exit code is 1 where there is an
error.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import multiprocessing
import os
import platform as host
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# With an accelerator's extension installed and its libraries missing, even torch fails to load.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

try:
    from megatron_replay.platform import Platform, examination
    from megatron_replay.platform.examination import Finding, Machine
    from megatron_replay.platform.megatron_core import SUPPORTED_VERSION
except (ImportError, OSError) as error:
    sys.exit(f"ERROR   torch: {error}\n        Run make setup, or pip install torch")

_MARKS = {"ok": "ok     ", "warning": "WARNING", "error": "ERROR  "}


def versions(machine: Machine) -> Iterator[Finding]:
    """Python and the packages that matter."""
    python = host.python_version()
    old = sys.version_info < (3, 10)
    yield Finding("Python", "error" if old else "ok", python, "Use 3.10 or 3.11" if old else "")
    for name, wanted in (("torch", None), ("megatron-core", SUPPORTED_VERSION)):
        found = machine.distribution(name)
        if found is None or wanted not in (None, found):
            advice = f"pip install {name}" + (f"=={wanted}" if wanted else "")
            yield Finding(name, "error", found or "not installed", advice)
        else:
            yield Finding(name, "ok", found)
    found = machine.distribution("transformers")
    if found is None or tuple(map(int, found.split(".")[:2])) < (4, 51):
        advice = "pip install 'transformers>=4.51', the first with Qwen3"
        yield Finding("transformers", "error", found or "not installed", advice)
    else:
        yield Finding("transformers", "ok", found)


def megatron_path(machine: Machine) -> Finding:
    """Whether ``megatron`` is megatron-core's wheel and nothing else."""
    places = package_folders("megatron")
    if not places:
        return Finding("megatron", "error", "not importable", "pip install megatron-core==0.16.1")
    strangers = [str(p) for p in places if (p / "training").is_dir() or (p / "legacy").is_dir()]
    if strangers:
        advice = "Take Megatron-LM's source off PYTHONPATH: only megatron-core's wheel is used"
        return Finding("megatron", "error", f"Megatron-LM in {', '.join(strangers)}", advice)
    cores = [str(place) for place in places if (place / "core").is_dir()]
    releases = [_release(Path(core)) for core in cores]
    if len(cores) == 1 and releases[0] not in (None, SUPPORTED_VERSION):
        advice = f"Take it off PYTHONPATH, or pip install megatron-core=={SUPPORTED_VERSION}"
        return Finding("megatron", "error", f"core {releases[0]} in {cores[0]}", advice)
    if len(cores) > 1:
        advice = "Keep one: the first on the path wins, whatever pip says"
        return Finding("megatron", "error", f"several: {', '.join(cores)}", advice)
    return Finding("megatron", "ok", cores[0] if cores else str(places[0]))


def _release(place: Path) -> str | None:
    """What megatron-core in ``place`` says it is, whatever pip has installed."""
    file = place / "core" / "package_info.py"
    text = file.read_text() if file.is_file() else ""
    numbers = [re.search(rf"^{part} = (\d+)", text, re.M) for part in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(number[1] for number in numbers if number) or None


def transformer_engine(machine: Machine) -> Finding:
    """megatron-core takes other paths where Transformer Engine is importable."""
    places = package_folders("transformer_engine")
    if not places:
        return Finding("Transformer Engine", "ok", "not installed, and not needed")
    status: Any = "error" if machine.is_ascend() else "warning"
    advice = "pip uninstall transformer-engine: layers here are megatron-core's local ones"
    return Finding("Transformer Engine", status, str(places[0]), advice)


def mindspeed(machine: Machine) -> Finding:
    """MindSpeed patches megatron when imported; nothing here imports it."""
    if "mindspeed" in sys.modules:
        advice = "Find what imports it (sitecustomize, a .pth file): it patches megatron"
        return Finding("MindSpeed", "error", "already imported", advice)
    places = package_folders("mindspeed")
    found = f"in {places[0]}, not imported" if places else "not installed, and not needed"
    return Finding("MindSpeed", "ok", found)


def apex(machine: Machine) -> Finding:
    """NVIDIA's and Ascend's apex are extensions for training; PyPI's is a web toolkit."""
    places = package_folders("apex")
    if not places:
        return Finding("apex", "ok", "not installed, and not needed")
    parts = ("amp", "optimizers", "normalization", "multi_tensor_apply", "contrib")
    if not any((places[0] / part).is_dir() for part in parts):
        advice = "pip uninstall apex: PyPI's package of that name has nothing to do with training"
        return Finding("apex", "warning", f"another package, in {places[0]}", advice)
    return Finding("apex", "ok", f"in {places[0]}")


def package_folders(name: str) -> list[Path]:
    """Where a package would be imported from, without importing it; [] if it would not be."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return []
    return [] if spec is None else list(map(Path, spec.submodule_search_locations or []))


def compiled_kernels(platform: Platform) -> Iterator[Finding]:
    """Which of the forms made for the platform's device can be loaded."""
    from megatron_replay import kernels
    from megatron_replay.kernels.registry import DEVICE

    for forms in (kernels.HEAD, kernels.OPTIMIZER, kernels.SELECTION):
        for name in (name for name in forms.compiled if DEVICE[name] == platform.name):
            reason = forms.why_not(name)
            subject = f"kernels of {forms.what}"
            if reason:
                advice = "Runs go on with slower ones; pip install -e . --no-build-isolation"
                yield Finding(subject, "warning", f"{name}: {reason}", advice)
            else:
                yield Finding(subject, "ok", name)


def collective(platform: Platform, *, method: str | None = None, timeout: float = 120.0) -> Finding:
    """Two processes add up one number each.

    They start afresh on accelerators, which do not survive a fork once they were used, and where
    this process has threads: a fork copies the locks that they hold.
    """
    subject = f"two ranks over {platform.communication_backend}"
    is_alone = os.listdir("/proc/self/task") == [str(os.getpid())]
    method = method or ("fork" if platform.name == "cpu" and is_alone else "spawn")
    context: Any = multiprocessing.get_context(method)
    answers = context.SimpleQueue()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(
                target=_add_up, args=(rank, folder, platform, answers, timeout / 4), daemon=True
            )
            for rank in range(2)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(max(0.1, timeout - (time.monotonic() - start)))
        hanging = [rank for rank in ranks if rank.is_alive()]
        for rank in hanging:
            rank.kill()
        sums = [answers.get() for _ in ranks if not answers.empty()]
    advice = "Check the network, the variables above, and that no other run holds the devices"
    if hanging:
        return Finding(subject, "error", f"no answer in {timeout:.0f} s", advice)
    if sums != [3.0, 3.0]:
        return Finding(subject, "error", f"expected 3 and 3, found {sums}", advice)
    return Finding(subject, "ok", f"1 + 2 = 3, {time.monotonic() - start:.1f} s")


def _add_up(rank: int, folder: str, platform: Platform, answers: Any, timeout: float) -> None:
    import torch
    import torch.distributed as dist

    try:
        torch.set_num_threads(1)
        if platform.name != "cpu":
            platform.prepare(rank)
        dist.init_process_group(
            platform.communication_backend,
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=2,
            timeout=datetime.timedelta(seconds=timeout),
        )
        number = torch.full((1,), rank + 1.0, device=platform.device)
        dist.all_reduce(number)
        answers.put(number.item())
    except Exception as error:
        answers.put(f"{type(error).__name__}: {error}"[:200])


def head_smoke(platform: Platform) -> Finding:
    """The restricted head's loss and gradients against its definition in float64."""
    import torch

    from megatron_replay import kernels
    from megatron_replay.loss.definition import restricted_cross_entropy_dense
    from megatron_replay.loss.sharded import restricted_cross_entropy

    start = time.monotonic()
    if platform.name != "cpu":
        platform.prepare(0)
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(48, 64, generator=generator)
    weight_VH = torch.randn(512, 64, generator=generator) / 8
    chosen_TV = torch.rand(48, 512, generator=generator) < 0.1
    labels_T = torch.randint(0, 512, (48,), generator=generator)
    chosen_TV[torch.arange(48), labels_T] = True
    offsets = torch.nn.functional.pad(chosen_TV.sum(1).cumsum(0), (1, 0))
    ids = chosen_TV.nonzero()[:, 1].int()

    exact = [x.double().requires_grad_() for x in (hidden_TH, weight_VH)]
    wanted_T = restricted_cross_entropy_dense(exact[0] @ exact[1].T, chosen_TV, labels_T)
    wanted_T.mean().backward()

    ours = [x.to(platform.device).requires_grad_() for x in (hidden_TH, weight_VH)]
    name = kernels.HEAD.resolve("auto", ours[1])
    moved = (x.to(platform.device) for x in (ids, offsets, labels_T))
    loss_T = restricted_cross_entropy(*ours, *moved, backend=kernels.HEAD.choose("auto", ours[1]))
    loss_T.mean().backward()
    pairs = [(loss_T, wanted_T), *((x.grad, y.grad) for x, y in zip(ours, exact, strict=True))]
    error = max(
        float((x.detach().cpu().double() - y.detach()).abs().max() / y.detach().abs().max())
        for x, y in pairs
        if x is not None and y is not None
    )
    seconds = time.monotonic() - start
    found = f"{name} form on {platform.name}: off by {error:.1e} of float64, {seconds:.1f} s"
    if not error < 1e-5:
        advice = "Do not train: rebuild the kernels, or give --head-backend union"
        return Finding("head", "error", found, advice)
    return Finding("head", "ok", found)


def examine(machine: Machine, platform_name: str, folder: Path) -> Iterator[Finding]:
    """All findings, cheap ones first; one that fails itself is an error."""
    first, platform = examination.chosen_platform(platform_name)
    yield first
    yield from versions(machine)
    looks: list[Callable[[], Finding | Iterator[Finding]]] = [
        lambda: megatron_path(machine),
        lambda: transformer_engine(machine),
        lambda: mindspeed(machine),
        lambda: apex(machine),
        lambda: examination.ascend_versions(machine),
        lambda: examination.ascend_devices(machine),
        lambda: examination.ascend_environment(machine),
        lambda: examination.space(machine, folder),
        lambda: examination.memory(machine),
    ]
    if platform is not None:
        looks += [
            lambda: compiled_kernels(platform),
            lambda: collective(platform),
            lambda: head_smoke(platform),
        ]
    for look in looks:
        try:
            found = look()
            yield from [found] if isinstance(found, examination.Finding) else found
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:300]
            yield examination.Finding(
                "doctor", "error", text, "Mend what it names; it kept a finding from being made"
            )


def line(finding: Finding) -> str:
    """For a reader at a terminal."""
    text = f"{_MARKS[finding.status]} {finding.subject}: {finding.found}"
    return text + (f"\n        {finding.advice}" if finding.advice else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="doctor.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--platform", default="auto", help="as for the stages")
    parser.add_argument("--folder", type=Path, default=Path("."), help="where runs will write")
    options = parser.parse_args(arguments)
    findings = []
    for finding in examine(Machine(), options.platform, options.folder):
        findings.append(finding)
        if not options.json:
            print(line(finding), flush=True)
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    counts = [sum(f.status == status for f in findings) for status in ("error", "warning")]
    if not options.json:
        print(f"{counts[0]} errors, {counts[1]} warnings")
    return 1 if counts[0] else 0


if __name__ == "__main__":
    sys.exit(main())
