"""Model directories are untrusted: what does not fit together is refused before it is loaded."""

from __future__ import annotations

import json
import os
import shutil
import struct

import pytest
from safetensors.torch import load_file, save_file

from megatron_replay.checkpoint.directories import LATEST
from megatron_replay.errors import CheckpointError, ConfigError
from megatron_replay.evaluation.language_model import load_model, require_model
from tests.evaluation.site import save_model


@pytest.fixture
def model(site, tmp_path):
    return shutil.copytree(site / "base", tmp_path / "model")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 10**9}, "expected 1000000000 layers; found 24 tensors"),
        ({"num_labels": 10**9}, "unusable num_labels in config.json"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "unusable num_hidden_layers"),
        ({"hidden_size": 10**9}, "wrong shape of model.embed_tokens.weight"),
        ({"vocab_size": 10**12}, "wrong shape of model.embed_tokens.weight"),
        ({"model_type": "nothing"}, "unsupported model"),
    ],
)
def test_sizes_that_do_not_fit_the_weights(model, values, message):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        load_model(model)
    assert str(model) in str(caught.value)
    assert message in str(caught.value)


def test_sizes_that_fit(model, tmp_path):
    require_model(model)
    require_model(save_model(tmp_path / "untied", tied=False))
    with pytest.raises(CheckpointError, match="no Hugging Face model here"):
        load_model(tmp_path)
    (tmp_path / LATEST).write_text("2")
    with pytest.raises(CheckpointError, match=r"Export the run: .*convert_checkpoint"):
        load_model(tmp_path)


def test_weights_of_a_terabyte_are_not_read(model):
    """A sparse file, whose header says so, or does not; each would take hours to hash."""
    file, size = model / "model.safetensors", 1 << 40
    content = file.read_bytes()
    header = json.dumps({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    try:
        os.truncate(file, size)
        with pytest.raises(CheckpointError, match="not a safetensors file"):
            require_model(model)
        file.write_bytes(struct.pack("<Q", len(header)) + header)
        os.truncate(file, 8 + len(header) + size)
        with pytest.raises(CheckpointError, match=r"tensors missing|mmap|not a safetensors"):
            require_model(model)
    finally:
        file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        require_model(model)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
@pytest.mark.parametrize("damage", ["pipe", "bytes"])
def test_odd_files_are_one_line(model, name, damage, run):
    file = model / name
    file.unlink(missing_ok=True)
    os.mkfifo(file) if damage == "pipe" else file.write_bytes(b"\xff" * 100)
    code, error = run(f"--base={model}")
    assert (code, str(model) in error) == (4, True)
    assert (damage == "bytes") or "found a pipe" in error


def test_weights_that_are_not_finite(model):
    file, name = model / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(file)
    tensors[name].view(-1)[1] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"the weights are not finite: {name}"):
        load_model(model)
