"""docker/run.sh on stand-in root directories, and the Dockerfiles' steps that can be run here."""

from __future__ import annotations

import itertools
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


def node(root: Path, *, without: str = "") -> Path:
    """A root directory as on a node with two NPUs."""
    names = ("davinci0", "davinci1", "davinci_manager", "devmm_svm", "hisi_hdc")
    files = [f"dev/{name}" for name in names]
    files += ["usr/local/Ascend/driver/version.info", "usr/local/dcmi/x", "etc/ascend_install.info"]
    files += ["usr/local/sbin/npu-smi"]
    for file in files:
        if not without or without not in file:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).touch()
    return root


def run(root: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "ROOT": str(root), "DRY_RUN": "1", **environment}
    line = ["bash", DOCKER / "run.sh", *command]
    return subprocess.run(line, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def values(words: list[str], flag: str) -> list[str]:
    return [value for word, value in itertools.pairwise(words) if word == flag]


def test_every_device_and_path_is_passed_on(tmp_path):
    done = run(node(tmp_path), "image", "python", "a b", MOUNT="/data /models")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    names = ("davinci0", "davinci1", "davinci_manager", "devmm_svm", "hisi_hdc")
    assert values(words, "--device") == [f"/dev/{name}" for name in names]
    assert values(words, "-v") == [
        "/usr/local/sbin/npu-smi:/usr/local/sbin/npu-smi:ro",
        "/usr/local/Ascend/driver:/usr/local/Ascend/driver:ro",
        "/usr/local/dcmi:/usr/local/dcmi:ro",
        "/etc/ascend_install.info:/etc/ascend_install.info:ro",
        "/data:/data",
        "/models:/models",
    ]
    assert words[:3] == ["docker", "run", "--rm"]
    assert words[-3:] == ["image", "python", "a b"]
    started = run(tmp_path, "image", "x", DRY_RUN="0", DOCKER="echo").stdout
    assert started.startswith("run --rm --network=host")
    assert started.endswith(" image x\n")


@pytest.mark.parametrize("without", ["dev/davinci", "hisi_hdc", "Ascend/driver", "npu-smi"])
def test_a_node_that_lacks_something_is_refused(tmp_path, without):
    """npu-smi may be missing: that is a warning."""
    done = run(node(tmp_path, without=without), "image")
    required = without != "npu-smi"
    assert done.returncode == (2 if required else 0)
    assert (done.stdout == "") == required
    assert done.stderr.startswith("error: " if required else "warning: ")
    assert without.rpartition("/")[2] in done.stderr


def test_an_image_must_be_named(tmp_path):
    assert run(node(tmp_path)).returncode == 2


def test_cann_variables_are_set_before_the_command(tmp_path):
    script = tmp_path / "usr/local/Ascend/cann/set_env.sh"
    script.parent.mkdir(parents=True)
    # CANN's scripts read what is unset, and go on after a command, or the first of a pipe, failed.
    script.write_text("false\nfalse | true && export ASCEND_HOME_PATH=$UNSET/here\n")
    line = ["bash", DOCKER / "steps/with_cann.sh", "printenv", "ASCEND_HOME_PATH"]
    env = {"PATH": os.environ["PATH"], "ASCEND_ROOT": str(tmp_path)}
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.stdout == "/here\n", done.stderr


def test_the_image_has_a_triple_that_fits_and_the_recommended_variables():
    image = (DOCKER / "ascend.Dockerfile").read_text()
    given = dict(re.findall(r"^ARG (\w+)=(\S+)", image, re.MULTILINE))
    check = [sys.executable, cann.__file__, "--cann", given["CANN"], "--python", given["PYTHON"]]
    for torch_npu, code, said in (
        (given["TORCH_NPU"], 0, ""),
        ("2.9.0", 2, "error: torch_npu 2.9.0 is made for CANN 8.5.0"),
        ("2.9.0.post9", 0, "warning: nothing is known of torch_npu 2.9.0.post9"),
    ):
        done = subprocess.run([*check, "--torch-npu", torch_npu], capture_output=True, text=True)
        assert done.returncode == code
        assert done.stderr.startswith(said)
        assert bool(done.stderr) == bool(said)
    for name, (value, _) in examination.VARIABLES.items():
        assert f"{name}={value}" in image
    page = (ROOT / "docs/ascend.md").read_text()
    for release, fitting in cann.COMPATIBLE.items():
        assert f"| {release} | {', '.join(fitting)} |" in page
