"""Write Hugging Face directories: streaming out of any TP x PP layout, or from random weights.

The directory is staged beside its final name and renamed when all of it is on disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megatron_replay.checkpoint.hf import INDEX, HFReader
from megatron_replay.checkpoint.names import hf_tensor_shapes, mapping_of
from megatron_replay.errors import CheckpointError, OutputError
from megatron_replay.files import fsync_directory, output_error, write_json
from megatron_replay.model.config import ModelConfig
from megatron_replay.parallel import Parallel

#: Copied from the source: what a Hugging Face directory holds beside weights and their index.
_SIDE_FILES = (".json", ".model", ".txt", ".jinja")


def export_hf(
    named_parameters: Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    directory: str | Path,
    parallel: Parallel,
    *,
    layer_offset: int,
    source: Path,
    dtype: torch.dtype,
    overwrite: bool = False,
    max_shard_bytes: int = 2 << 30,
) -> None:
    """Export the model this world holds; collective over the world.

    Each pipeline stage's first rank writes the stage's shards, rank 0 the index over all of them.

    Args:
        source: directory whose config.json and tokenizer go with the weights.

    Raises:
        OutputError: ``directory`` is not empty, or cannot be written.
    """
    final = Path(directory)
    if parallel.rank == 0:
        start_directory(final, overwrite=overwrite)
    dist.barrier()
    tensors = gathered_tensors(
        named_parameters, config, layer_offset=layer_offset, tp_group=parallel.tp_group
    )
    written = write_weights(
        staging_directory(final),
        tensors,
        dtype=dtype,
        stage=parallel.pp_rank,
        writes=parallel.tp_rank == 0 and parallel.dp_rank == 0,
        max_shard_bytes=max_shard_bytes,
    )
    of_all_ranks: list[dict[str, tuple[str, int]]] = [{} for _ in range(parallel.world_size)]
    dist.all_gather_object(of_all_ranks, written)
    if parallel.rank == 0:
        merged = {name: entry for part in of_all_ranks for name, entry in part.items()}
        finish_directory(
            staging_directory(final), final, merged, read_config(source), dtype=dtype, source=source
        )
    dist.barrier()


def gathered_tensors(
    named_parameters: Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    *,
    layer_offset: int,
    tp_group: dist.ProcessGroup | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """This stage's Hugging Face tensors, one parameter at a time. Collective over ``tp_group``."""
    for name, parameter in named_parameters:
        if name == "output_layer.weight" and config.tie_embeddings:
            continue  # the first stage's embedding is exported
        mapping = mapping_of(name, config, layer_offset)
        local = parameter.detach().contiguous()
        shards = [local]
        if tp_group is not None and dist.get_world_size(tp_group) > 1:
            shards = [torch.empty_like(local) for _ in range(dist.get_world_size(tp_group))]
            dist.all_gather(shards, local, group=tp_group)
        yield from zip(mapping.names, mapping.layout.join(shards), strict=True)


def write_weights(
    directory: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    stage: int = 0,
    writes: bool = True,
    max_shard_bytes: int = 2 << 30,
) -> dict[str, tuple[str, int]]:
    """Write ``tensors`` into numbered shards of ``directory``; {name: (file, bytes)}.

    Consumes the tensors on every rank, since producing them is collective; writes where ``writes``.
    Holds at most one shard and one tensor in memory.
    """
    written: dict[str, tuple[str, int]] = {}
    shard: dict[str, Tensor] = {}
    size = 0

    def flush() -> None:
        nonlocal size
        if shard:
            file = f"model-{stage:03d}-{len({f for f, _ in written.values()}):05d}.safetensors"
            _save(shard, directory / file)
            written.update((k, (file, v.numel() * v.element_size())) for k, v in shard.items())
            shard.clear()
            size = 0

    for name, tensor in tensors:
        if writes:
            copy = tensor.to("cpu", dtype, copy=True).contiguous()
            if size + copy.numel() * copy.element_size() > max_shard_bytes:
                flush()
            shard[name] = copy
            size += copy.numel() * copy.element_size()
    flush()
    return written


def finish_directory(
    staged: Path,
    final: Path,
    written: dict[str, tuple[str, int]],
    config: dict[str, Any],
    *,
    dtype: torch.dtype,
    source: Path,
) -> None:
    """Write index and config.json, copy tokenizer files from ``source``, rename to ``final``."""
    for file in sorted(source.iterdir()):
        if file.suffix in _SIDE_FILES and file.name not in (INDEX, "config.json"):
            shutil.copyfile(file, staged / file.name)
    name = str(dtype).removeprefix("torch.")
    write_json(staged / "config.json", {**config, "dtype": name, "torch_dtype": name})
    total = sum(size for _, size in written.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: file for name, (file, _) in sorted(written.items())},
    }
    write_json(staged / INDEX, index)
    fsync_directory(staged)
    if final.exists():
        shutil.rmtree(final)
    os.replace(staged, final)
    fsync_directory(final.parent)


def start_directory(final: Path, *, overwrite: bool = False) -> Path:
    """Create the staging directory of ``final``; what a killed export left there is removed.

    Raises:
        OutputError: ``final`` holds something and ``overwrite`` was not asked for.
    """
    if final.exists() and any(final.iterdir()) and not overwrite:
        raise OutputError(
            "the directory is not empty", where=final, fix="Choose another, or give --overwrite"
        )
    staged = staging_directory(final)
    try:
        if staged.exists():
            shutil.rmtree(staged)
        staged.mkdir(parents=True)
    except OSError as error:
        raise output_error(staged, error) from error
    return staged


def staging_directory(final: Path) -> Path:
    """Where ``final`` is built."""
    return final.with_name(f".{final.name}.incomplete")


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
    final = Path(directory)
    staged = start_directory(final)
    generator = torch.Generator().manual_seed(seed)
    tensors = (
        (name, torch.ones(shape))
        if len(shape) == 1
        else (name, torch.randn(shape, generator=generator) * init_std)
        for name, shape in hf_tensor_shapes(config).items()
    )
    written = write_weights(staged, tensors, dtype=dtype)
    finish_directory(
        staged, final, written, config.to_hf_dict(), dtype=dtype, source=Path(tokenizer)
    )


def require_equal(directory: str | Path, reference: str | Path) -> None:
    """Compare two directories' tensors bit for bit, one tensor at a time.

    Raises:
        CheckpointError: names the first difference.
    """
    ours, theirs = HFReader(directory), HFReader(reference)
    if ours.names() != theirs.names():
        name = sorted(ours.names() ^ theirs.names())[0]
        raise CheckpointError(f"only one of the two holds {name}", where=directory)
    for name in sorted(ours.names()):
        if not torch.equal(ours.slice(name)[:], theirs.slice(name)[:]):
            raise CheckpointError(f"{name} differs from {reference}", where=directory)


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as it is."""
    return dict(json.loads((directory / "config.json").read_text(encoding="utf-8")))


def _save(shard: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(shard, path, {"format": "pt"})
        with open(path, "rb+") as handle:
            os.fsync(handle.fileno())
    except OSError as error:
        raise output_error(path, error) from error
