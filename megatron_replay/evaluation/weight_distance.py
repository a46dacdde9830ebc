"""Relative L2 distance between the weights of two Hugging Face directories."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_replay.errors import CheckpointError
from megatron_replay.files import read_json, require_regular

#: Elements converted to float64 at once: 128 MiB for each of the two models.
_BLOCK = 1 << 24
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of ``directory``.

    Raises:
        CheckpointError: there are none.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError("no safetensors files here", where=directory)
    return files


class Weights:
    """The tensors of a directory by name, read one at a time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: dict[str, Path] = {}
        for path in weight_files(directory):
            require_regular(path, CheckpointError)
            try:
                with safe_open(path, framework="pt") as tensors:
                    names = list(tensors.keys())
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"cannot read: {error}", where=path) from error
            for name in names:
                if name in self._files:
                    raise CheckpointError(f"{name} is also in {self._files[name].name}", where=path)
                self._files[name] = path
        if self._is_tied() and _HEAD in self._files:
            # Tied: one parameter under two names, counted once. A different head is not tied.
            if not torch.equal(self[_HEAD], self[_EMBEDDING]):
                raise CheckpointError(
                    f"config.json ties {_HEAD} to {_EMBEDDING}, but they differ", where=directory
                )
            del self._files[_HEAD]

    def _is_tied(self) -> bool:
        config = read_json(self.directory / "config.json", CheckpointError)
        return bool(config.get("tie_word_embeddings", False))

    def names(self) -> set[str]:
        """Names of all tensors; a tied head has none of its own."""
        return set(self._files)

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._files[name], framework="pt") as tensors:
            tensor: torch.Tensor = tensors.get_tensor(name)
            return tensor


def _blocks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    flat = tensor.flatten()
    for start in range(0, len(flat), _BLOCK):
        yield flat[start : start + _BLOCK].double()


def relative_l2(model: Path, base: Path) -> float:
    """``√Σ‖θ − θ₀‖² / √Σ‖θ₀‖²``, summed in float64 over all parameters, each once.

    Peak memory: one tensor of each model and two float64 blocks.

    Raises:
        CheckpointError: the two do not hold the same tensors in the same shapes.
    """
    ours, theirs = Weights(model), Weights(base)
    different = ours.names() ^ theirs.names()
    if different:
        raise CheckpointError(
            "the tensors differ from the base's",
            where=model,
            expected=f"those of {base}",
            found=f"only one of the two has {', '.join(sorted(different)[:5])}",
        )
    distance, norm = 0.0, 0.0
    for name in sorted(ours.names()):
        tensor, reference = ours[name], theirs[name]
        if tensor.shape != reference.shape:
            raise CheckpointError(
                f"{name} has another shape than the base's",
                where=model,
                expected=list(reference.shape),
                found=list(tensor.shape),
            )
        for block, base_block in zip(_blocks(tensor), _blocks(reference), strict=True):
            distance += (block - base_block).square().sum().item()
            norm += base_block.square().sum().item()
    if norm == 0.0:
        raise CheckpointError("every weight is zero", where=base)
    return math.sqrt(distance / norm)
