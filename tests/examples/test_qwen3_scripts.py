"""Every script of examples/qwen3, in the order of the journey, in its own layout, on a small Qwen3.

``DRY_RUN=1`` prints each script's commands. The journey runs them on forked ranks, where torch is
imported already; tests/e2e/test_torchrun.py runs the real torchrun.
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
import tarfile
from pathlib import Path
from typing import Any

import pytest

from examples.quickstart import init_base
from megatron_replay.checkpoint.directories import latest_iteration
from megatron_replay.config import Stage0Config, Stage1Config
from megatron_replay.errors import CheckpointError
from megatron_replay.flags import parse
from megatron_replay.model.config import ModelConfig
from megatron_replay.store import CandidateReader
from tests import pool, tiny
from tests.e2e import stages

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "qwen3"
TRUE_SHAPE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "rope_theta": 1000000, "rms_norm_eps": 1e-6, "max_position_embeddings": 40960,
    "hidden_act": "silu", "attention_bias": False, "torch_dtype": "bfloat16",
}  # fmt: skip
TRUE_SHAPES = {
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
}


def run_script(name: str, run_dir: Path, *flags: str, code: int = 0, **variables: object) -> str:
    """What a script prints, in an environment that holds nothing of this process's own."""
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "VIRTUAL_ENV": sys.prefix,
        "PYTHONPATH": ROOT, "HOME": run_dir, "RUN_DIR": run_dir, "PLATFORM": "cpu", **variables,
    }  # fmt: skip
    done = subprocess.run(
        ["bash", SCRIPTS / f"{name}.sh", *flags],
        env={key: str(value) for key, value in environment.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def commands(name: str, run_dir: Path, *flags: str, **variables: object) -> list[list[str]]:
    """The commands that a script would run."""
    output = run_script(name, run_dir, *flags, DRY_RUN=1, **variables)
    return [shlex.split(line[2:]) for line in output.splitlines() if line.startswith("+ ")]


def parse_as_stage(words: list[str], stage: type[Any]) -> Any:
    """The settings of a torchrun command, which the stage would refuse if a flag did not fit."""
    return parse(stage, words[words.index("-m") + 2 :], program="stage").config


def program(rank: int, world_size: int, argv: list[str]) -> object:
    """Run ``python argv`` from the top of the repository; returns the exit code."""
    os.chdir(ROOT)
    # A thread that first meets torch's pool in a fork may hang.
    os.environ |= {"HF_DEACTIVATE_ASYNC_LOAD": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            sys.modules.pop(argv[1], None)  # imported by another test; runpy would warn of it
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            sys.path.insert(0, str(Path(argv[0]).parent))
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    return 0


def execute(words: list[str]) -> None:
    """Run one command of a script on as many ranks as it starts."""
    if words[0] == "python":
        assert pool.run(1, program, words[1:]) == [0], words
        return
    module = words.index("-m") + 1
    ranks = int(words[words.index("--nproc_per_node") + 1])
    stage = words[module].removeprefix("megatron_replay.")
    results = pool.run(ranks, stages.main, stage, words[module + 1 :], None)
    assert [code for code, _, _ in results] == [0] * ranks, results


@pytest.mark.distributed
@pytest.mark.parametrize(("qwen3", "ranks"), [("4b", 4), ("8b", 8)])
def test_from_hugging_face_to_the_report(tmp_path: Path, qwen3: str, ranks: int) -> None:
    """The last three steps differ in the directory alone: once is enough."""
    steps = {
        "ckpt_convert_qwen3_{}_4K_hf2mcore": [],
        "ckpt_convert_qwen3_{}_4K_hf2mg": [],
        "data_convert_qwen3_{}_4K_instruction": [],
        "stage0_qwen3_{}_4K_ptd": [],
        "stage1_qwen3_{}_4K_ptd": ["--probe-documents", "2"],
    }
    if qwen3 == "4b":
        steps["ckpt_convert_qwen3_{}_4K_mcore2hf"] = []
        steps["evaluate_qwen3_{}_4K_ptd"] = ["--max-new-tokens", "8"]
        steps["report_qwen3_{}_4K"] = []
    given = {"MODEL_SIZE": "tiny", "TINY": tmp_path / "data"}
    for step, flags in steps.items():
        for words in commands(step.format(qwen3), tmp_path / "run", *flags, **given):
            execute(words)
    rank_files = (tmp_path / "run" / "mg" / "iter_0000001").glob("mp_rank_*/model_optim_rng.pt")
    assert len(list(rank_files)) == ranks
    assert len(CandidateReader(tmp_path / "run" / "store")) == 96
    assert latest_iteration(tmp_path / "run" / "moclip")
    if qwen3 == "4b":
        assert "moclip" in json.dumps(json.loads((tmp_path / "run" / "report.json").read_text()))
        assert (tmp_path / "run" / "report.md").stat().st_size > 100


@pytest.mark.parametrize(
    ("qwen3", "layout"), [("4b", "TP 4 x PP 1 x DP 1"), ("8b", "TP 4 x PP 2 x DP 1")]
)
def test_the_true_model_fits_64_gb_at_the_scripts_settings(
    tmp_path: Path, qwen3: str, layout: str
) -> None:
    tiny.save_corpus(tmp_path / "corpus", num_documents=3)
    (tmp_path / "config.json").write_text(json.dumps(TRUE_SHAPE | TRUE_SHAPES[qwen3]))
    for stage in ("stage0", "stage1"):
        name = f"{stage}_qwen3_{qwen3}_4K_ptd"
        output = run_script(name, tmp_path, "--dry-run", CKPT_LOAD_DIR=tmp_path)
        assert layout in output
        memory = re.search(r"memory per device\s+([\d.]+) GiB", output)
        assert memory is not None
        assert float(memory[1]) < 59.6  # 64 GB
        assert layout in (tmp_path / "logs" / f"{name}.node0.log").read_text()


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*_4K*.sh")), ids=lambda path: path.stem)
def test_dry_run_prints_the_command_and_touches_nothing(path: Path, tmp_path: Path) -> None:
    [words] = commands(path.stem, tmp_path, INPUT_FILE="rows.jsonl")
    assert list(tmp_path.iterdir()) == []
    assert words[0] in ("torchrun", "python")
    if words[0] == "torchrun":
        flags = dict(itertools.pairwise(words))
        assert flags["--seq-length"] == "4096"
        assert "--bf16" in words
        is_stage1 = path.stem.startswith("stage1")
        parse_as_stage(words, Stage1Config if is_stage1 else Stage0Config)
        if is_stage1:
            assert (flags["--global-batch-size"], flags["--lr"]) == ("16", "1.25e-6")
            assert (flags["--optimizer"], flags["--loss"]) == ("moclip", "restricted")


@pytest.mark.parametrize("optimizer", ["adamw", "mofo", "muonclip", "adamuon", "tam"])
def test_a_baseline_has_the_full_loss_and_a_directory_of_its_own(tmp_path, optimizer) -> None:
    [words] = commands("stage1_qwen3_4b_4K_ptd", tmp_path, OPTIMIZER=optimizer)
    config = parse_as_stage(words, Stage1Config)
    assert (config.optimizer.optimizer, config.loss.loss) == (optimizer, "full")
    assert config.training.save == str(tmp_path / optimizer)
    assert ("--mofo-fraction" in words) == (optimizer == "mofo")


def test_mistakes_end_a_script(tmp_path: Path) -> None:
    code = CheckpointError.exit_code  # of the program that the script runs
    assert "no checkpoint here" in run_script(
        "ckpt_convert_qwen3_4b_4K_mcore2hf", tmp_path, code=code
    )
    stage1 = "stage1_qwen3_4b_4K_ptd"
    for found, variables in (
        ("none of npu, cuda, cpu", {"PLATFORM": "tpu"}),
        ("set HF_DIR to the Hugging Face checkpoint", {}),
        ("no multiple of TP=4 x PP=1", {"NPUS_PER_NODE": 6}),
        ("error: no CANN", {"PLATFORM": "npu"}),
    ):
        assert found in run_script(stage1, tmp_path, code=2, **variables)
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        given = {"MASTER_PORT": port, "CKPT_LOAD_DIR": tmp_path}
        assert f"MASTER_PORT={port}: another" in run_script(stage1, tmp_path, code=2, **given)
    output = run_script(stage1, tmp_path, DRY_RUN=1, PLATFORM="npu")
    assert "note: no CANN" in output
    assert "--platform npu" in output


def test_the_environment_that_the_caller_activated_wins(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"  # what asks for a free port
    python.write_text("#!/bin/sh\necho 4242\n")
    python.chmod(0o755)
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    given = {"PATH": path, "VIRTUAL_ENV": "", "CONDA_PREFIX": tmp_path}
    for name, wins in (("mine", True), ("base", not (ROOT / ".venv" / "bin").is_dir())):
        [words] = commands(
            "stage0_qwen3_4b_4K_ptd", tmp_path / "run", **given, CONDA_DEFAULT_ENV=name
        )
        assert (words[words.index("--master_port") + 1] == "4242") == wins, name


def test_two_jobs_on_a_node_take_ports_of_their_own_and_nodes_the_same_one(tmp_path: Path) -> None:
    def port(**variables: object) -> str:
        [words] = commands("stage0_qwen3_4b_4K_ptd", tmp_path, **variables)
        return words[words.index("--master_port") + 1]

    assert 1024 < int(port()) < 65536
    assert {port() for _ in range(5)} != {port()}
    assert port(NNODES=2) == port(NNODES=2, NODE_RANK=1) == "6000"
    assert port(MASTER_PORT=6001) == "6001"


@pytest.mark.parametrize("qwen3", ["4b", "8b"])
def test_random_weights_have_the_true_shape(tmp_path: Path, qwen3: str) -> None:
    name = f"data_convert_qwen3_{qwen3}_4K_instruction"
    _, init_base_command, _ = commands(name, tmp_path, MODEL_SIZE="random")
    shape = init_base_command[init_base_command.index("--shape") + 1]
    (tmp_path / "config.json").write_text(json.dumps(TRUE_SHAPE | TRUE_SHAPES[qwen3]))
    assert init_base.config(shape) == ModelConfig.from_hf(tmp_path)


#: Stands in for torchrun, python, df and du: takes no time, and fails as the variable says.
STAND_IN = """#!/usr/bin/env bash
case "$0 $*" in
    *"-c import socket"*) exec {python} "$@" ;;
    */df*) echo "${{FREE:-500}}G" && exit ;;
    */du*) echo -e "${{THERE:-1}}G\\truns/4" && exit ;;
esac
echo "$(basename "$0") $*" >>"$HOME/calls"
mkdir -p "$RUN_DIR/store" "$RUN_DIR/moclip/iter_0000003" "$RUN_DIR/random/hf"
touch "$RUN_DIR/moclip/metrics.jsonl" "$RUN_DIR/moclip/iter_0000003/weights.distcp"
touch "$RUN_DIR/store/cost.json" "$RUN_DIR/store/part.bin" "$RUN_DIR/random/hf/model.safetensors"
[[ -z ${{FAILS:-}} || "$*" != *"$FAILS"* ]]
"""


def stand_ins(folder: Path) -> str:
    """The PATH of a shell in which nothing runs."""
    folder.mkdir()
    for name in ("python", "torchrun", "df", "du"):
        (folder / name).write_text(STAND_IN.format(python=sys.executable))
        (folder / name).chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def test_the_first_run_goes_on_after_a_failure_and_repeats_only_that(tmp_path: Path) -> None:
    run = tmp_path / "first_run-4b"
    # The weights of a run of yours, which the first run must not read.
    given = {"PATH": stand_ins(tmp_path / "bin"), "HF_DIR": tmp_path / "mine"}
    (run / "random" / "hf").mkdir(parents=True)
    output = run_script("first_run", tmp_path, code=1, FAILS="megatron_replay.stage0", **given)
    lines = [line.split() for line in (run / "logs" / "summary.txt").read_text().splitlines()]
    steps = ["machine", "doctor", "build", "layers", "inputs", "stage0", "store"]
    assert [name for name, *_ in lines] == [*steps, "dry_run", "stage1", "resume"]
    assert [name for name, result, *_ in lines if result != "ok"] == ["stage0"], output
    with tarfile.open(run / "first_run-4b.tar.gz") as archive:
        names = set(archive.getnames())
    assert {"logs/summary.txt", "logs/stage0.log", "./moclip/metrics.jsonl"} <= names
    assert not {name for name in names if not name.endswith((".log", ".txt", ".json", ".jsonl"))}
    calls = (tmp_path / "calls").read_text()
    assert "mine" not in calls
    assert calls.count("megatron_replay.stage1") == 3  # dry run, three steps, resumed

    run_script("first_run", tmp_path, **given)
    again = (tmp_path / "calls").read_text().removeprefix(calls).splitlines()
    assert len(again) == 1, again
    assert "megatron_replay.stage0" in again[0]


def test_the_first_run_resumes_only_what_was_saved_and_needs_room(tmp_path: Path) -> None:
    given: dict[str, object] = {"PATH": stand_ins(tmp_path / "bin")}
    small = run_script("first_run", tmp_path, code=2, FREE=100, **given)
    assert "100 GB are free, and 119 are needed" in small
    # Of a shell that runs two nodes.
    given |= {"NNODES": 2, "MASTER_ADDR": "node0", "FREE": 100, "THERE": 20}
    run_script("first_run", tmp_path, code=1, FAILS="--nproc_per_node 4 --nnodes 1", **given)
    lines = (tmp_path / "first_run-4b" / "logs" / "summary.txt").read_text().splitlines()
    failed = [line.split()[0] for line in lines if "FAILED" in line]
    assert failed == ["stage0", "stage1", "resume"]
    calls = (tmp_path / "calls").read_text()
    assert calls.count("megatron_replay.stage1") == 2  # dry run, three steps


def test_help_runs_nothing(tmp_path: Path) -> None:
    assert "QWEN3=8b" in run_script("first_run", tmp_path, "--help")
    assert "takes variables" in run_script("first_run", tmp_path, "QWEN3=8b", code=2)
    assert "--train-iters" in run_script("stage1_qwen3_4b_4K_ptd", tmp_path, "--help")
    assert list(tmp_path.iterdir()) == []
