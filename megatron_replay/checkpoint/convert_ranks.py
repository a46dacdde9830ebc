"""Hugging Face directory <-> files of ranks: one process, one parameter at a time, no model.

Memory: writing ranks takes one rank's weights and one parameter; writing Hugging Face shards takes
one shard and one parameter. What is read is mapped, and released after use.

Verification reads what was written and converts it back: ``Mapping.join`` what ``Mapping.fill``
wrote, and the other way round.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_replay.checkpoint import export, names
from megatron_replay.checkpoint.directories import LATEST, iteration_directory, latest_iteration
from megatron_replay.checkpoint.hf import HFReader, require_same, same_bits
from megatron_replay.checkpoint.model_files import (
    FOLDER,
    fingerprints,
    keep_model_files,
    require_model_files,
)
from megatron_replay.checkpoint.rank_files import (
    EMBEDDING,
    HEAD,
    Grid,
    RankFile,
    open_ranks,
    rank_path,
)
from megatron_replay.checkpoint.staging import publish, start_directory
from megatron_replay.errors import CheckpointError, ConfigError
from megatron_replay.files import (
    atomic_file,
    fsync_path,
    output_error,
    read_json,
    reported,
    write_json,
)
from megatron_replay.model.config import ModelConfig
from megatron_replay.progress import Progress

_ITERATION = 1
#: The SHA-256 of each file in hf/, by name.
_MODEL_FILES = "model_files.json"


def grid_for(
    config: ModelConfig,
    *,
    tp: int,
    pp: int,
    layers: tuple[int, ...] | None = None,
    transformer_engine: bool = False,
    vocabulary_multiple: int = 1,
) -> Grid:
    """The layout to write; the vocabulary is padded to a multiple of ``vocabulary_multiple`` x TP.

    Raises:
        ConfigError: TP or PP cannot split the model, or ``layers`` do not add up to it.
    """
    multiple = vocabulary_multiple * tp
    vocabulary = -(-config.vocab_size // multiple) * multiple
    config.check_layout(tp, pp if layers is None else 1, flag="--target-{}-parallel-size")
    layers = layers or config.layers_of_stages(pp)
    if len(layers) != pp or sum(layers) != config.num_layers or min(layers) < 1:
        raise ConfigError(
            "the stages' layers do not make up the model",
            where="--num-layer-list",
            expected=f"{pp} positive numbers, {config.num_layers} in all",
            found=",".join(map(str, layers)),
        )
    return Grid(config, tp, layers, vocabulary, transformer_engine)


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
    reader = HFReader(source)
    reader.check(grid.config)
    staged = start_directory(target, overwrite=overwrite)
    iteration = iteration_directory(staged, _ITERATION)
    with Progress("Convert", grid.tp * grid.num_parameters, "parameters") as progress:
        for stage in range(grid.pp):
            for rank in range(grid.tp):
                shards = {}
                for name in grid.parameters(stage):
                    shards[name] = _shard(name, reader, grid, stage, rank, dtype)
                    progress.advance()
                write_rank(iteration / rank_path(stage, rank, grid.pp), shards)
                del shards
    keep_model_files(source, staged)
    write_json(staged / _MODEL_FILES, fingerprints(staged / FOLDER))
    with atomic_file(staged / LATEST, "w") as handle:
        handle.write(f"{_ITERATION}\n")
    if verify:
        written, files = open_ranks(iteration, grid.config)
        with Progress("Verify", grid.num_parameters, "parameters") as progress:
            for stage in range(grid.pp):
                for name, tensor in _joined(files, written, stage, progress):
                    expected = reader.tensor(name)
                    require_same(name, tensor, expected.to(dtype or expected.dtype), iteration)
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
    number = latest_iteration(source)
    assert number is not None
    grid, files = open_ranks(iteration_directory(source, number), ModelConfig.from_hf(side_files))
    staged = start_directory(target, overwrite=overwrite)
    written: dict[str, tuple[str, int]] = {}
    with Progress("Convert", grid.num_parameters, "parameters") as progress:
        for stage in range(grid.pp):
            tensors = _joined(files, grid, stage, progress)
            written |= export.write_weights(staged, tensors, dtype=dtype, stage=stage)
    export.write_model_files(
        staged, written, side_files, dtype=dtype or files[0, 0].dtypes[EMBEDDING]
    )
    if verify:
        _require_hf_holds(HFReader(staged), files, grid, dtype)
    publish(staged, target, overwrite=overwrite)
    return grid


def write_rank(path: Path, parameters: dict[str, Tensor]) -> None:
    """Write one rank's file and sync it.

    Raises:
        OutputError: it cannot be written.
    """
    content = {"model": parameters, "checkpoint_version": 3.0, "iteration": _ITERATION}
    try:
        with reported(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as handle:
                torch.save(content, handle)
                handle.flush()
                os.fsync(handle.fileno())
    except RuntimeError as error:  # the zip writer's, after a write that failed
        if isinstance(error.__context__, OSError):
            raise output_error(path, error.__context__) from error
        raise


def _shard(
    name: str, reader: HFReader, grid: Grid, stage: int, rank: int, dtype: torch.dtype | None
) -> Tensor:
    """One rank's part of one parameter, copied from the Hugging Face tensors."""
    mapping = grid.mapping(name, stage)
    whole = [reader.tensor(hf_name) for hf_name in mapping.names]
    for hf_name, tensor in zip(mapping.names, whole, strict=True):
        if dtype is None and tensor.dtype != whole[0].dtype:
            raise CheckpointError(
                f"{hf_name} and {mapping.names[0]} form one parameter and need one dtype",
                where=reader.directory,
                expected=whole[0].dtype,
                found=tensor.dtype,
                fix="Give --params-dtype",
            )
    shard = torch.empty(grid.shard_shape(name), dtype=dtype or whole[0].dtype)
    mapping.fill(shard, whole, rank, grid.tp)
    return shard


def _joined(
    files: dict[tuple[int, int], RankFile], grid: Grid, stage: int, progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    """A stage's Hugging Face tensors.

    Raises:
        CheckpointError: copies of one weight on several ranks differ.
    """
    config, ranks = grid.config, [files[stage, rank] for rank in range(grid.tp)]
    for name in grid.parameters(stage):
        progress.advance()
        if name == HEAD and config.tie_embeddings:
            continue
        mapping = grid.mapping(name, stage)
        if mapping.dim is None:
            for file in ranks[1:]:
                if not same_bits(file[name], ranks[0][name]):
                    raise CheckpointError(
                        f"{name} differs from its copy in {ranks[0].path}", where=file.path
                    )
        yield from zip(mapping.names, mapping.join([file[name] for file in ranks]), strict=True)
    if config.tie_embeddings and stage == grid.pp - 1:
        for rank, file in enumerate(ranks):
            if HEAD in file.shapes and not same_bits(file[HEAD], files[0, rank][EMBEDDING]):
                raise CheckpointError(
                    f"config.json ties {names.EMBEDDING} and the head, yet {HEAD} differs",
                    where=file.path,
                    fix="Correct config.json, or train with tied embeddings",
                )


def _require_hf_holds(
    reader: HFReader, files: dict[tuple[int, int], RankFile], grid: Grid, dtype: torch.dtype | None
) -> None:
    """Raise CheckpointError unless ``reader``'s tensors, cut anew, are those of each rank."""
    reader.check(grid.config)
    with Progress("Verify", grid.tp * grid.num_parameters, "parameters") as progress:
        for (stage, rank), file in files.items():
            for name in grid.parameters(stage):
                found, expected = _shard(name, reader, grid, stage, rank, None), file[name]
                if name in (EMBEDDING, HEAD):  # the padding is not written
                    held = max(grid.config.vocab_size - rank * len(found), 0)
                    found, expected = found[:held], expected[:held]
                expected = expected.to(dtype or expected.dtype)
                require_same(grid.mapping(name, stage).names[0], found, expected, reader.directory)
                progress.advance()
