"""Examine this machine: versions, devices, variables, kernels, a collective, the head.

    python tools/doctor.py
    python tools/doctor.py --json
    python tools/doctor.py --compare-gradients

Each finding is ok, a warning or an error, with what to do. The exit code is 1 if any is an error.
"""

from __future__ import annotations

import argparse
import datetime
import functools
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
    from megatron_replay.errors import ReplayError
    from megatron_replay.platform import Platform, cann, examination
    from megatron_replay.platform.examination import Finding, Machine
    from megatron_replay.platform.megatron_core import SUPPORTED_VERSION
except (ImportError, OSError) as error:
    missing = getattr(error, "name", None) or "torch"
    advice = "Run make setup; on NPUs follow docs/ascend.md, Install"
    sys.exit(f"ERROR   {missing}: {error}\n        {advice}")


def versions(machine: Machine) -> Iterator[Finding]:
    """Python, and the packages without which nothing runs."""
    python = host.python_version()
    if ".".join(python.split(".")[:2]) in cann.PYTHONS:
        yield Finding("Python", "ok", python)
    else:
        advice = f"Use {' or '.join(cann.PYTHONS)}: megatron-core has wheels for these"
        yield Finding("Python", "error", python, advice)
    for name, fits, wanted in (
        ("torch", lambda _: True, "torch"),
        ("megatron-core", lambda x: x == SUPPORTED_VERSION, f"megatron-core=={SUPPORTED_VERSION}"),
        ("transformers", _has_qwen3, "'transformers>=4.51', the first with Qwen3"),
    ):
        found = machine.distribution(name)
        if found is not None and fits(found):
            yield Finding(name, "ok", found)
        else:
            yield Finding(name, "error", found or "not installed", f"pip install {wanted}")


def _has_qwen3(transformers: str) -> bool:
    return tuple(map(int, transformers.split(".")[:2])) >= (4, 51)


def megatron(machine: Machine) -> Finding:
    """Whether ``megatron`` is megatron-core's wheel and nothing else."""
    places = package_folders("megatron")
    cores = [place for place in places if (place / "core").is_dir()]
    if not cores:
        advice = f"pip install megatron-core=={SUPPORTED_VERSION}"
        return Finding("megatron", "error", "no megatron.core to import", advice)
    if checkouts := [p for p in places if (p / "training").is_dir() or (p / "legacy").is_dir()]:
        advice = "Remove Megatron-LM's source from PYTHONPATH: only megatron-core's wheel is used"
        return Finding("megatron", "error", f"Megatron-LM in {_joined(checkouts)}", advice)
    if len(cores) > 1:
        advice = "Keep one: the first on the path is imported, whatever pip lists"
        return Finding("megatron", "error", f"several: {_joined(cores)}", advice)
    if (release := _release(cores[0])) not in (None, SUPPORTED_VERSION):
        advice = f"Remove it from PYTHONPATH, or pip install megatron-core=={SUPPORTED_VERSION}"
        return Finding("megatron", "error", f"core {release} in {cores[0]}", advice)
    return Finding("megatron", "ok", str(cores[0]))


def _joined(places: list[Path]) -> str:
    return ", ".join(map(str, places))


def _release(place: Path) -> str | None:
    """The release in the source of megatron-core in ``place``, whatever pip lists."""
    file = place / "core" / "package_info.py"
    text = file.read_text() if file.is_file() else ""
    numbers = [re.search(rf"^{part} = (\d+)", text, re.M) for part in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(number[1] for number in numbers if number) or None


def optional_packages(machine: Machine) -> Iterator[Finding]:
    """Packages that change what megatron-core does by being importable."""
    absent = "not installed, and not needed"
    places = package_folders("transformer_engine")
    found = f"in {places[0]}" if places else absent
    if places:
        # Layers here are megatron-core's local ones; on NPUs the package cannot even load.
        advice = "pip uninstall transformer-engine: megatron-core takes other paths beside it"
        status: Any = "error" if machine.is_ascend() else "warning"
        yield Finding("Transformer Engine", status, found, advice)
    else:
        yield Finding("Transformer Engine", "ok", found)
    places = package_folders("mindspeed")
    if "mindspeed" in sys.modules:
        advice = "Find what imports it (sitecustomize, a .pth file): it patches megatron"
        yield Finding("MindSpeed", "error", "already imported", advice)
    else:
        yield Finding("MindSpeed", "ok", f"in {places[0]}, not imported" if places else absent)
    places = package_folders("apex")
    parts = ("amp", "optimizers", "normalization", "multi_tensor_apply", "contrib")
    if places and not any((places[0] / part).is_dir() for part in parts):
        advice = "pip uninstall apex: PyPI's package of that name has nothing to do with training"
        yield Finding("apex", "warning", f"another package, in {places[0]}", advice)
    else:
        yield Finding("apex", "ok", f"in {places[0]}, of use on CUDA only" if places else absent)


def package_folders(name: str) -> list[Path]:
    """The folders a package would be imported from, without importing it; [] if there are none."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return []
    return [] if spec is None else list(map(Path, spec.submodule_search_locations or []))


def compiled_kernels(platform: Platform) -> Iterator[Finding]:
    """Which of the kernels compiled for the platform's device can be loaded."""
    from megatron_replay import kernels
    from megatron_replay.optim.momentum_step import OPTIMIZER

    every = (kernels.HEAD, OPTIMIZER, kernels.SELECTION, kernels.ATTENTION, kernels.LAYERS)
    for backends in every:
        for name in (name for name in backends.compiled if kernels.DEVICE[name] == platform.name):
            subject = f"kernels of {backends.what}"
            try:
                reason = backends.why_not(name)
            except ReplayError as error:
                yield Finding(subject, "error", str(error), "Runs end with this error")
                continue
            if reason:
                yield Finding(subject, "warning", f"{name}: {reason}", "Runs use slower ones")
            else:
                yield Finding(subject, "ok", name)


def collective(platform: Platform, *, method: str | None = None, timeout: float = 120.0) -> Finding:
    """Two processes sum one number each.

    They are spawned on accelerators, which do not survive a fork once used, and where this process
    has threads, since a fork copies the locks that threads hold; otherwise they are forked.
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
    """Compares the restricted head's loss and gradients with its definition in float64."""
    import torch

    from megatron_replay import kernels
    from megatron_replay.functional import (
        restricted_cross_entropy,
        restricted_cross_entropy_dense,
    )

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
    loss_T = restricted_cross_entropy(*ours, *moved)
    loss_T.mean().backward()
    pairs = [(loss_T, wanted_T), *((x.grad, y.grad) for x, y in zip(ours, exact, strict=True))]
    error = max(
        float((x.detach().cpu().double() - y.detach()).abs().max() / y.detach().abs().max())
        for x, y in pairs
        if x is not None and y is not None
    )
    seconds = time.monotonic() - start
    found = f"{name} kernels on {platform.name}: {error:.1e} from float64, {seconds:.1f} s"
    if not error < 1e-5:
        advice = "Do not train: rebuild the kernels, or use --head-backend torch"
        return Finding("head", "error", found, advice)
    return Finding("head", "ok", found)


def layers(platform: Platform) -> Iterator[Finding]:
    """Compares a wide model's activations and gradients with the CPU's, layer by layer."""
    from megatron_replay.training.layer_errors import compare

    yield from compare(platform)


def examine(
    machine: Machine, platform_name: str, folder: Path, *, compare_gradients: bool = False
) -> Iterator[Finding]:
    """All findings, cheap ones first; a check that fails itself is an error."""
    first, platform = examination.chosen_platform(platform_name)
    yield first
    checks: list[Callable[[], Finding | Iterator[Finding]]] = [
        functools.partial(check, machine)
        for check in (versions, megatron, optional_packages, examination.memory)
    ]
    checks.append(functools.partial(examination.space, folder))
    if machine.is_ascend():
        checks += (functools.partial(check, machine) for check in examination.ASCEND_CHECKS)
    else:
        yield examination.NO_ASCEND
    if platform is not None:
        last = (layers,) if compare_gradients else ()
        for of_platform in (compiled_kernels, collective, head_smoke, *last):
            checks.append(functools.partial(of_platform, platform))
    for check in checks:
        try:
            found = check()
            yield from [found] if isinstance(found, Finding) else found
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:300]
            yield Finding("doctor", "error", text, "Fix the error: it prevented a check")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="doctor.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--platform", default="auto", help="auto, or the name of a platform (cpu, ...)"
    )
    parser.add_argument("--folder", type=Path, default=Path("."),
        help="directory whose free space is checked")  # fmt: skip
    parser.add_argument("--compare-gradients", action="store_true",
        help="also compare each layer's activations and gradients on the device with the CPU's, in "
        "a model as wide as Qwen3-4B: a minute or more, and 8 GB of memory")  # fmt: skip
    options = parser.parse_args(arguments)
    findings = []
    found = examine(
        Machine(), options.platform, options.folder, compare_gradients=options.compare_gradients
    )
    for finding in found:
        findings.append(finding)
        if not options.json:
            label = "ok" if finding.status == "ok" else finding.status.upper()
            print(f"{label:7} {finding.subject}: {finding.found}", flush=True)
            if finding.advice:
                print(f"        {finding.advice}", flush=True)
    errors, warnings = (sum(f.status == kind for f in findings) for kind in ("error", "warning"))
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        print(f"{errors} errors, {warnings} warnings")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
