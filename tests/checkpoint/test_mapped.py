"""A safetensors file's tensors, as views of it that go when nobody holds them."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from megatron_replay.checkpoint.mapped import mapped_tensors
from megatron_replay.errors import CheckpointError


def mapped_kilobytes() -> int:
    """Resident pages that belong to files."""
    with open("/proc/self/status") as handle:
        return next(int(line.split()[1]) for line in handle if line.startswith("RssFile"))


def test_parts_of_tensors(tmp_path):
    tensors = {
        "matrix": torch.arange(3000.0).view(60, 50),
        "half": torch.arange(12).bfloat16().view(3, 4),
        "none": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    mapped = mapped_tensors(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert tuple(mapped[name].get_shape()) == tensor.shape
        assert mapped[name][:].dtype == tensor.dtype
        for part in (slice(None), slice(1, 2), (slice(None), slice(1, 3)), slice(0, 0)):
            assert torch.equal(mapped[name][part], tensor[part])


@pytest.mark.parametrize("spaces", range(4))
def test_offsets_that_no_dtype_divides(tmp_path, spaces):
    table = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
        "c": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [11, 12]},
    }
    header = json.dumps(table).encode() + b" " * spaces
    content = struct.pack("<Q", len(header)) + header + b"abc" + struct.pack("<2f", 1, -2) + b"x"
    (tmp_path / "x.safetensors").write_bytes(content)
    mapped = mapped_tensors(tmp_path / "x.safetensors")
    assert mapped["b"][:].tolist() == [1, -2]
    with pytest.raises(CheckpointError, match=r"unsupported dtype .*found F8_E4M3"):
        mapped["c"][:]


def test_writing_to_a_view_leaves_the_file_alone(tmp_path):
    save_file({"a": torch.ones(9)}, tmp_path / "x.safetensors")
    mapped = mapped_tensors(tmp_path / "x.safetensors")["a"]
    mapped[:].zero_()
    assert mapped[:].tolist() == [1] * 9


def test_pages_go_with_the_view(tmp_path):
    save_file({"a": torch.ones(4 << 20)}, tmp_path / "x.safetensors")
    mapped = mapped_tensors(tmp_path / "x.safetensors")["a"]
    before = mapped_kilobytes()
    view = mapped[:]
    assert view.sum() == 4 << 20
    assert mapped_kilobytes() > before + 12_000
    del view
    assert mapped_kilobytes() < before + 4_000
