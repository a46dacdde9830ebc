"""A safetensors file's tensors, as views of it that are released with the tensor."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from megatron_replay.checkpoint.hf import stored_tensors
from megatron_replay.errors import CheckpointError


def test_parts_of_tensors(tmp_path):
    tensors = {
        "matrix": torch.arange(3000.0).view(60, 50),
        "half": torch.arange(12).bfloat16().view(3, 4),
        "none": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    stored = stored_tensors(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert stored[name].shape == tensor.shape
        assert stored[name].mapped().dtype == stored[name].torch_dtype() == tensor.dtype
        assert torch.equal(stored[name].mapped(), tensor)
    (tmp_path / "x.safetensors").write_bytes(b"shorter")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: cannot read"):
        stored["matrix"].mapped()


@pytest.mark.parametrize("spaces", range(4))
def test_offsets_that_no_dtype_divides(tmp_path, spaces):
    table = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    header = json.dumps(table).encode() + b" " * spaces
    content = struct.pack("<Q", len(header)) + header + b"abc" + struct.pack("<2f", 1, -2)
    (tmp_path / "x.safetensors").write_bytes(content)
    stored = stored_tensors(tmp_path / "x.safetensors")
    assert stored["b"].mapped().tolist() == [1, -2]
    with pytest.raises(CheckpointError, match=r"wrong dtype of a .*expected F64.*found U8"):
        stored["a"].torch_dtype()


def test_pages_go_with_the_view_and_writing_to_it_leaves_the_file_alone(tmp_path, mapped_kilobytes):
    save_file({"a": torch.ones(4 << 20)}, tmp_path / "x.safetensors")
    stored = stored_tensors(tmp_path / "x.safetensors")["a"]
    before = mapped_kilobytes()
    view = stored.mapped()
    assert view.sum() == 4 << 20
    assert mapped_kilobytes() > before + 12_000
    view[:9] = 0
    del view
    assert mapped_kilobytes() < before + 4_000
    assert stored.mapped()[:9].tolist() == [1] * 9
