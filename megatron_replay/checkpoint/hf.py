"""Read a Hugging Face directory straight into a rank's parameters: slices only, no copy between.

The directory is untrusted: safetensors headers are checked against file sizes before anything is
mapped, shard names may not leave the directory, and every tensor must be mapped exactly once, in
the right shape.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_replay.checkpoint.names import EMBEDDING, HEAD, hf_tensor_shapes, mapping_of
from megatron_replay.errors import CheckpointError
from megatron_replay.files import sha256_of_files
from megatron_replay.model.config import ModelConfig

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
#: The safetensors format's own limit on a header.
_MAX_HEADER = 100_000_000


class HFReader:
    """The tensors of a Hugging Face directory, by name.

    Raises:
        CheckpointError: no weights, a missing or truncated shard, an unusable index.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._files = self._tensor_files()
        self._open: dict[str, Any] = {}
        for file in sorted(set(self._files.values())):
            self._check_shard(self.directory / file)

    def names(self) -> set[str]:
        """All tensors."""
        return set(self._files)

    def slice(self, name: str) -> Any:
        """A tensor that is read when indexed; ``get_shape()`` reads nothing."""
        file = self._files[name]
        if file not in self._open:
            self._open[file] = safe_open(self.directory / file, "pt")
        try:
            return self._open[file].get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"the index places {name} in this shard, which does not hold it",
                where=self.directory / file,
            ) from error

    def fingerprint(self) -> str:
        """SHA-256 over config.json and all weights."""
        files = [self.directory / file for file in sorted(set(self._files.values()))]
        return sha256_of_files([self.directory / "config.json", *files])

    def check(self, config: ModelConfig) -> None:
        """Raise CheckpointError unless the tensors are just those of ``config``.

        The one allowance: a tied checkpoint may carry ``lm_head.weight``, equal to the embedding.
        """
        expected, found = hf_tensor_shapes(config), self.names()
        if config.tie_embeddings and HEAD in found:
            if not torch.equal(self.slice(HEAD)[:], self.slice(EMBEDDING)[:]):
                raise CheckpointError(
                    "tie_word_embeddings is set, yet lm_head.weight differs from the embedding",
                    where=self.directory,
                    fix="Correct config.json, or remove one of the two",
                )
            found = found - {HEAD}
        self._report_difference("missing", sorted(expected.keys() - found))
        self._report_difference("not part of the model", sorted(found - expected.keys()))
        for name, shape in expected.items():
            if (actual := tuple(self.slice(name).get_shape())) != shape:
                raise CheckpointError(
                    f"wrong shape of {name}",
                    where=self.directory / self._files[name],
                    expected=shape,
                    found=actual,
                )

    def _report_difference(self, what: str, names: list[str]) -> None:
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(
                f"tensors {what}: {', '.join(names[:3])}{more}", where=self.directory
            )

    def _tensor_files(self) -> dict[str, str]:
        index = self.directory / INDEX
        if not index.exists():
            single = self.directory / SINGLE
            if not single.exists():
                raise CheckpointError(
                    "no weights here", where=self.directory, expected=f"{SINGLE} or {INDEX}"
                )
            return dict.fromkeys(_header(single), SINGLE)
        try:
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            pairs = {str(name): str(file) for name, file in files.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError("not an index of weights", where=index) from error
        for file in set(pairs.values()):
            if Path(file).name != file or file in ("", ".", ".."):
                raise CheckpointError("unsafe shard name", where=index, found=repr(file))
            if not (self.directory / file).is_file():
                raise CheckpointError(
                    "the index names a file that is not there", where=index, found=file
                )
        return pairs

    def _check_shard(self, path: Path) -> None:
        """The shard holds what the index places in it, and is as long as its header says."""
        held = set(_header(path))
        listed = {name for name, file in self._files.items() if file == path.name}
        if held - listed:
            raise CheckpointError(
                f"holds tensors the index does not list here: {sorted(held - listed)[0]}",
                where=path,
            )
        if listed - held:
            raise CheckpointError(
                f"lacks a tensor that the index places here: {sorted(listed - held)[0]}", where=path
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
    """
    reader.check(config)
    with torch.no_grad():
        for name, parameter in named_parameters:
            mapping = mapping_of(name, config, layer_offset)
            tensors = [reader.slice(hf_name) for hf_name in mapping.names]
            shard = mapping.layout.split(tensors, tp_rank, tp_size)
            if shard.shape != parameter.shape:
                raise CheckpointError(
                    f"wrong shape for {name}",
                    where=reader.directory,
                    expected=tuple(parameter.shape),
                    found=tuple(shard.shape),
                )
            parameter.copy_(shard)


def _header(path: Path) -> dict[str, Any]:
    """The shard's table of tensors, once the file is known to be as long as the table says."""
    size = path.stat().st_size
    with open(path, "rb") as handle:
        start = handle.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER
        if length >= min(size - 8, _MAX_HEADER):
            raise CheckpointError(
                "truncated, or not a safetensors file", where=path, found=f"{size} bytes"
            )
        try:
            table = json.loads(handle.read(length))
            table.pop("__metadata__", None)
            end = max((int(entry["data_offsets"][1]) for entry in table.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError("the header is damaged", where=path) from error
    if size != 8 + length + end:
        raise CheckpointError(
            "truncated" if size < 8 + length + end else "longer than its header says",
            where=path,
            expected=f"{8 + length + end} bytes",
            found=f"{size} bytes",
        )
    return dict(table)
