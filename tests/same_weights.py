"""Whether two Hugging Face directories hold the same weights, as safetensors reads them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory, by name."""
    tensors = {}
    for path in Path(directory).glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def require_equal(directory: Path, reference: Path) -> None:
    """Assert that names, shapes, dtypes and all bits are equal."""
    ours, theirs = weights(directory), weights(reference)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert torch.equal(_bytes(tensor), _bytes(theirs[name])), name


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
