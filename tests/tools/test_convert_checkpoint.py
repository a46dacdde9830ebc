"""The converter's command line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_replay.checkpoint.convert_ranks import grid_for, hf_to_ranks
from megatron_replay.checkpoint.rank_files import RankFile
from megatron_replay.config import ParallelConfig
from megatron_replay.model.config import ModelConfig
from tests import pool, tiny
from tests.same_weights import require_equal
from tools import convert_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.save_qwen3(
        tmp_path_factory.mktemp("convert") / "model", tied=True, vocab_size=97, num_hidden_layers=2
    )


def _run(rank: int, world_size: int, argv: list[str]) -> int:
    return convert_checkpoint.main(argv)


def test_from_a_shell(model, tmp_path):
    """In a process of its own, where nothing has prepared the platform for megatron.core."""
    root = Path(convert_checkpoint.__file__).parents[1]
    flags = ["--load", model, "--save", tmp_path / "run", "--save-model-type", "mcore"]
    done = subprocess.run(
        [sys.executable, "-m", "tools.convert_checkpoint", *map(str, flags), "--no-verify"],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").exists()


def test_flags_of_mindspeed_llm(model, tmp_path, capfd):
    mg, hf = tmp_path / "mg", tmp_path / "hf"
    there = (
        f"--load-model-type hf --save-model-type mg --load-dir {model} --save-dir {mg} "
        "--target-tensor-parallel-size 2 --target-pipeline-parallel-size 2 --num-layer-list 1,1 "
        "--transformer-impl transformer_engine"
    ).split()
    back = (
        f"--load-model-type mg --save-model-type hf --load-dir {mg} --save-dir {hf} "
        "--target-tensor-parallel-size 1 --trust-pickle"
    ).split()
    assert convert_checkpoint.main(there) == 0
    assert convert_checkpoint.main(back) == 0
    require_equal(hf, model)
    assert capfd.readouterr().out.count("verified: ") == 2
    assert convert_checkpoint.main([*there, "--overwrite", "--no-verify"]) == 0
    assert "not verified" in capfd.readouterr().out


#: ({what}: the model, a run with iterations 2 and 4, or ranks; flags; what is printed).
MISTAKES = [
    ("model", "--save-model-type mg --moe-grouped-gemm", "unknown flag --moe-grouped"),
    ("model", "--save-model-type mgg", "invalid choice: 'mgg'"),
    ("model", "--save-model-type mg --load-model-type mg", "--load-model-type: .*expected hf; fou"),
    ("model", "--save-model-type hf", "is hf already"),
    ("model", "--save-model-type mcore --target-tensor-parallel-size 2",
     "--target-tensor-parallel-size: .*writing mg .*found hf to mcore"),
    ("model", "--save-model-type mg --hf-cfg-dir .", "--hf-cfg-dir: .*reading mg .*Leave it"),
    ("model", "--save-model-type mcore --trust-pickle", "--trust-pickle: .*reading mg"),
    ("model", "--save-model-type mg --tensor-model-parallel-size 2",
     "--tensor-model-parallel-size: .*hf <-> mcore"),
    ("model", "--save-model-type mg --target-tensor-parallel-size 0", "number from 1; found 0"),
    ("model", "--save-model-type mg --num-layer-list a", "--num-layer-list: expected .*; found a"),
    ("model", "--save-model-type mcore --iteration 3", "--iteration: .*mcore .*found hf to mcore"),
    ("model", "--save-model-type mg --blend x", "--blend: .*writing hf .*found hf to mg"),
    ("run", "--save-model-type mcore --blend x", "--blend: .*writing hf .*found mcore to mcore"),
    ("model", "--blend x", "--blend and --blend-weight are given together or not"),
    ("model", "--blend x --blend-weight 1", "--blend-weight: .*between 0 and 1; found 1.0"),
    ("nowhere", "", "nowhere: no checkpoint here .*found no such directory"),
    ("run", "--iteration 3", r"--iteration: no such iteration \(expected 2, 4; found 3\)"),
    ("ranks", "", "ranks: mg files are pickles.*--trust-pickle"),
    ("ranks", "--save-model-type mcore", "no conversion from mg to mcore"),
    ("ranks", "--trust-pickle", r"config\.json: unsupported model"),
]  # fmt: skip


@pytest.mark.parametrize(("load", "flags", "message"), MISTAKES)
def test_mistakes(model, tmp_path, capsys, load, flags, message):
    """Of checkpoints, only what is looked at before weights are read."""
    for path in ("run/iter_0000002", "run/iter_0000004", "ranks/iter_0000004/mp_rank_00"):
        (tmp_path / path).mkdir(parents=True)
    for run in ("run", "ranks"):
        (tmp_path / run / "latest_checkpointed_iteration.txt").write_text("4")
    (tmp_path / "ranks" / "hf").mkdir()
    (tmp_path / "ranks" / "hf" / "config.json").write_text('{"model_type": "gpt2"}')
    source = model if load == "model" else tmp_path / load
    argv = ["--load", str(source), "--save", str(tmp_path / "out"), *flags.split()]
    assert convert_checkpoint.main(argv) in (2, 4)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


def _logits_of_ranks(rank: int, world_size: int, model: Path, ranks: Path) -> None:
    from megatron_replay import parallel, platform
    from megatron_replay.checkpoint.convert_models import require_logits
    from megatron_replay.checkpoint.load import load_model
    from megatron_replay.config import ModelConfigSource

    config = ParallelConfig(platform="cpu")
    groups = parallel.initialize(config, platform.select("cpu"))
    loaded = load_model(ModelConfigSource(load=str(model), bf16=False), config, groups)
    file = RankFile(next(ranks.rglob("*.pt")))
    with torch.no_grad():
        for parameter in loaded.module.parameters():
            parameter.fill_(torch.nan)
    loaded.module.load_state_dict({name: file[name] for name in file.shapes}, strict=False)
    require_logits(loaded, model, groups, torch.float32)


def test_megatron_core_computes_transformers_logits_from_a_rank_file(model, tmp_path):
    hf_to_ranks(model, tmp_path / "mg", grid_for(ModelConfig.from_hf(model), tp=1, pp=1))
    pool.run(1, _logits_of_ranks, model, tmp_path / "mg")


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
    """The stored dtype decides, not the one in config.json."""
    base = shutil.copytree(model, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors = {name: tensor.to(stored) for name, tensor in tensors.items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": named}))
    flags = ["--load", base, "--save", tmp_path / "mcore", "--save-model-type", "mcore"]
    assert pool.run(1, _run, [*map(str, flags), "--params-dtype", asked, "--no-verify"]) == [0]
    state = json.loads((tmp_path / "mcore" / "iter_0000000" / "train_state.json").read_text())
    assert bool(state["identity"]) is is_exact
