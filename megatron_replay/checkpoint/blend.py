"""Weights between a base and a model tuned from it: ``(1 − α)·base + α·tuned``.

Wortsman et al. (2022, arXiv 2109.01903) average the weights of a fine-tuned model and its base; Lin
et al. (2024, arXiv 2309.06256) do so to reduce what a language model forgets. α is called
``weight``: 0 is the base, 1 the tuned model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_replay.checkpoint.export import write_model_files, write_weights
from megatron_replay.checkpoint.hf import HFReader, require_same
from megatron_replay.checkpoint.names import EMBEDDING, hf_tensor_shapes
from megatron_replay.checkpoint.staging import publish, start_directory
from megatron_replay.errors import CheckpointError
from megatron_replay.model.config import ModelConfig

if TYPE_CHECKING:
    from megatron_replay.checkpoint.load import LoadedModel
    from megatron_replay.parallel import Parallel


def interpolate(base: Tensor, tuned: Tensor, weight: float) -> Tensor:
    """``(1 − weight)·base + weight·tuned``, in fp32; exact where both are equal, and at 0 and 1."""
    return torch.lerp(base.float(), tuned.float(), weight)


def blend_into(model: LoadedModel, base: str | Path, weight: float, parallel: Parallel) -> None:
    """Replace this rank's weights by those between ``base`` and them, rounded to their dtype.

    Holds one parameter of the base at a time. No communication.

    Args:
        base: a Hugging Face directory.

    Raises:
        CheckpointError: ``base`` is incomplete, not finite, or of another architecture.
    """
    reader = open_base(base, model.shape)
    for name, parameter in model.module.named_parameters():
        shard = torch.empty(parameter.shape, dtype=torch.float32)
        reader.fill(shard, model.mapping(name), parallel.tp_rank, parallel.tp_size)
        if not shard.isfinite().all():
            raise CheckpointError(f"the weights of {name} are not finite", where=base)
        parameter.data.copy_(interpolate(shard.to(parameter.device), parameter.data, weight))


def open_base(base: str | Path, tuned: ModelConfig) -> HFReader:
    """The tensors of ``base``.

    Raises:
        CheckpointError: they are incomplete, or the base is not of the tuned model's architecture.
    """
    config = ModelConfig.from_hf(base)
    for name, expected in vars(tuned).items():
        if (found := getattr(config, name)) != expected:
            raise CheckpointError(
                f"the base and the tuned model differ in {name}",
                where=base,
                expected=expected,
                found=found,
                fix="Give the base that the model was tuned from",
            )
    reader = HFReader(base)
    reader.check(config)
    return reader


class Blend:
    """A base and a tuned model, two Hugging Face directories, and all that is between them.

    Raises:
        CheckpointError: one is incomplete, or they are not of one architecture.
    """

    def __init__(self, base: Path, tuned: Path) -> None:
        config = ModelConfig.from_hf(tuned)
        self._tuned, self._base = HFReader(tuned), open_base(base, config)
        self._tuned.check(config)
        self._names = list(hf_tensor_shapes(config))

    def tensors(self, weight: float) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of each, in the tuned model's dtype; holds one at a time."""
        for name in self._names:
            tuned = self._tuned.tensor(name)
            yield name, interpolate(self._base.tensor(name), tuned, weight).to(tuned.dtype)

    def write(self, directory: Path, weight: float, *, overwrite: bool) -> None:
        """Write the blend with the tuned model's config.json and tokenizer, and verify its bits.

        Raises:
            CheckpointError: a tensor reads differently than it was written.
            OutputError: ``directory`` is not empty, or cannot be written.
        """
        staged = start_directory(directory, overwrite=overwrite)
        written = write_weights(staged, self.tensors(weight), dtype=None)
        dtype = self._tuned.stored[EMBEDDING].torch_dtype()
        write_model_files(staged, written, self._tuned.directory, dtype=dtype)
        reader = HFReader(staged)
        for name, tensor in self.tensors(weight):
            require_same(name, reader.tensor(name), tensor, staged)
        publish(staged, directory, overwrite=overwrite)
