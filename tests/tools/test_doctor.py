"""The doctor on stand-in machines: it finds each fault, and says what to do."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from megatron_replay.platform import cann, examination, select
from megatron_replay.platform.examination import Machine
from megatron_replay.training import layer_errors
from tests import processes
from tests.docker.test_docker import node
from tools import doctor

ROOT = Path(__file__).parents[2]
SOURCED = {"ASCEND_HOME_PATH": "/usr/local/Ascend/cann"}
GOOD = {name: value for name, (value, _) in examination.VARIABLES.items()}


def with_cann(root: Path, release: str | None, *, place: str = "usr/local/Ascend/cann") -> Path:
    folder = root / place / "aarch64-linux"
    folder.mkdir(parents=True)
    if release:
        text = f"package_name=Ascend-cann-toolkit\nversion={release}\narch=aarch64\n"
        (folder / "ascend_toolkit_install.info").write_text(text)
    return root


def install(monkeypatch, **versions: str | None) -> None:
    """Set the versions of installed packages; None uninstalls."""
    real = importlib.metadata.version

    def version(name):
        found = versions.get(name.replace("-", "_"), "")
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize(
    ("release", "torch_npu", "torch", "environment", "status", "names"),
    [
        ("9.1.0", "2.12.0", "2.12.0+cpu", SOURCED, "ok", "CANN 9.1.0"),
        ("9.1.0", "2.9.0.post6", "2.9.0", SOURCED, "ok", "2.9.0.post6"),
        ("9.1.0", "2.9.0", "2.9.0", SOURCED, "error", "2.7.1.post8"),
        ("8.5.0", "2.12.0", "2.12.0", SOURCED, "error", "2.6.0.post5"),
        ("8.1.RC1", "2.12.0", "2.12.0", SOURCED, "error", "from 2.6 on"),
        ("9.1.0", "2.9.0.post9", "2.9.0", SOURCED, "warning", "2.9.0.post6 on CANN 9.1.0"),
        ("9.1.0", "2.14.0", "2.14.0", SOURCED, "warning", "2.12.0 on CANN 9.1.0"),
        ("8.2.0", "2.6.0", "2.6.0", SOURCED, "warning", "2.6.0 on CANN 8.2.RC1"),
        ("9.0.1", "2.9.0.post4", "2.9.0", SOURCED, "warning", "2.9.0.post2 on CANN 9.0.0"),
        ("9.0.1", "2.9.0.post4", "2.12.0", SOURCED, "error", "torch==2.9.0"),
        ("8.3.RC1", "2.7.1", "2.7.1", SOURCED, "ok", "CANN 8.3.RC1"),
        ("9.1.0", "2.12.0", "2.13.0", SOURCED, "error", "torch==2.12.0"),
        ("9.1.0", "2.12.0", "2.12.0", {}, "error", "set_env.sh"),
        ("9.1.0", None, "2.12.0", SOURCED, "error", "2.7.1.post8"),
        (None, "2.12.0", "2.12.0", SOURCED, "warning", "ascend_toolkit_install.info"),
    ],
)
def test_cann_and_torch_npu(
    tmp_path, monkeypatch, release, torch_npu, torch, environment, status, names
):
    install(monkeypatch, torch_npu=torch_npu, torch=torch)
    found = examination.ascend_versions(Machine(with_cann(tmp_path, release), environment))
    assert found.status == status, found
    assert names in found.found + found.advice


def test_cann_of_old_places_and_none(tmp_path, monkeypatch):
    install(monkeypatch, torch_npu="2.12.0")
    assert examination.ascend_versions(Machine(tmp_path, {})).status == "error"
    with_cann(tmp_path, "9.0.0", place="usr/local/Ascend/ascend-toolkit/latest")
    assert cann.version(cann.home(tmp_path, {})) == "9.0.0"


@pytest.mark.parametrize(
    ("python", "status"),
    [("3.9.1", "error"), ("3.10.13", "ok"), ("3.13.0", "ok"), ("3.14.0", "error")],
)
def test_pythons(monkeypatch, python, status):
    monkeypatch.setattr(doctor.host, "python_version", lambda: python)
    found = next(iter(doctor.versions(Machine())))
    assert (found.subject, found.status) == ("Python", status)
    fits = cann.compare("9.1.0", "2.12.0", python.rpartition(".")[0])
    assert fits[0] == status


@pytest.mark.parametrize(
    ("without", "status", "names"),
    [
        ("", "ok", "2 in /dev"), ("davinci0", "ok", "1 in /dev"),
        ("dev/davinci", "error", "docker/run.sh"), ("devmm_svm", "error", "/dev/devmm_svm"),
        ("Ascend/driver", "error", "/usr/local/Ascend/driver"), ("npu-smi", "warning", "npu-smi"),
    ],
)  # fmt: skip
def test_devices(tmp_path, without, status, names):
    with_cann(node(tmp_path, without=without), "9.1.0")
    found = examination.ascend_devices(Machine(tmp_path, {}))
    assert found.status == status, found
    assert names in found.found + found.advice


def test_cann_s_python_modules(tmp_path, monkeypatch):
    """In a new virtual environment they are not found, or do not find what they import."""
    folder = "/usr/local/Ascend/cann/python/site-packages"
    good = Machine(tmp_path, {"PYTHONPATH": f"/elsewhere:{folder}"})
    install(monkeypatch, **dict.fromkeys(map(_variable, examination.CANN_IMPORTS), "1.0"))
    assert "PYTHONPATH" in examination.ascend_python(good).found  # no such folder
    (tmp_path / folder[1:]).mkdir(parents=True)
    assert examination.ascend_python(good).status == "ok"
    assert examination.ascend_python(Machine(tmp_path, {})).status == "warning"
    install(monkeypatch, **dict.fromkeys(map(_variable, examination.CANN_IMPORTS)))
    found = examination.ascend_python(good)
    assert found.status == "warning"
    assert found.advice.startswith("pip install attrs decorator ")


@pytest.mark.parametrize(
    ("release", "numpy", "status"),
    [("8.5.0", "2.3.1", "warning"), ("8.5.0", "1.26.4", "ok"), ("9.0.0", "2.3.1", "ok")],
)
def test_numpy_2_and_a_cann_that_may_not_run_with_it(tmp_path, monkeypatch, release, numpy, status):
    with_cann(tmp_path, release)
    machine = Machine(tmp_path, {"PYTHONPATH": "/usr/local/Ascend/cann/aarch64-linux"})
    installed = dict.fromkeys(map(_variable, examination.CANN_IMPORTS), "1.0")
    install(monkeypatch, numpy=numpy, **installed)
    found = examination.ascend_python(machine)
    assert found.status == status
    assert found.advice.startswith("pip install 'numpy<2'" if status == "warning" else "")


def _variable(distribution: str) -> str:
    return distribution.replace("-", "_")


def test_environment(tmp_path):
    with_cann(tmp_path, "9.1.0")
    assert examination.ascend_environment(Machine(tmp_path, GOOD)).status == "ok"
    found = examination.ascend_environment(Machine(tmp_path, GOOD | {"TASK_QUEUE_ENABLE": "9"}))
    assert found.status == "warning"
    assert "TASK_QUEUE_ENABLE=2" in found.advice
    assert "now 9" in found.advice
    both = examination.ascend_environment(Machine(tmp_path, GOOD | {"PYTORCH_ALLOC_CONF": "a:1"}))
    assert (both.status, "unset PYTORCH_ALLOC_CONF" in both.advice) == ("warning", True)


def test_a_machine_without_ascend_needs_none_of_its_checks(tmp_path, monkeypatch):
    install(monkeypatch, torch_npu=None)
    monkeypatch.setattr(doctor, "collective", doctor.head_smoke)
    found = {f.subject: f.status for f in doctor.examine(Machine(tmp_path, {}), "cpu", tmp_path)}
    assert found["Ascend"] == "ok"
    assert not [subject for subject in found if "CANN" in subject or "Ascend " in subject]


def test_layers_are_compared_where_that_is_asked_for(tmp_path, monkeypatch):
    found = examination.Finding("layer 0", "ok", "compared")
    monkeypatch.setattr(layer_errors, "compare", lambda _: iter([found]))
    monkeypatch.setattr(doctor, "collective", doctor.head_smoke)
    for asked in (False, True):
        machine = Machine(tmp_path, {})
        findings = list(doctor.examine(machine, "cpu", tmp_path, compare_gradients=asked))
        assert (found in findings) == asked


@pytest.mark.parametrize(
    ("package", "version", "status"),
    [
        ("megatron-core", "0.17.0", "error"), ("megatron-core", None, "error"),
        ("megatron-core", "0.16.1", "ok"), ("transformers", "4.50.1", "error"),
        ("transformers", None, "error"), ("transformers", "5.0.0", "ok"), ("torch", None, "error"),
    ],
)  # fmt: skip
def test_versions(monkeypatch, package, version, status):
    install(monkeypatch, **{package.replace("-", "_"): version})
    [found] = [f for f in doctor.versions(Machine()) if f.subject == package]
    assert found.status == status, found
    assert (status == "ok") == (not found.advice)


def packages(root: Path) -> dict[str, str]:
    found = [doctor.megatron(Machine(root, {})), *doctor.optional_packages(Machine(root, {}))]
    return {finding.subject: finding.status for finding in found}


@pytest.mark.parametrize(
    ("folder", "subject", "status"),
    [
        ("unrelated", "megatron", "ok"), ("megatron/training", "megatron", "error"),
        ("megatron/core", "megatron", "error"), ("transformer_engine", "Transformer Engine",
        "warning"), ("mindspeed", "MindSpeed", "ok"), ("apex/normalization", "apex", "ok"),
        ("apex/interfaces", "apex", "warning"),
    ],
)  # fmt: skip
def test_packages_on_the_path(tmp_path, monkeypatch, folder, subject, status):
    """They are found without an import: a Megatron-LM checkout, another core, PyPI's apex."""
    (tmp_path / "path" / folder).mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "path")
    assert packages(tmp_path)[subject] == status
    if folder == "transformer_engine":
        with_cann(tmp_path, "9.1.0")
        assert packages(tmp_path)[subject] == "error"


def test_another_release_of_the_core_is_an_error_whatever_pip_lists(tmp_path, monkeypatch):
    info = tmp_path / "megatron" / "core" / "package_info.py"
    info.parent.mkdir(parents=True)
    monkeypatch.setattr(doctor, "package_folders", lambda name: [tmp_path / name])
    for minor, status in ((16, "ok"), (12, "error")):
        info.write_text(f"MAJOR = 0\nMINOR = {minor}\nPATCH = 1\nPRE_RELEASE = ''\n")
        assert doctor.megatron(Machine(tmp_path, {})).status == status


def run(path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The command, with ``path`` first on PYTHONPATH."""
    return subprocess.run(
        [sys.executable, ROOT / "tools/doctor.py", *flags],
        env={**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )


def test_without_torch_it_ends_with_one_finding(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    done = run(tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("ERROR   torch: no torch here\n")


@pytest.mark.distributed
def test_a_broken_torch_npu_is_an_error_and_the_rest_is_still_checked(tmp_path):
    """torch_npu without CANN breaks even torch's import."""
    broken = "raise ImportError('libhccl.so: cannot open shared object file')"
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu/__init__.py").write_text(broken)
    info = tmp_path / "torch_npu-2.12.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.12.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    done = run(tmp_path, "--json", "--folder", str(tmp_path))
    found = {finding["subject"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 1
    assert "libhccl.so" in found["platform"]["found"]
    assert found["CANN and torch_npu"]["status"] == "error"
    assert found["megatron-core"]["status"] == "ok"
    assert set(found["platform"]) == {"subject", "status", "found", "advice"}


def test_kernels_and_head_of_this_machine():
    cpu = select("cpu")
    found = {finding.subject: finding.status for finding in doctor.compiled_kernels(cpu)}
    assert found == dict.fromkeys(
        ("kernels of the restricted head", "kernels of the optimizer's passes",
         "kernels of candidate selection"), "ok"
    )  # fmt: skip
    assert doctor.head_smoke(cpu).status == "ok"


def test_a_head_with_other_gradients_is_an_error(monkeypatch):
    """The loss is right and the gradients are not: the comparison has to see both."""
    double = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: double(loss * _factor(loss)))
    assert doctor.head_smoke(select("cpu")).status == "error"


def _factor(loss: torch.Tensor) -> float:
    return 1.0 if loss.dtype is torch.float64 else 1.001


def _check_collectives():
    cpu = select("cpu")
    assert doctor.collective(cpu, timeout=processes.HANG_SECONDS).status == "ok"
    cpu.communication_backend = "nothing"
    assert doctor.collective(cpu, timeout=processes.HANG_SECONDS).status == "error"


@pytest.mark.distributed
def test_the_collective_is_checked():
    assert processes.wait(processes.fork(_check_collectives)) == 0


@pytest.mark.distributed
def test_the_collective_is_not_forked_beside_a_thread(monkeypatch):
    """A lock that the thread holds would stay locked in the ranks."""
    methods, done = [], threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()

    def start(method):
        methods.append(method)
        raise OSError("enough")

    monkeypatch.setattr(doctor.multiprocessing, "get_context", start)
    try:
        with pytest.raises(OSError, match="enough"):
            doctor.collective(select("cpu"))
    finally:
        done.set()
        thread.join()
    assert methods == ["spawn"]


def test_small_disks_and_memories(tmp_path, monkeypatch):
    (tmp_path / "proc").mkdir()
    text = "MemTotal: 16000000 kB\nMemAvailable: {} kB\n"
    for available, status in ((8_000_000, "ok"), (1_000_000, "warning")):
        (tmp_path / "proc/meminfo").write_text(text.format(available))
        assert examination.memory(Machine(tmp_path)).status == status
    for free, status in ((int(30e9), "ok"), (int(5e9), "warning"), (1000, "error")):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr(examination.shutil, "disk_usage", lambda _, usage=usage: usage)
        assert examination.space(tmp_path / "not" / "yet").status == status


def test_a_check_that_fails_is_a_finding(monkeypatch, tmp_path):
    def broken(_):
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "megatron", broken)
    monkeypatch.setattr(doctor, "collective", broken)
    found = [f for f in doctor.examine(Machine(), "cpu", tmp_path) if f.subject == "doctor"]
    assert [finding.found for finding in found] == ["OSError: no such thing"] * 2
