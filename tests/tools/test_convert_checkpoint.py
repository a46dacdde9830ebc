"""The converter's command line: MindSpeed-LLM's flags work, others say what to do instead."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_replay.checkpoint.export import require_equal
from megatron_replay.checkpoint.stream import grid_for, hf_to_ranks
from megatron_replay.errors import CheckpointError
from megatron_replay.model.config import ModelConfig
from tests import pool, tiny
from tools import convert_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.save_qwen3(
        tmp_path_factory.mktemp("convert") / "model", tied=True, vocab_size=97, num_hidden_layers=2
    )


def _run(rank: int, world_size: int, argv: list[str]) -> int:
    sys.argv = ["convert_checkpoint", *argv]
    return convert_checkpoint.main()


def mistake(capsys, monkeypatch, *argv: object) -> str:
    """The one line that is printed."""
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint", *map(str, argv)])
    assert convert_checkpoint.main() in (2, 4)
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_an_iteration_that_is_not_there(model, tmp_path, capsys, monkeypatch):
    flags = ["--save", tmp_path / "out", "--iteration", 3]
    said = mistake(capsys, monkeypatch, "--load", model, *flags, "--save-format", "mcore")
    assert said == "error: --iteration: hf has one set of weights (expected no number; found 3)"
    for number in (2, 4):
        (tmp_path / "run" / f"iter_000000{number}").mkdir(parents=True)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("4")
    said = mistake(capsys, monkeypatch, "--load", tmp_path / "run", *flags)
    assert said == "error: --iteration: no such iteration (expected 2, 4; found 3)"
    assert not (tmp_path / "out").exists()


def test_flags_of_mindspeed_llm(model, tmp_path, capfd):
    mg, hf = tmp_path / "mg", tmp_path / "hf"
    common = ["--model-type-hf", "qwen3"]
    there = [
        *("--load-model-type", "hf", "--save-model-type", "mg", "--load-dir", model),
        *("--save-dir", mg, "--target-tensor-parallel-size", 2),
        *("--target-pipeline-parallel-size", 2, "--num-layer-list", "1,1"),
        *("--transformer-impl", "transformer_engine"),
    ]
    back = [
        *("--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", mg),
        *("--save-dir", hf, "--target-tensor-parallel-size", 1, "--trust-pickle"),
    ]
    assert pool.run(1, _run, list(map(str, there + common))) == [0]
    assert pool.run(1, _run, list(map(str, back + common))) == [0]
    require_equal(hf, model)
    said = capfd.readouterr().out
    assert said.count("verified: 24 tensors read back, every bit compared") == 2
    assert said.count("verified: logits equal transformers'") == 2


def test_a_large_model_is_said_not_to_be_run(model, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(convert_checkpoint, "_LARGEST_RUN", 1_000_000 - 1)
    monkeypatch.setattr(convert_checkpoint.ModelConfig, "num_parameters", lambda _: 1_000_000)
    argv = ["x", "--load", str(model), "--save", str(tmp_path / "mg"), "--save-model-type", "mg"]
    monkeypatch.setattr(sys, "argv", argv)
    assert convert_checkpoint.main() == 0
    assert "logits: not compared, the model has more than 1 million parameters" in (
        capsys.readouterr().out
    )
    monkeypatch.setattr(sys, "argv", [*argv, "--overwrite", "--no-verify"])
    assert convert_checkpoint.main() == 0
    assert "not verified, as asked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--moe-grouped-gemm"], "--moe-grouped-gemm: not used .*models here are dense"),
        (["--target-expert-parallel-size", "1"], "models here are dense"),
        (["--spec", "a", "b"], r"--spec: .*names are always megatron-core's"),
        (["--tokenizer-model=x"], r"--tokenizer-model: .*tokenizer goes along"),
        (["--lora-load", "x"], "Merge the adapter first"),
        (["--save-dri", "x"], r"--save-dri: no such flag. Did you mean --save-dir\?"),
        (["--save-model-type", "mgg"], r"invalid choice: 'mgg'"),
        (["--load-model-type", "mg"], r"--load-model-type: .*expected hf; found mg"),
        (["--model-type-hf", "llama2"], "expected qwen3; found llama2"),
        (["--save-model-type", "hf"], "is hf already"),
        (["--save-model-type", "mcore", "--target-tensor-parallel-size", "2"],
         "--target-tensor-parallel-size: mcore is not cut into ranks"),
        (["--hf-cfg-dir", "."], "--hf-cfg-dir: hf has its own config.json .*to read mg. Leave it"),
        (["--save-model-type", "mcore", "--trust-pickle"], "--trust-pickle: hf has .* no pickles"),
        (["--tensor-model-parallel-size", "2"], "--tensor-model-parallel-size: one process"),
        (["--load", "/nowhere"], r"/nowhere: no checkpoint here .*found no such directory"),
        (["--num-layer-list", "a"], "--num-layer-list: invalid"),
    ],
)  # fmt: skip
def test_mistakes(model, tmp_path, capsys, monkeypatch, argv, message):
    base = ["--load", model, "--save", tmp_path / "mg", "--save-model-type", "mg"]
    line = mistake(capsys, monkeypatch, *base, *argv)
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert not (tmp_path / "mg").exists()


def test_pickles_need_trust(tmp_path, capsys, monkeypatch):
    (tmp_path / "iter_0000007" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    line = mistake(capsys, monkeypatch, "--load", tmp_path, "--save", tmp_path / "hf")
    assert "pickles" in line
    assert "--trust-pickle" in line
    line = mistake(
        capsys, monkeypatch, "--load", tmp_path, "--save", tmp_path / "m", "--save-format", "mcore"
    )
    assert "no conversion from mg to mcore" in line
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    line = mistake(capsys, monkeypatch, "--load", tmp_path, "--save", "x", "--trust-pickle")
    assert "config.json" in line


def _compare_logits(rank: int, world_size: int, hf: Path, ranks: Path) -> str:
    try:
        convert_checkpoint.verify_logits(hf, ranks, "cpu")
    except CheckpointError as error:
        return str(error)
    return "equal"


def test_logits_are_those_of_the_ranks(model, tmp_path):
    """Not those of the directory beside: ranks of another model are told from it."""
    config = ModelConfig.from_hf(model)
    hf_to_ranks(model, tmp_path / "same", grid_for(config, tp=2, pp=2, transformer_engine=True))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5:9] *= 2
    other = Path(shutil.copytree(model, tmp_path / "other"))
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    hf_to_ranks(other, tmp_path / "ranks", grid_for(config, tp=2, pp=1))
    [same] = pool.run(1, _compare_logits, model, tmp_path / "same")
    [differs] = pool.run(1, _compare_logits, model, tmp_path / "ranks")
    assert same == "equal"
    assert "logits differ from transformers'" in differs


def test_an_mcore_checkpoint_is_checked_as_others_are(model, tmp_path, capsys, monkeypatch):
    """Its config.json lies in hf/."""
    run = tmp_path / "run"
    (run / "iter_0000001").mkdir(parents=True)
    (run / "latest_checkpointed_iteration.txt").write_text("1")
    (run / "hf").mkdir()
    shutil.copy(model / "config.json", run / "hf")
    base = ["--load", run, "--save", tmp_path / "out"]
    for flags, message in (
        (["--model-type-hf", "llama2"], "--model-type-hf: .*expected qwen3; found llama2"),
        (["--hf-cfg-dir", model], "--hf-cfg-dir: mcore has its own config.json"),
        (["--trust-pickle"], "--trust-pickle: mcore has"),
    ):
        assert re.search(message, mistake(capsys, monkeypatch, *base, *flags))


@pytest.mark.parametrize(
    ("stored", "named", "asked", "is_exact"),
    [
        (torch.float32, "bfloat16", "auto", False),
        (torch.bfloat16, "bfloat16", "auto", True),
        (torch.float16, "bfloat16", "auto", False),
        (torch.bfloat16, "float32", "auto", True),
        (torch.float64, "float32", "auto", False),
        (torch.float32, "bfloat16", "float32", True),
    ],
)
def test_rounded_weights_are_no_longer_the_base(model, tmp_path, stored, named, asked, is_exact):
    """What is stored decides, not what config.json says."""
    base = shutil.copytree(model, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors = {name: tensor.to(stored) for name, tensor in tensors.items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": named}))
    flags = ["--load", base, "--save", tmp_path / "mcore", "--save-format", "mcore"]
    assert pool.run(1, _run, [*map(str, flags), "--dtype", asked, "--no-verify"]) == [0]
    state = json.loads((tmp_path / "mcore" / "iter_0000000" / "train_state.json").read_text())
    assert bool(state["identity"]) is is_exact
