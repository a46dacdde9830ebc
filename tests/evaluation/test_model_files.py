"""Directories whose config.json and weights do not belong together, refused before memory is."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_replay.errors import CheckpointError, ConfigError
from megatron_replay.evaluation.language_model import load_model, require_model
from tests.evaluation.models import save_model
from tools import evaluate


@pytest.fixture
def model(model_directory: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_directory, tmp_path / "model")


def change(model: Path, **values: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 10**9}, "expected 1000000000 layers; found 24 tensors"),
        ({"num_hidden_layers": 3}, "tensors missing"),
        ({"num_hidden_layers": 1}, "not part of the model"),
        ({"num_labels": 10**9}, "unusable num_labels in config.json"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "unusable num_hidden_layers"),
        ({"num_attention_heads": 64}, "q_proj.weight"),
        ({"num_key_value_heads": 0}, "unusable num_key_value_heads"),
        ({"hidden_size": 10**9}, "wrong shape of model.embed_tokens.weight"),
        ({"hidden_size": "x"}, "unusable hidden_size"),
        ({"vocab_size": 10**12}, "wrong shape of model.embed_tokens.weight"),
        ({"model_type": "nothing"}, "unsupported model"),
        ({"quantization_config": {"bits": 4}}, "unsupported quantization_config"),
    ],
)
def test_sizes_that_do_not_fit_the_weights(
    model: Path, values: dict[str, Any], message: str
) -> None:
    change(model, **values)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        load_model(model)
    assert str(model) in str(caught.value)
    assert message in str(caught.value)


def test_sizes_that_fit(model: Path, tmp_path: Path) -> None:
    require_model(model)
    require_model(save_model(tmp_path / "untied", tied=False))


def weights(path: Path, table: dict[str, Any], size: int) -> None:
    """A safetensors file of which only the header is written."""
    header = json.dumps(table).encode()
    with path.open("wb") as handle:
        handle.write(struct.pack("<Q", len(header)) + header)
        handle.truncate(8 + len(header) + size)


def test_weights_of_a_terabyte_are_not_read(model: Path) -> None:
    """A sparse file, whose header says so, or does not; each would take hours to hash."""
    file, size = model / "model.safetensors", 1 << 40
    content = file.read_bytes()
    try:
        os.truncate(file, size)
        with pytest.raises(CheckpointError, match="not a safetensors file"):
            require_model(model)
        extra = {"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
        weights(file, extra, size)
        with pytest.raises(CheckpointError, match=r"tensors missing|mmap|not a safetensors"):
            require_model(model)
    finally:
        file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        require_model(model)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
@pytest.mark.parametrize("damage", ["pipe", "bytes"])
def test_odd_files_are_one_line(
    model: Path, name: str, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, text = model / name, tmp_path / "text.jsonl"
    file.unlink(missing_ok=True)
    if damage == "pipe":
        os.mkfifo(file)
    else:
        file.write_bytes(b"\xff" * 100)
    text.write_text('{"text": "abc"}\n')
    given = [f"--base={model}", f"--general-text={text}", f"--output={tmp_path}/eval.json"]
    assert evaluate.main(given) == 4
    [line] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert str(model) in line
    assert (damage == "bytes") or "found a pipe" in line


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_weights_that_are_no_numbers(model: Path, name: str) -> None:
    """What Stage 1 refuses: transformers casts integers, and computes with what is not finite."""
    file = model / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name].int()}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"wrong dtype of {name} \(expected .*; found I32"):
        require_model(model)
    tensors[name].view(-1)[1] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"the weights are not finite: {name}"):
        load_model(model)
