"""Read a Hugging Face directory straight into a rank's parameters.

The directory is untrusted: headers must agree with file sizes, shard names may not leave the
directory, and the tensors must be exactly those of config.json, in its shapes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_replay.checkpoint.names import EMBEDDING, HEAD, hf_tensor_shapes, mapping_of
from megatron_replay.errors import CheckpointError, few
from megatron_replay.files import read_json, require_regular
from megatron_replay.model.config import ModelConfig

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
#: Dtypes of stored weights; another dtype, such as an integer, would be cast silently.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
#: What reading untrusted JSON, and looking into it, may raise.
_MALFORMED = (
    ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError,
)  # fmt: skip
#: Llama 1 and 2 were published with these; transformers computes them from config.json.
_ROTARY = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class StoredTensor:
    """A tensor in a safetensors file.

    Indexing maps the file anew and returns a view: its pages are released together with it. A file
    that stays mapped would keep every page that was read counted as this process's memory.
    """

    def __init__(self, path: Path, name: str, shape: list[int], dtype: str) -> None:
        self._path, self._name, self._shape, self._dtype = path, name, shape, dtype

    def get_shape(self) -> list[int]:
        """The shape; reads nothing."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """The dtype as safetensors names it ("BF16"); reads nothing."""
        return self._dtype

    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it.

        Raises:
            CheckpointError: the dtype is not one of a weight.
        """
        if self._dtype not in DTYPES:
            raise CheckpointError(
                f"wrong dtype of {self._name}",
                where=self._path,
                expected=", ".join(DTYPES),
                found=self._dtype,
            )
        return DTYPES[self._dtype]

    def __getitem__(self, index: object) -> Tensor:
        """A part of the tensor; reads only its pages."""
        try:
            with safe_open(self._path, "pt") as file:
                whole: Tensor = file.get_tensor(self._name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read: {error}", where=self._path) from error
        return whole[index]  # type: ignore[index]


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
                name: StoredTensor(path, name, list(part.get_shape()), part.get_dtype())
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
    """The tensors of a Hugging Face directory, by name.

    Raises:
        CheckpointError: no weights, a missing or truncated shard, an unusable index.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._files = self._tensor_files()
        self._open = {file: self._open_shard(file) for file in sorted(set(self._files.values()))}

    def names(self) -> set[str]:
        """All tensors."""
        return set(self._files)

    def slice(self, name: str) -> StoredTensor:
        """A tensor that is read when indexed; ``get_shape()`` reads nothing."""
        if name not in self._files:
            raise CheckpointError(f"no tensor {name}", where=self.directory)
        return self._open[self._files[name]][name]

    def files(self) -> list[Path]:
        """config.json and the files of weights, by name."""
        return [self.directory / "config.json", *(self.directory / file for file in self._open)]

    def check(self, config: ModelConfig) -> None:
        """Raise CheckpointError unless the tensors are exactly those of ``config``.

        A tied checkpoint may also hold ``lm_head.weight``, equal to the embedding, and an old one
        its rotary frequencies, equal to those of ``rope_theta``.
        """
        found = self.names()
        if config.num_layers > len(found):  # before making a table of that many names
            raise CheckpointError(
                "config.json has more layers than there are tensors",
                where=self.directory,
                expected=f"{config.num_layers} layers",
                found=f"{len(found)} tensors",
            )
        expected = hf_tensor_shapes(config)
        self._report_difference("missing", sorted(expected.keys() - found))
        for name, shape in expected.items():
            tensor, where = self.slice(name), self.directory / self._files[name]
            if (actual := tuple(tensor.get_shape())) != shape:
                raise CheckpointError(
                    f"wrong shape of {name}", where=where, expected=shape, found=actual
                )
            tensor.torch_dtype()
        if config.tie_embeddings and HEAD in found:
            if not same_bits(self.slice(HEAD)[:], self.slice(EMBEDDING)[:]):
                raise CheckpointError(
                    "tie_word_embeddings is set, yet lm_head.weight differs from the embedding",
                    where=self.directory,
                    fix="Correct config.json, or remove one of the two",
                )
            found = found - {HEAD}
        found = found - self._rotary_frequencies(config)
        self._report_difference("not part of the model", sorted(found - expected.keys()))

    def _rotary_frequencies(self, config: ModelConfig) -> set[str]:
        """Names of stored rotary frequencies; rope_theta^(-2i / D) for channel pair i of D / 2."""
        channels = config.kv_channels
        expected = config.rotary_base ** -(torch.arange(0, channels, 2).double() / channels)
        names = {name for name in self.names() if _ROTARY.fullmatch(name)}
        for name in sorted(names):
            tensor, where = self.slice(name), self.directory / self._files[name]
            # Half precision keeps 3 digits, and fewer of the smallest.
            if (
                tensor.get_dtype() not in DTYPES
                or tuple(tensor.get_shape()) != tuple(expected.shape)
                or not torch.allclose(tensor[:].double(), expected, rtol=1e-2, atol=1e-6)
            ):
                raise CheckpointError(
                    f"{name} differs from the frequencies of config.json's rope_theta",
                    where=where,
                    expected=f"{config.rotary_base} ** -(2i / {channels})",
                )
        return names

    def _report_difference(self, what: str, names: list[str]) -> None:
        if names:
            raise CheckpointError(f"tensors {what}: {few(names)}", where=self.directory)

    def _tensor_files(self) -> dict[str, str]:
        index, single = self.directory / INDEX, self.directory / SINGLE
        if not index.exists():
            if not single.exists():
                raise CheckpointError(
                    "no weights here", where=self.directory, expected=f"{SINGLE} or {INDEX}"
                )
            return dict.fromkeys(stored_tensors(single), SINGLE)
        try:
            files = read_json(index, CheckpointError)["weight_map"]
            pairs = {str(name): str(file) for name, file in files.items()}
        except _MALFORMED as error:
            raise CheckpointError("not an index of weights", where=index) from error
        for file in set(pairs.values()):
            if Path(file).name != file or file in ("", ".", ".."):
                raise CheckpointError("unsafe shard name", where=index, found=repr(file))
            if file not in os.listdir(self.directory):
                raise CheckpointError(
                    "the index names a file that is not there", where=index, found=file
                )
        if single.exists() and SINGLE not in pairs.values():
            # transformers would load the single file, others the index.
            raise CheckpointError(
                f"{SINGLE} is beside an index that does not name it",
                where=self.directory,
                fix="Remove the one that you do not want",
            )
        return pairs

    def _open_shard(self, file: str) -> dict[str, StoredTensor]:
        """A shard's tensors, which must be those that the index lists for it."""
        path = self.directory / file
        tensors = stored_tensors(path)
        listed = {name for name, place in self._files.items() if place == file}
        for what, names in (
            ("holds a tensor that the index does not list for it", tensors.keys() - listed),
            ("lacks a tensor that the index lists for it", listed - tensors.keys()),
        ):
            if names:
                raise CheckpointError(f"{what}: {min(names)}", where=path)
        return tensors


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether shape, dtype and all bits are equal; a NaN equals itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(
        one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8)
    )


def load_hf_weights(
    named_parameters: Iterable[tuple[str, Tensor]],
    reader: HFReader,
    config: ModelConfig,
    *,
    tp_rank: int,
    tp_size: int,
    layer_offset: int,
) -> None:
    """Fill megatron-core parameters with this rank's slices, cast to each parameter's dtype.

    Args:
        named_parameters: (name in the local or TE layer spec, parameter), of one pipeline stage.
        layer_offset: global number of the stage's first layer.

    Raises:
        CheckpointError: a tensor is missing, left over, or of another shape.
        ConfigError: ``tp_size`` does not divide the model.
    """
    config.check_layout(tp_size, 1)
    reader.check(config)
    with torch.no_grad():
        for name, parameter in named_parameters:
            mapping = mapping_of(name, config, layer_offset)
            tensors = [reader.slice(hf_name) for hf_name in mapping.names]
            shape = mapping.layout.shard_shape([t.get_shape() for t in tensors], tp_size)
            if shape != tuple(parameter.shape):
                raise CheckpointError(
                    f"wrong shape for {name}",
                    where=reader.directory,
                    expected=tuple(parameter.shape),
                    found=shape,
                )
            mapping.layout.fill(parameter, tensors, tp_rank, tp_size)
