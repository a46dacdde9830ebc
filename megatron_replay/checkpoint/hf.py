"""Read a Hugging Face directory straight into a rank's parameters.

The directory is untrusted: headers must agree with file sizes, shard names may not leave the
directory, and the tensors must be exactly those of config.json, in its shapes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_replay.checkpoint.names import EMBEDDING, HEAD, Mapping, hf_tensor_shapes
from megatron_replay.errors import CheckpointError, few
from megatron_replay.files import read_json, require_regular
from megatron_replay.model.config import ModelConfig
from megatron_replay.model.rotary import inverse_frequencies

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
#: Dtypes of stored weights; another dtype, such as an integer, would be cast silently.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
#: Llama 1 and 2 were published with these; transformers computes them from config.json.
_ROTARY = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class StoredTensor:
    """What the header of a safetensors file says about a tensor; ``dtype``: "BF16" and the like."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it.

        Raises:
            CheckpointError: the dtype is not one of a weight.
        """
        if self.dtype not in DTYPES:
            raise CheckpointError(
                f"wrong dtype of {self.name}",
                where=self.path,
                expected=", ".join(DTYPES),
                found=self.dtype,
            )
        return DTYPES[self.dtype]

    def mapped(self) -> Tensor:
        """The tensor, mapped from the file: a page is read when it is used.

        The pages are released together with the tensor. A file that stayed open would keep every
        page that was read counted as this process's memory.
        """
        try:
            with safe_open(self.path, "pt") as file:
                tensor: Tensor = file.get_tensor(self.name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read: {error}", where=self.path) from error


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a safetensors file, by name.

    Raises:
        CheckpointError: it cannot be read; or its length, offsets, shapes and dtypes disagree.
    """
    size = require_regular(path, CheckpointError)
    try:
        with safe_open(path, "pt") as file:  # checks the header against the file's length
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no dict
            return {
                name: StoredTensor(path, name, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"truncated, damaged, or not a safetensors file: {error}",
            where=path,
            found=f"{size} bytes",
            fix="Copy or download it again",
        ) from error


class HFReader:
    """The tensors of a Hugging Face directory: ``stored`` describes each, by name.

    Raises:
        CheckpointError: no weights, a missing or truncated shard, an unusable index.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.stored = self._headers()

    def tensor(self, name: str) -> Tensor:
        """A tensor, mapped from its file."""
        if name not in self.stored:
            raise CheckpointError(f"no tensor {name}", where=self.directory)
        return self.stored[name].mapped()

    def fill(self, shard: Tensor, mapping: Mapping, rank: int, size: int) -> None:
        """Fill TP rank ``rank``'s shard of a parameter, cast to the shard's dtype."""
        mapping.fill(shard, [self.tensor(name) for name in mapping.names], rank, size)

    def files(self) -> list[Path]:
        """config.json and the files of weights, by name."""
        shards = sorted({tensor.path for tensor in self.stored.values()})
        return [self.directory / "config.json", *shards]

    def check(self, config: ModelConfig) -> None:
        """Raise CheckpointError unless the tensors are exactly those of ``config``.

        A tied checkpoint may also hold ``lm_head.weight``, equal to the embedding, and an old one
        its rotary frequencies, equal to those of ``rope_theta``.
        """
        if config.num_layers > len(self.stored):  # before making a table of that many names
            raise CheckpointError(
                "config.json has more layers than there are tensors",
                where=self.directory,
                expected=f"{config.num_layers} layers",
                found=f"{len(self.stored)} tensors",
            )
        expected = hf_tensor_shapes(config)
        refuse_tensors("missing", expected.keys() - self.stored.keys(), self.directory)
        for name, shape in expected.items():
            tensor = self.stored[name]
            if tensor.shape != shape:
                raise CheckpointError(
                    f"wrong shape of {name}", where=tensor.path, expected=shape, found=tensor.shape
                )
            tensor.torch_dtype()
        extra = self.parameters(tied=config.tie_embeddings) - expected.keys()
        extra -= self._rotary_frequencies(config)
        refuse_tensors("not part of the model", extra, self.directory)

    def parameters(self, *, tied: bool) -> set[str]:
        """All tensors, without a tied head, which must equal the embedding."""
        if not tied or not {HEAD, EMBEDDING} <= self.stored.keys():
            return set(self.stored)
        if not same_bits(self.tensor(HEAD), self.tensor(EMBEDDING)):
            raise CheckpointError(
                "tie_word_embeddings is set, yet lm_head.weight differs from the embedding",
                where=self.directory,
                fix="Correct config.json, or remove one of the two",
            )
        return self.stored.keys() - {HEAD}

    def _rotary_frequencies(self, config: ModelConfig) -> set[str]:
        """Names of stored rotary frequencies, which must be those of the model."""
        expected = inverse_frequencies(config.rotary_base, config.kv_channels, config.rope_scaling)
        names = {name for name in self.stored if _ROTARY.fullmatch(name)}
        for name in sorted(names):
            tensor = self.stored[name]
            # Half precision keeps 3 digits, and fewer of the smallest.
            if (
                tensor.dtype not in DTYPES
                or tensor.shape != tuple(expected.shape)
                or not torch.allclose(tensor.mapped().float(), expected, rtol=1e-2, atol=1e-6)
            ):
                raise CheckpointError(
                    f"{name} differs from the frequencies of config.json's rope_theta",
                    where=tensor.path,
                )
        return names

    def _headers(self) -> dict[str, StoredTensor]:
        index, single = self.directory / INDEX, self.directory / SINGLE
        if not index.exists():
            if not single.exists():
                raise CheckpointError(
                    "no weights here", where=self.directory, expected=f"{SINGLE} or {INDEX}"
                )
            return stored_tensors(single)
        listed = self._listed(index)
        if single.exists() and SINGLE not in listed.values():
            # transformers would load the single file, others the index.
            raise CheckpointError(
                f"{SINGLE} is beside an index that does not name it",
                where=self.directory,
                fix="Remove the one that you do not want",
            )
        stored = dict[str, StoredTensor]()
        for file in sorted(set(listed.values())):
            tensors = stored_tensors(self.directory / file)
            expected = {name for name, place in listed.items() if place == file}
            for what, names in (
                ("holds a tensor that the index does not list for it", tensors.keys() - expected),
                ("lacks a tensor that the index lists for it", expected - tensors.keys()),
            ):
                if names:
                    raise CheckpointError(f"{what}: {min(names)}", where=self.directory / file)
            stored |= tensors
        return stored

    def _listed(self, index: Path) -> dict[str, str]:
        """The file of each tensor, as the index lists it; all of them in this directory."""
        try:
            files = read_json(index, CheckpointError)["weight_map"]
            listed = {str(name): str(file) for name, file in files.items()}
        except (KeyError, AttributeError) as error:
            raise CheckpointError("not an index of weights", where=index) from error
        for file in set(listed.values()):
            if Path(file).name != file or file in ("", ".", ".."):
                raise CheckpointError("unsafe shard name", where=index, found=repr(file))
            if file not in os.listdir(self.directory):
                raise CheckpointError(
                    "the index names a file that is not there", where=index, found=file
                )
        return listed


def refuse_tensors(what: str, names: Iterable[str], where: Path) -> None:
    """Raise CheckpointError if there are ``names``: tensors that are missing, or left over."""
    if names := sorted(names):
        raise CheckpointError(f"tensors {what}: {few(names)}", where=where)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether shape, dtype and all bits are equal; a NaN equals itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(
        one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8)
    )


def require_same(name: str, found: Tensor, expected: Tensor, where: Path) -> None:
    """Raise CheckpointError unless what was written reads back with all its bits."""
    if not same_bits(found, expected):
        raise CheckpointError(f"{name} reads differently than it was written", where=where)
