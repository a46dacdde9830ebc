"""Hugging Face directory <-> files of ranks: one process, one parameter at a time, no model.

Memory: writing ranks takes one rank's weights and one tensor; writing Hugging Face shards takes one
shard and one parameter. What is read is mapped, and released after use.

Verification reads what was written and converts it back: ``Layout.join`` checks what
``Layout.fill`` wrote, and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_replay.checkpoint import export
from megatron_replay.checkpoint.directories import LATEST, iteration_directory, latest_iteration
from megatron_replay.checkpoint.hf import HFReader, same_bits
from megatron_replay.checkpoint.model_files import (
    FOLDER,
    fingerprints,
    keep_model_files,
    require_model_files,
)
from megatron_replay.checkpoint.names import EMBEDDING, mapping_of
from megatron_replay.checkpoint.rank_file import RankFile, write_rank
from megatron_replay.checkpoint.rank_grid import VOCABULARY, Grid, open_grid
from megatron_replay.checkpoint.staging import publish, start_directory
from megatron_replay.errors import CheckpointError
from megatron_replay.files import atomic_file, fsync_path, read_json, write_json
from megatron_replay.model.config import ModelConfig
from megatron_replay.progress import Progress

_ITERATION = 1
#: The SHA-256 of each file in hf/, by name.
_MODEL_FILES = "model_files.json"


def hf_to_ranks(
    source: Path,
    target: Path,
    grid: Grid,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> None:
    """Write ``source`` as files of ranks; ``dtype`` None keeps each tensor's.

    Raises:
        CheckpointError: ``source`` does not fit its config.json, or what was written differs.
        OutputError: ``target`` is not empty or cannot be written; nothing is published then.
    """
    config, reader = ModelConfig.from_hf(source), HFReader(source)
    reader.check(config)
    staged = start_directory(target, overwrite=overwrite)
    iteration = iteration_directory(staged, _ITERATION)
    names = [grid.parameters(config, stage) for stage in range(grid.pp)]
    with Progress("Convert", grid.tp * sum(map(len, names)), "parameters") as progress:
        for stage in range(grid.pp):
            for rank in range(grid.tp):
                shards = {}
                for name in names[stage]:
                    shards[name] = _shard(name, reader, config, grid, stage, rank, dtype)
                    progress.advance()
                write_rank(iteration / grid.file(stage, rank), shards, _ITERATION)
                del shards
    keep_model_files(source, staged)
    write_json(staged / _MODEL_FILES, fingerprints(staged / FOLDER))
    with atomic_file(staged / LATEST, "w") as handle:
        handle.write(f"{_ITERATION}\n")
    if verify:
        _require_ranks_hold(reader, iteration, config, dtype)
    for folder in (*iteration.iterdir(), iteration):
        fsync_path(folder)
    publish(staged, target, overwrite=overwrite)


def ranks_to_hf(
    source: Path,
    target: Path,
    *,
    config_directory: Path | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    verify: bool = True,
    max_shard_bytes: int = 2 << 30,
) -> Grid:
    """Write files of ranks as a Hugging Face directory; returns their layout.

    Args:
        config_directory: holds config.json and tokenizer; default ``source``/hf, which must then
            have the SHA-256 that a conversion by ``hf_to_ranks`` recorded.

    Raises:
        CheckpointError: ``source`` is incomplete or damaged, or what was written differs from it.
        OutputError: ``target`` is not empty or cannot be written; nothing is published then.
    """
    side_files = config_directory or source / FOLDER
    if not (side_files / "config.json").is_file():
        raise CheckpointError(
            "no config.json", where=side_files, fix="Give a directory that has it: --hf-cfg-dir"
        )
    made_with = source / _MODEL_FILES
    if config_directory is None and made_with.exists():
        require_model_files(source, read_json(made_with, CheckpointError))
    config = ModelConfig.from_hf(side_files)
    number = latest_iteration(source)
    if number is None:
        raise CheckpointError("no checkpoint here", where=source, expected=LATEST)
    grid, files = open_grid(iteration_directory(source, number), config)
    staged = start_directory(target, overwrite=overwrite)
    written: dict[str, tuple[str, int]] = {}
    total = sum(len(grid.parameters(config, stage)) for stage in range(grid.pp))
    with Progress("Convert", total, "parameters") as progress:
        for stage in range(grid.pp):
            written |= export.write_weights(
                staged,
                _joined(files, grid, config, stage, progress),
                dtype=dtype,
                stage=stage,
                max_shard_bytes=max_shard_bytes,
            )
    stored = dtype or files[0, 0].dtypes[VOCABULARY[0]]
    export.write_model_files(staged, written, side_files, dtype=stored)
    if verify:
        _require_hf_holds(HFReader(staged), files, grid, config, dtype)
    publish(staged, target, overwrite=overwrite)
    return grid


def _shard(
    name: str,
    reader: HFReader,
    config: ModelConfig,
    grid: Grid,
    stage: int,
    rank: int,
    dtype: torch.dtype | None,
) -> Tensor:
    """One rank's part of one parameter, copied from the Hugging Face tensors."""
    mapping = mapping_of(name, config, grid.offset(stage))
    whole = [reader.slice(hf_name) for hf_name in mapping.names]
    if dtype is None:
        dtype = whole[0].torch_dtype()
        for hf_name, tensor in zip(mapping.names, whole, strict=True):
            if tensor.torch_dtype() != dtype:
                raise CheckpointError(
                    f"{hf_name} and {mapping.names[0]} form one parameter and need one dtype",
                    where=reader.directory,
                    expected=dtype,
                    found=tensor.torch_dtype(),
                    fix="Give --params-dtype",
                )
    shard = torch.empty(grid.shard_shape(name, config), dtype=dtype)
    if name in VOCABULARY:  # zeros beyond the vocabulary
        first = rank * len(shard)
        held = min(max(config.vocab_size - first, 0), len(shard))
        shard[:held].copy_(whole[0][first : first + held])
        shard[held:].zero_()
    else:
        mapping.layout.fill(shard, whole, rank, grid.tp)
    return shard


def _joined(
    files: dict[tuple[int, int], RankFile],
    grid: Grid,
    config: ModelConfig,
    stage: int,
    progress: Progress,
) -> Iterator[tuple[str, Tensor]]:
    """A stage's Hugging Face tensors.

    Raises:
        CheckpointError: copies of one weight on several ranks differ.
    """
    ranks = [files[stage, rank] for rank in range(grid.tp)]
    for name in grid.parameters(config, stage):
        mapping = mapping_of(name, config, grid.offset(stage))
        if name == VOCABULARY[1] and config.tie_embeddings:
            pass
        elif name in VOCABULARY:
            yield mapping.names[0], torch.cat([file[name] for file in ranks])[: config.vocab_size]
        else:
            if mapping.layout.dim is None:
                for file in ranks[1:]:
                    _require_copy(file, name, ranks[0], name)
            joined = mapping.layout.join([file[name] for file in ranks])
            yield from zip(mapping.names, joined, strict=True)
        progress.advance()
    if config.tie_embeddings and stage == grid.pp - 1:
        for rank, file in enumerate(ranks):
            if VOCABULARY[1] in file.shapes:
                _require_copy(file, VOCABULARY[1], files[0, rank], VOCABULARY[0])


def _require_copy(file: RankFile, name: str, original: RankFile, original_name: str) -> None:
    if not same_bits(file[name], original[original_name]):
        is_head = name == VOCABULARY[1]
        raise CheckpointError(
            f"config.json ties {EMBEDDING} and the head, yet {name} differs"
            if is_head
            else f"{name} differs from its copy in {original.path}",
            where=file.path,
            fix="Correct config.json, or train with tied embeddings" if is_head else None,
        )


def _require_ranks_hold(
    reader: HFReader, iteration: Path, config: ModelConfig, dtype: torch.dtype | None
) -> None:
    """Raise CheckpointError unless the files of ranks, read from disk, make up ``reader``'s."""
    grid, files = open_grid(iteration, config)
    total = sum(len(grid.parameters(config, stage)) for stage in range(grid.pp))
    with Progress("Verify", total, "parameters") as progress:
        for stage in range(grid.pp):
            for name, tensor in _joined(files, grid, config, stage, progress):
                expected = reader.slice(name)[:]
                if not same_bits(expected.to(dtype or expected.dtype), tensor):
                    raise CheckpointError(
                        f"{name} reads differently than it was written", where=iteration
                    )


def _require_hf_holds(
    reader: HFReader,
    files: dict[tuple[int, int], RankFile],
    grid: Grid,
    config: ModelConfig,
    dtype: torch.dtype | None,
) -> None:
    """Raise CheckpointError unless ``reader``'s tensors, cut anew, are those of each rank."""
    reader.check(config)
    total = sum(len(grid.parameters(config, stage)) for stage, _ in files)
    with Progress("Verify", total, "parameters") as progress:
        for (stage, rank), file in files.items():
            for name in grid.parameters(config, stage):
                found, expected = _shard(name, reader, config, grid, stage, rank, None), file[name]
                if name in VOCABULARY:
                    held = max(config.vocab_size - rank * len(found), 0)
                    found, expected = found[:held], expected[:held]
                if not same_bits(expected.to(dtype or expected.dtype), found):
                    raise CheckpointError(
                        f"{mapping_of(name, config, grid.offset(stage)).names[0]} reads "
                        "differently than it was written",
                        where=reader.directory,
                    )
                progress.advance()
