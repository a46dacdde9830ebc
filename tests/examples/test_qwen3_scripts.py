"""Every script of examples/qwen3, in order, at its true layout, on a small Qwen3.

The scripts run as they are. Only python and torchrun on their PATH are others: they have processes
forked here, where torch is imported already, instead of starting up to 8 interpreters a command;
tests/e2e/test_torchrun.py has the real ones.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_replay.store import CandidateReader
from tests import pool, processes, tiny
from tests.e2e import stages

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "qwen3"

TRUE_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "rope_theta": 1000000, "rms_norm_eps": 1e-6, "max_position_embeddings": 40960,
    "hidden_act": "silu", "attention_bias": False, "torch_dtype": "bfloat16",
}  # fmt: skip
TRUE_CONFIGS = {
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
}


@pytest.fixture(scope="module")
def bin_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with python and torchrun."""
    directory = tmp_path_factory.mktemp("bin")
    for name in ("python", "torchrun"):
        (directory / name).symlink_to(Path(__file__).with_name("launcher"))
    return directory


Environment = Callable[..., dict[str, str]]


@pytest.fixture(scope="module")
def environment(bin_path: Path) -> Environment:
    """What a user has, and no more: nothing of this process's own settings may help."""

    def variables(run_dir: Path, **given: object) -> dict[str, str]:
        path = f"{bin_path}:{Path(sys.executable).parent}:/usr/bin:/bin"
        return {
            "PATH": path, "HOME": str(run_dir), "VIRTUAL_ENV": sys.prefix, "PLATFORM": "cpu",
            "MODEL_SIZE": "tiny", "RUN_DIR": str(run_dir), "TINY": str(run_dir.parent / "data"),
            **{name: str(value) for name, value in given.items()},
        }  # fmt: skip

    return variables


def run_script(name: str, *flags: str, code: int = 0, **variables: str) -> str:
    """Run a script, serve its commands, insist on its exit code, return what it wrote."""
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket(socket.AF_UNIX) as server,
        tempfile.TemporaryFile("w+") as written,
    ):
        server.bind(f"{folder}/launch")
        server.listen()
        server.settimeout(0.05)
        script = subprocess.Popen(
            ["bash", str(SCRIPTS / f"{name}.sh"), *flags],
            env=variables | {"LAUNCH_SOCKET": f"{folder}/launch"},
            stdout=written,
            stderr=subprocess.STDOUT,
            text=True,
        )
        while script.poll() is None:
            try:
                client, _ = server.accept()
            except TimeoutError:
                continue
            with client, client.makefile() as lines:
                request = json.loads(lines.readline())
                answer = launched(*request["argv"], env=request["env"])
                client.sendall(json.dumps(answer).encode() + b"\n")
        written.seek(0)
        output = written.read()
    assert script.returncode == code, output
    return output


def launched(program: str, *argv: str, env: dict[str, str]) -> tuple[int, str]:
    """What the command does: exit code (the worst of the ranks') and output."""
    if program == "python":
        return _python(list(argv), env)
    module = argv.index("-m")
    given = dict(zip(argv[:module:2], argv[1:module:2], strict=True))
    assert given["--nnodes"] == "1", given
    assert argv[module + 1].startswith("megatron_replay."), argv
    stage, flags = argv[module + 1].removeprefix("megatron_replay."), list(argv[module + 2 :])
    results = pool.run(int(given["--nproc_per_node"]), stages._main, stage, flags, None)
    return max(code for code, _, _ in results), "".join(out + err for _, out, err in results)


def _python(argv: list[str], env: dict[str, str]) -> tuple[int, str]:
    """``python argv`` from the top of the repository, where torch is imported already."""
    with tempfile.NamedTemporaryFile("r") as written:
        code = processes.wait(processes.fork(_run_as_main, argv, env, written.name))
        assert code is not None
        return code, written.read()


def _run_as_main(argv: list[str], env: dict[str, str], written: str) -> None:
    sys.stdout = sys.stderr = open(written, "w")  # noqa: SIM115 - until the process ends
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    warnings.resetwarnings()
    os.environ.clear()
    # Threads that first meet torch's pool in a fork may find none.
    os.environ.update(env | {"HF_DEACTIVATE_ASYNC_LOAD": "1"})
    torch.set_num_threads(1)
    os.chdir(ROOT)
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            sys.path.insert(0, str(Path(argv[0]).parent))
            runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("qwen3")


@pytest.mark.distributed
@pytest.mark.parametrize(("qwen3", "ranks"), [("4b", 4), ("8b", 8)])
def test_from_hugging_face_to_the_report(
    runs: Path, environment: Environment, qwen3: str, ranks: int
) -> None:
    run_dir = runs / qwen3
    env = environment(run_dir)

    def script(step: str, *flags: str) -> str:
        return run_script(step.replace("SIZE", f"{qwen3}_4K"), *flags, **env)

    assert "verified" in script("ckpt_convert_qwen3_SIZE_hf2mcore")
    script("ckpt_convert_qwen3_SIZE_hf2mg")
    rank_files = (run_dir / "mg" / "iter_0000001").glob("mp_rank_*/model_optim_rng.pt")
    assert len(list(rank_files)) == ranks
    script("data_convert_qwen3_SIZE_instruction")
    output = script("stage0_qwen3_SIZE_ptd")
    assert f"--nproc_per_node {ranks} " in output
    assert len(CandidateReader(run_dir / "store")) == 96
    script("stage1_qwen3_SIZE_moclip_ptd")
    script("ckpt_convert_qwen3_SIZE_mcore2hf")
    # Other optimizers' scripts differ in a word: one small step.
    step = ["--train-iters", "1", "--global-batch-size", "2"]
    assert script("stage1_qwen3_SIZE_adamw_ptd", *step)
    if qwen3 == "4b":
        for optimizer in ("mofo", "muonclip"):
            output = script(f"stage1_qwen3_SIZE_{optimizer}_ptd", *step)
            assert f"optimizer: {optimizer}" in output
    script("evaluate_qwen3_SIZE_ptd", "--max-documents", "8")
    script("report_qwen3_SIZE")
    report = json.loads((run_dir / "report.json").read_text())
    assert "moclip" in json.dumps(report)
    assert (run_dir / "report.md").stat().st_size > 100
    logs = (run_dir / "logs" / f"stage0_qwen3_{qwen3}_4K_ptd.node0.log").read_text()
    assert "coverage" in logs


@pytest.mark.parametrize("qwen3", ["4b", "8b"])
def test_the_true_model_fits_64_gb_at_the_scripts_settings(
    tmp_path: Path, environment: Environment, qwen3: str
) -> None:
    tiny.save_corpus(tmp_path / "corpus", num_documents=3)
    config = TRUE_CONFIG | TRUE_CONFIGS[qwen3]
    (tmp_path / "config.json").write_text(json.dumps(config))
    env = environment(tmp_path, MODEL_SIZE="full", CKPT_LOAD_DIR=tmp_path)
    for stage in ("stage0", "stage1"):
        name = f"{stage}_qwen3_{qwen3}_4K_{'moclip_' * (stage == 'stage1')}ptd"
        output = run_script(name, "--dry-run", **env)
        layout = {"4b": "TP 4 x PP 1 x DP 1", "8b": "TP 4 x PP 2 x DP 1"}[qwen3]
        assert layout in output
        [memory] = re.findall(r"memory per device +([\d.]+) GiB", output)
        assert 1 < float(memory) < 59.6


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*_*.sh")), ids=lambda path: path.stem)
def test_dry_run_prints_the_command_and_touches_nothing(
    path: Path, tmp_path: Path, environment: Environment
) -> None:
    env = environment(tmp_path, DRY_RUN=1, MODEL_SIZE="full", INPUT_FILE="rows.jsonl")
    output = run_script(path.stem, **env)
    [line] = [line for line in output.splitlines() if line.startswith("+ ")]
    words = shlex.split(line)
    assert words[1] in ("torchrun", "python")
    assert list(tmp_path.iterdir()) == []
    if words[1] == "torchrun":
        flags = dict(itertools.pairwise(words))
        assert flags["--seq-length"] == "4096"
        assert "--bf16" in words
        if path.stem.startswith("stage1"):
            assert (flags["--global-batch-size"], flags["--lr"]) == ("16", "1.25e-6")
            assert flags["--optimizer"] in path.stem


def test_a_dry_run_for_npus_needs_no_cann(tmp_path: Path, environment: Environment) -> None:
    env = environment(tmp_path, DRY_RUN=1, MODEL_SIZE="full", PLATFORM="npu")
    output = run_script("stage1_qwen3_4b_4K_moclip_ptd", **env)
    assert "--platform npu" in output
    assert "note: no CANN" in output
    assert "error: no CANN" in run_script(
        "stage1_qwen3_4b_4K_moclip_ptd", code=2, **(env | {"DRY_RUN": "0"})
    )


def test_a_failing_command_fails_the_script(tmp_path: Path, environment: Environment) -> None:
    env = environment(tmp_path, CKPT_LOAD_DIR=tmp_path / "nothing", DATA_PATH=tmp_path / "none")
    output = run_script("report_qwen3_4b_4K", code=3, **environment(tmp_path, PLATFORM="cpu"))
    assert "error: " in output
    assert "none of npu, cuda, cpu" in run_script(
        "stage0_qwen3_4b_4K_ptd", code=2, **(env | {"PLATFORM": "tpu"})
    )
    assert "set HF_DIR to the Hugging Face checkpoint" in run_script(
        "stage0_qwen3_4b_4K_ptd", code=2, **env
    )
    assert "no multiple of TP=4 x PP=1" in run_script(
        "stage0_qwen3_4b_4K_ptd", code=2, **(env | {"NPUS_PER_NODE": "6"})
    )
