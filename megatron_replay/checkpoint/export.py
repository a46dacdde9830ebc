"""Write Hugging Face directories, streamed out of any TP x PP layout or from random weights.

A directory is staged next to its final name and renamed once it is complete on disk. One that it
replaces is moved aside just before, and removed after, so a killed process leaves no half of either
under the name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_replay.checkpoint.hf import INDEX, HFReader, require_same
from megatron_replay.checkpoint.model_files import copy_side_file, side_files
from megatron_replay.checkpoint.names import hf_tensor_shapes
from megatron_replay.checkpoint.staging import publish, staging_directory, start_directory
from megatron_replay.errors import CheckpointError
from megatron_replay.files import fsync_path, output_error, read_json, reported, write_json
from megatron_replay.model.config import ModelConfig

if TYPE_CHECKING:
    from megatron_replay.checkpoint.load import LoadedModel
    from megatron_replay.parallel import Parallel

#: Of a file of weights; a larger tensor has a file of its own.
MAX_SHARD_BYTES = 2 << 30


def export_hf(
    model: LoadedModel,
    directory: str | Path,
    parallel: Parallel,
    *,
    dtype: torch.dtype,
    overwrite: bool = False,
    verify: Callable[[Path], None] | None = None,
) -> None:
    """Export ``model`` with its config.json and tokenizer; collective over the world.

    The first rank of each pipeline stage writes the stage's shards; rank 0 writes the index.

    Args:
        verify: called on every rank with the staged directory, after all weights have been compared
            bit for bit; an error of it prevents publishing. None: nothing is compared.

    Raises:
        CheckpointError: a weight exceeds ``dtype``, or reads differently than it was written.
        OutputError: ``directory`` is not empty, or cannot be written; raised on every rank.
    """
    final = Path(directory)
    staged = staging_directory(final)
    parallel.on_rank_zero(lambda: start_directory(final, overwrite=overwrite))
    written = parallel.agreed(
        lambda: write_weights(
            staged,
            _gathered(model, parallel),
            dtype=dtype,
            stage=parallel.pp_rank,
            writes=parallel.tp_rank == 0 and parallel.dp_rank == 0,
        )
    )
    merged = {name: entry for part in written for name, entry in part.items()}
    assert merged.keys() == hf_tensor_shapes(model.shape).keys()
    parallel.on_rank_zero(lambda: write_model_files(staged, merged, model.files, dtype=dtype))
    if verify is not None:
        parallel.agreed(lambda: _require_written(model, HFReader(staged), parallel, dtype))
        verify(staged)
    parallel.on_rank_zero(lambda: publish(staged, final, overwrite=overwrite))


def _require_written(
    model: LoadedModel, reader: HFReader, parallel: Parallel, dtype: torch.dtype
) -> None:
    """Raise CheckpointError unless the files hold this rank's parameters, rounded to ``dtype``."""
    for name, parameter in model.module.named_parameters():
        mapping, expected = model.mapping(name), parameter.detach().to("cpu", dtype)
        found = torch.empty(expected.shape, dtype=reader.tensor(mapping.names[0]).dtype)
        reader.fill(found, mapping, parallel.tp_rank, parallel.tp_size)
        require_same(mapping.names[0], found, expected, reader.directory)


def _gathered(model: LoadedModel, parallel: Parallel) -> Iterator[tuple[str, Tensor]]:
    """This stage's Hugging Face tensors, one parameter at a time. Collective over TP."""
    for name, parameter in model.module.named_parameters():
        if name == "output_layer.weight" and model.shape.tie_embeddings:
            continue  # the first stage's embedding is exported
        mapping = model.mapping(name)
        local = parameter.detach().contiguous()
        shards = [local]
        if parallel.tp_size > 1:
            shards = [torch.empty_like(local) for _ in range(parallel.tp_size)]
            dist.all_gather(shards, local, group=parallel.tp_group)
        yield from zip(mapping.names, mapping.join(shards), strict=True)


def write_weights(
    directory: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype | None,
    stage: int = 0,
    writes: bool = True,
) -> dict[str, tuple[str, int]]:
    """Write ``tensors`` into numbered shards of ``directory``; {name: (file, bytes)}.

    Every rank consumes all tensors, after a failure too, since producing them is collective; only
    ranks with ``writes`` write. Holds at most one shard and one tensor in memory. ``dtype`` None
    keeps each tensor's.

    Raises:
        CheckpointError: a weight exceeds the range of ``dtype``.
        OutputError: a shard cannot be written.
    """
    tensors, written = iter(tensors), dict[str, tuple[str, int]]()
    try:
        rounded = ((name, _rounded(name, tensor, dtype)) for name, tensor in tensors if writes)
        for number, shard in enumerate(_shards(rounded)):
            file = f"model-{stage:03d}-{number:05d}.safetensors"
            _save(shard, directory / file)
            written |= {name: (file, tensor.nbytes) for name, tensor in shard.items()}
            shard.clear()  # before the next one is filled
    finally:
        for _ in tensors:  # after a failure
            pass
    return written


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    rounded = tensor.to("cpu", dtype or tensor.dtype, copy=True).contiguous()
    if rounded.dtype is torch.float16 and not rounded.isfinite().all():
        raise CheckpointError(
            f"a weight of {name} exceeds the range of float16",
            expected="-65504 to 65504",
            fix="Give --params-dtype bfloat16 or float32",
        )
    return rounded


def _shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """``tensors`` in groups of at most MAX_SHARD_BYTES, or of one tensor larger than that."""
    shard, size = dict[str, Tensor](), 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > MAX_SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard


def write_model_files(
    staged: Path,
    written: dict[str, tuple[str, int]],
    source: Path,
    *,
    dtype: torch.dtype,
    config: dict[str, Any] | None = None,
) -> None:
    """Write config.json and the index of all shards; copy tokenizer files from ``source``.

    ``config``: content of config.json; None: that of ``source``, with RoPE's keys in the places
    where transformers 4 and 5 read them.

    Raises:
        CheckpointError: ``source`` cannot be read.
        OutputError: ``staged`` cannot be written.
    """
    if config is None:
        config = read_json(source / "config.json", CheckpointError)
        config |= ModelConfig.from_hf(source).rope_keys()
    for name in side_files(source):
        if name != "config.json":
            copy_side_file(source / name, staged / name)
    stored = str(dtype).removeprefix("torch.")
    write_json(staged / "config.json", {**config, "dtype": stored, "torch_dtype": stored})
    index = {
        "metadata": {"total_size": sum(size for _, size in written.values())},
        "weight_map": {name: file for name, (file, _) in sorted(written.items())},
    }
    write_json(staged / INDEX, index)


def write_random(
    directory: str | Path,
    config: ModelConfig,
    *,
    seed: int,
    init_std: float,
    tokenizer: str | Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """A randomly initialised model: norms are ones, matrices normal with ``init_std``."""
    generator = torch.Generator().manual_seed(seed)
    tensors = (
        (name, torch.ones(shape))
        if len(shape) == 1
        else (name, torch.randn(shape, generator=generator).mul_(init_std))
        for name, shape in hf_tensor_shapes(config).items()
    )
    write_new(directory, config, tensors, tokenizer=tokenizer, dtype=dtype)


def write_new(
    directory: str | Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    tokenizer: str | Path,
    dtype: torch.dtype,
) -> None:
    """Write a model that was not loaded from a checkpoint; ``tokenizer``: its directory.

    Raises:
        CheckpointError: ``tokenizer`` cannot be read, or a weight exceeds ``dtype``.
        OutputError: ``directory`` is not empty, or cannot be written.
    """
    final = Path(directory)
    staged = start_directory(final)
    written = write_weights(staged, tensors, dtype=dtype)
    assert written.keys() == hf_tensor_shapes(config).keys()
    write_model_files(staged, written, Path(tokenizer), dtype=dtype, config=config.to_hf_dict())
    publish(staged, final, overwrite=False)


def _save(shard: dict[str, Tensor], path: Path) -> None:
    try:
        with reported(path):
            save_file(shard, path, {"format": "pt"})
            fsync_path(path)
    except SafetensorError as error:
        # safetensors only quotes the system's error: "... (os error 28)".
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        reason = OSError(int(code[1]), os.strerror(int(code[1])))
        raise output_error(path, reason) from error
