"""docker/run.sh on false root directories, and what the Dockerfiles' steps come down to here."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_replay.platform import cann, examination

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


def node(root: Path, *, without: str = "", devices: int = 2) -> Path:
    """A root directory as on a node with NPUs."""
    files = [f"dev/davinci{i}" for i in range(devices)]
    files += [f"dev/{name}" for name in ("davinci_manager", "devmm_svm", "hisi_hdc")]
    files += ["usr/local/Ascend/driver/version.info", "usr/local/dcmi/x", "etc/ascend_install.info"]
    files += ["usr/local/sbin/npu-smi"]
    for file in files:
        if without and without in file:
            continue
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def run(root: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "ROOT": str(root), "DRY_RUN": "1", **environment}
    line = ["bash", DOCKER / "run.sh", *command]
    return subprocess.run(line, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_every_device_and_path_is_passed_on(tmp_path):
    done = run(node(tmp_path), "image", "python", "a b", MOUNT="/data /models")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    given = [words[i + 1] for i, word in enumerate(words) if word == "--device"]
    assert given == [
        "/dev/davinci0", "/dev/davinci1", "/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc",
    ]  # fmt: skip
    mounts = [words[i + 1] for i, word in enumerate(words) if word == "-v"]
    assert mounts == [
        "/usr/local/sbin/npu-smi:/usr/local/sbin/npu-smi:ro",
        "/usr/local/Ascend/driver:/usr/local/Ascend/driver:ro",
        "/usr/local/dcmi:/usr/local/dcmi:ro",
        "/etc/ascend_install.info:/etc/ascend_install.info:ro",
        "/data:/data",
        "/models:/models",
    ]
    assert words[:3] == ["docker", "run", "--rm"]
    assert words[-3:] == ["image", "python", "a b"]


@pytest.mark.parametrize(
    ("without", "says"),
    [
        ("dev/davinci", "no NPU on this node"),
        ("hisi_hdc", "/dev/hisi_hdc is missing"),
        ("Ascend/driver", "no driver"),
    ],
)
def test_a_node_that_lacks_something_is_refused(tmp_path, without, says):
    done = run(node(tmp_path, without=without), "image")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {says}")


def test_npu_smi_may_be_missing(tmp_path):
    done = run(node(tmp_path, without="npu-smi"), "image")
    assert done.returncode == 0
    assert done.stderr.startswith("warning: no npu-smi")
    assert "npu-smi" not in done.stdout


def test_an_image_must_be_named(tmp_path):
    assert run(node(tmp_path)).returncode == 2


def test_another_engine_is_started(tmp_path):
    """Without DRY_RUN the command is run as printed."""
    done = run(node(tmp_path), "image", "x", DRY_RUN="0", DOCKER="echo")
    assert done.stdout.startswith("run --rm --network=host")
    assert done.stdout.endswith(" image x\n")


def test_cann_variables_are_set_before_the_command(tmp_path):
    script = tmp_path / "usr/local/Ascend/cann/set_env.sh"
    script.parent.mkdir(parents=True)
    script.write_text("export ASCEND_HOME_PATH=$UNSET/here\n")
    line = ["bash", DOCKER / "steps/with_cann.sh", "printenv", "ASCEND_HOME_PATH"]
    env = {"PATH": os.environ["PATH"], "ASCEND_ROOT": str(tmp_path)}
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.stdout == "/here\n", done.stderr


def arguments(name: str) -> dict[str, str]:
    """Build arguments with their defaults."""
    text = (DOCKER / name).read_text()
    return dict(re.findall(r"^ARG (\w+)=(\S+)", text, re.MULTILINE))


def test_the_image_is_built_from_a_triple_that_goes_together():
    given = arguments("ascend.Dockerfile")
    assert cann.why_not(given["CANN"], given["TORCH_NPU"], given["PYTHON"]) is None
    check = [sys.executable, cann.__file__, "--cann", given["CANN"], "--python", given["PYTHON"]]
    for torch_npu, code in ((given["TORCH_NPU"], 0), ("2.9.0", 2)):
        done = subprocess.run([*check, "--torch-npu", torch_npu], capture_output=True, text=True)
        assert done.returncode == code
        assert done.stderr == "" if code == 0 else done.stderr.startswith("error: torch_npu 2.9.0")


def test_page_image_and_doctor_say_the_same():
    page = (ROOT / "docs/ascend.md").read_text()
    rows = dict(re.findall(r"^\| (\d+\.\d+\.\d+) \| (2\..*) \|$", page, re.MULTILINE))
    assert {release: tuple(pairs.split(", ")) for release, pairs in rows.items()} == cann.COMPATIBLE
    image = (DOCKER / "ascend.Dockerfile").read_text()
    for name, (value, _) in examination.VARIABLES.items():
        assert f"{name}={value}" in image


def test_the_cpu_image_does_what_the_readme_does():
    """CI runs `make setup` in a clean checkout; the image's one step of ours is that."""
    text = (DOCKER / "cpu.Dockerfile").read_text()
    steps = re.findall(r"^RUN (.*)", text, re.MULTILINE)
    assert steps == ["apt-get update \\", "make setup"]
    assert arguments("cpu.Dockerfile")["PYTHON"] == "3.11"  # as the pinned packages
