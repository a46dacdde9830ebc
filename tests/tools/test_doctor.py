"""The doctor on false machines: each bad case is found, and says what to do."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_replay import kernels
from megatron_replay.kernels import registry
from megatron_replay.loss.backends import HeadBackend
from megatron_replay.loss.blocks import union_head
from megatron_replay.platform import cann, examination, select
from megatron_replay.platform.examination import Machine
from tests import processes
from tests.docker.test_docker import node
from tools import doctor

ROOT = Path(__file__).parents[2]


@pytest.fixture
def installed(monkeypatch):
    """Set the versions of installed packages; None uninstalls."""
    real, given = importlib.metadata.version, {}

    def version(name):
        if name in given:
            if given[name] is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return given[name]
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    return given


def with_cann(root: Path, release: str | None, *, place: str = "usr/local/Ascend/cann") -> Path:
    folder = root / place / "aarch64-linux"
    folder.mkdir(parents=True)
    if release:
        text = f"package_name=Ascend-cann-toolkit\nversion={release}\narch=aarch64\n"
        (folder / "ascend_toolkit_install.info").write_text(text)
    return root


SOURCED = {"ASCEND_HOME_PATH": "/usr/local/Ascend/cann"}


@pytest.mark.parametrize(
    ("release", "torch_npu", "torch", "environment", "status", "says"),
    [
        ("9.1.0", "2.12.0", "2.12.0+cpu", SOURCED, "ok", "CANN 9.1.0"),
        ("9.1.0", "2.9.0.post6", "2.9.0", SOURCED, "ok", "2.9.0.post6"),
        ("9.1.0", "2.9.0", "2.9.0", SOURCED, "error", "which takes 2.7.1.post8"),
        ("8.5.0", "2.12.0", "2.12.0", SOURCED, "error", "which takes 2.6.0.post5"),
        ("8.1.RC1", "2.12.0", "2.12.0", SOURCED, "error", "8.5.0 are known"),
        ("9.1.0", "2.12.0", "2.13.0", SOURCED, "error", "pip install torch==2.12.0"),
        ("9.1.0", "2.12.0", "2.12.0", {}, "error", "set_env.sh"),
        ("9.1.0", None, "2.12.0", SOURCED, "error", "2.7.1.post8"),
        (None, "2.12.0", "2.12.0", SOURCED, "warning", "which CANN this is"),
    ],
)
def test_cann_and_torch_npu(
    tmp_path, installed, release, torch_npu, torch, environment, status, says
):
    installed.update({"torch_npu": torch_npu, "torch": torch})
    found = examination.ascend_versions(Machine(with_cann(tmp_path, release), environment))
    assert found.status == status, found
    assert says in found.found + found.advice


def test_cann_of_old_places_and_none(tmp_path, installed):
    installed["torch_npu"] = "2.12.0"
    found = examination.ascend_versions(Machine(tmp_path, {}))
    assert (found.status, "no CANN" in found.found) == ("error", True)
    with_cann(tmp_path, "9.0.0", place="usr/local/Ascend/ascend-toolkit/latest")
    assert cann.version(cann.home(tmp_path, {})) == "9.0.0"
    assert cann.why_not("9.1.0", "2.12.0", "3.12").startswith("Python 3.12")


@pytest.mark.parametrize(
    ("without", "status", "says"),
    [
        ("", "ok", "2 in /dev"),
        ("davinci0", "ok", "1 in /dev"),
        ("dev/davinci", "error", "docker/run.sh"),
        ("devmm_svm", "error", "without /dev/devmm_svm"),
        ("Ascend/driver", "error", "without /usr/local/Ascend/driver"),
        ("npu-smi", "warning", "no npu-smi"),
    ],
)
def test_devices(tmp_path, without, status, says):
    with_cann(node(tmp_path, without=without), "9.1.0")
    found = examination.ascend_devices(Machine(tmp_path, {}))
    assert found.status == status, found
    assert says in found.found + found.advice


def test_environment(tmp_path):
    with_cann(tmp_path, "9.1.0")
    good = {name: value for name, (value, _) in examination.VARIABLES.items()}
    assert examination.ascend_environment(Machine(tmp_path, good)).status == "ok"
    found = examination.ascend_environment(Machine(tmp_path, good | {"HCCL_CONNECT_TIMEOUT": "9"}))
    assert found.status == "warning"
    assert "HCCL_CONNECT_TIMEOUT=3600" in found.advice
    assert "now 9" in found.advice


def test_no_ascend_is_no_complaint(tmp_path, installed):
    installed["torch_npu"] = None
    machine = Machine(tmp_path, {})
    for look in ("ascend_versions", "ascend_devices", "ascend_environment"):
        assert getattr(examination, look)(machine).status == "ok"


@pytest.mark.parametrize(
    ("package", "version", "status"),
    [
        ("megatron-core", "0.17.0", "error"), ("megatron-core", None, "error"),
        ("megatron-core", "0.16.1", "ok"), ("transformers", "4.50.1", "error"),
        ("transformers", None, "error"), ("transformers", "5.0.0", "ok"), ("torch", None, "error"),
    ],
)  # fmt: skip
def test_versions(installed, package, version, status):
    installed[package] = version
    [found] = [f for f in doctor.versions(Machine()) if f.subject == package]
    assert found.status == status, found
    assert (status == "ok") == (not found.advice)


@pytest.fixture
def on_path(monkeypatch, tmp_path):
    """Make folders of packages, first on the path; only their names are looked at."""

    def make(*folders: str) -> None:
        for folder in folders:
            (tmp_path / folder).mkdir(parents=True)
        monkeypatch.setattr(
            doctor,
            "package_folders",
            lambda name: [tmp_path / name] if (tmp_path / name).is_dir() else [],
        )

    return make


@pytest.mark.parametrize(
    ("folders", "look", "status", "says"),
    [
        (["megatron/core"], doctor.megatron_path, "ok", "megatron"),
        (["megatron/core", "megatron/training"], doctor.megatron_path, "error", "PYTHONPATH"),
        ([], doctor.megatron_path, "error", "megatron-core==0.16.1"),
        ([], doctor.transformer_engine, "ok", "not needed"),
        (["transformer_engine"], doctor.transformer_engine, "warning", "uninstall"),
        ([], doctor.apex, "ok", "not needed"),
        (["apex/normalization"], doctor.apex, "ok", "in "),
        (["apex/interfaces"], doctor.apex, "warning", "another package"),
        (["mindspeed"], doctor.mindspeed, "ok", "not imported"),
    ],
)
def test_packages(on_path, tmp_path, folders, look, status, says):
    on_path(*folders)
    found = look(Machine(tmp_path, {}))
    assert found.status == status, found
    assert says in found.found + found.advice


def test_a_real_transformer_engine_on_an_ascend_node_is_an_error(on_path, tmp_path):
    on_path("transformer_engine")
    assert doctor.transformer_engine(Machine(with_cann(tmp_path, "9.1.0"), {})).status == "error"


def test_another_core_before_the_installed_one(on_path, tmp_path):
    on_path("megatron/core")
    for minor, status in ((16, "ok"), (12, "error")):
        text = f"MAJOR = 0\nMINOR = {minor}\nPATCH = 1\nPRE_RELEASE = ''\n"
        (tmp_path / "megatron/core/package_info.py").write_text(text)
        found = doctor.megatron_path(Machine(tmp_path, {}))
        assert found.status == status, found


def test_without_torch_it_says_so(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    done = subprocess.run(
        [sys.executable, ROOT / "tools/doctor.py"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "ERROR   torch: no torch here", "        Run make setup, or pip install torch",
    ]  # fmt: skip


def test_package_folders_are_found_without_import(tmp_path, monkeypatch):
    (tmp_path / "mindspeed").mkdir()
    (tmp_path / "mindspeed/__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.package_folders("mindspeed") == [tmp_path / "mindspeed"]
    assert doctor.package_folders("no_such_package") == []


def test_kernels_that_were_not_built(monkeypatch):
    cpu = select("cpu")
    assert {f.status for f in doctor.compiled_kernels(cpu)} == {"ok"}
    monkeypatch.setattr(registry, "_load", lambda forms, name: "a module that was not built")
    found = list(doctor.compiled_kernels(cpu))
    assert [f.status for f in found] == ["warning"] * 3
    assert "not built" in found[0].found


def test_the_head_is_compared(monkeypatch):
    cpu = select("cpu")
    assert doctor.head_smoke(cpu).status == "ok"
    wrong = HeadBackend(lambda sets: union_head(_shifted(sets)))
    monkeypatch.setattr(type(kernels.HEAD), "choose", lambda self, name, like: wrong)
    assert doctor.head_smoke(cpu).status == "error"


def _shifted(sets):
    """Every candidate but the last of its set is that of the next place."""
    sets.ids[1] = sets.ids[0] + 1
    return sets


def _check_collectives():
    cpu = select("cpu")
    assert doctor.collective(cpu, timeout=processes.HANG_SECONDS).status == "ok"
    cpu.communication_backend = "nothing"
    found = doctor.collective(cpu, timeout=processes.HANG_SECONDS)
    assert found.status == "error"
    assert "expected 3 and 3" in found.found


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
        assert examination.space(Machine(), tmp_path).status == status


def test_a_look_that_fails_is_a_finding(monkeypatch, tmp_path):
    def broken(machine):
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "apex", broken)
    monkeypatch.setattr(doctor, "collective", lambda platform: broken(None))
    found = [f for f in doctor.examine(Machine(), "cpu", tmp_path) if f.subject == "doctor"]
    assert len(found) == 2
    assert found[0].found == "OSError: no such thing"


BROKEN = "raise ImportError('libhccl.so: cannot open shared object file')"


@pytest.mark.distributed
def test_a_broken_torch_npu_is_an_error_and_the_rest_is_still_said(tmp_path):
    """The whole command, as a user meets it: torch_npu without CANN breaks even torch's import."""
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu/__init__.py").write_text(BROKEN)
    info = tmp_path / "torch_npu-2.12.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.12.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    done = subprocess.run(
        [sys.executable, ROOT / "tools/doctor.py", "--json", "--folder", tmp_path],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    found = {finding["subject"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 1
    assert "libhccl.so" in found["platform"]["found"]
    assert found["CANN and torch_npu"]["status"] == "error"
    assert found["megatron-core"]["status"] == "ok"
    assert set(found["platform"]) == {"subject", "status", "found", "advice"}
