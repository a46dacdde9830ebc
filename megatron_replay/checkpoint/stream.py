"""Hugging Face directory <-> files of ranks: in one process, one parameter at a time, no model.

Memory: to write ranks, one rank's weights and one tensor; to write Hugging Face shards, one shard
and one parameter. What is read is mapped, and let go of after use.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_replay.checkpoint import export
from megatron_replay.checkpoint.compare import require_same
from megatron_replay.checkpoint.directories import LATEST, iteration_directory, latest_iteration
from megatron_replay.checkpoint.hf import HFReader, same_bits
from megatron_replay.checkpoint.mapped import MappedTensor
from megatron_replay.checkpoint.model_files import (
    FOLDER,
    fingerprints,
    keep_model_files,
    require_model_files,
)
from megatron_replay.checkpoint.names import EMBEDDING, mapping_of
from megatron_replay.checkpoint.rank_files import (
    VOCABULARY,
    Grid,
    RankFile,
    open_grid,
    write_rank,
)
from megatron_replay.checkpoint.staging import publish, start_directory
from megatron_replay.errors import CheckpointError, ConfigError
from megatron_replay.files import atomic_file, fsync_path, output_error, read_json, write_json
from megatron_replay.model.config import ModelConfig
from megatron_replay.progress import Progress

_ITERATION = 1
#: SHA-256 by name of what lies in hf/, beside it.
_MODEL_FILES = "model_files.json"


@dataclass(frozen=True)
class Converted:
    """What was done: the layout, and tensors compared (0: not verified)."""

    grid: Grid
    num_verified: int


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
        ConfigError: TP or PP do not divide the model, or ``layers`` do not add up to it.
    """
    for flag, number in (
        ("--target-tensor-parallel-size", tp),
        ("--target-pipeline-parallel-size", pp),
        ("--make-vocab-size-divisible-by", vocabulary_multiple),
    ):
        if number < 1:
            raise ConfigError("not a positive number", where=flag, found=number)
    for name, value in (
        ("attention heads", config.num_attention_heads),
        ("query groups", config.num_query_groups),
        ("ffn_hidden_size", config.ffn_hidden_size),
    ):
        if value % tp:
            raise ConfigError(
                f"TP does not divide the model's {name}",
                where="--target-tensor-parallel-size",
                expected=f"a divisor of {value}",
                found=tp,
            )
    if layers is None:
        if config.num_layers % pp:
            raise ConfigError(
                "PP does not divide the model's layers",
                where="--target-pipeline-parallel-size",
                expected=f"a divisor of {config.num_layers}",
                found=pp,
                fix="Or give the layers of each stage with --num-layer-list",
            )
        layers = (config.num_layers // pp,) * pp
    if len(layers) != pp or sum(layers) != config.num_layers or min(layers) < 1:
        raise ConfigError(
            "the stages' layers do not make up the model",
            where="--num-layer-list",
            expected=f"{pp} positive numbers, {config.num_layers} in all",
            found=",".join(map(str, layers)),
        )
    multiple = vocabulary_multiple * tp
    return Grid(tp, layers, -(-config.vocab_size // multiple) * multiple, transformer_engine)


def hf_to_ranks(
    source: Path,
    target: Path,
    grid: Grid,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> Converted:
    """Write ``source`` as files of ranks; ``dtype`` None keeps each tensor's.

    Raises:
        CheckpointError: ``source`` is not the model it says, or what was written differs from it.
        OutputError: ``target`` is not empty or cannot be written; nothing is published then.
    """
    config, reader = ModelConfig.from_hf(source), HFReader(source)
    reader.check(config)
    staged = start_directory(target, overwrite=overwrite)
    iteration = iteration_directory(staged, _ITERATION)
    names = [list(grid.parameters(config, stage)) for stage in range(grid.pp)]
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
    verified = 0
    if verify:
        written, files = open_grid(iteration, config)
        verified = require_same(reader, files, config, written, dtype=dtype, padding_is_zero=True)
    try:
        for folder in (*iteration.iterdir(), iteration):
            fsync_path(folder)
        publish(staged, target.resolve(), overwrite=overwrite)
    except OSError as error:
        raise output_error(target, error) from error
    return Converted(grid, verified)


def _shard(
    name: str,
    reader: HFReader,
    config: ModelConfig,
    grid: Grid,
    stage: int,
    rank: int,
    dtype: torch.dtype | None,
) -> Tensor:
    """One rank's part of one parameter, in memory of its own."""
    mapping = mapping_of(name, config, grid.offset(stage))
    whole = [reader.slice(hf_name) for hf_name in mapping.names]
    if dtype is None:
        dtype = whole[0].torch_dtype()
        for hf_name, tensor in zip(mapping.names, whole, strict=True):
            if tensor.torch_dtype() != dtype:
                raise CheckpointError(
                    f"{hf_name} and {mapping.names[0]} make one parameter, in one dtype",
                    where=reader.directory,
                    expected=dtype,
                    found=tensor.torch_dtype(),
                    fix="Give --params-dtype",
                )
    shard = torch.empty(grid.shard_shape(name, config), dtype=dtype)
    if name in VOCABULARY:
        _fill_rows(shard, whole[0], rank)
    else:
        mapping.layout.fill(shard, whole, rank, grid.tp)
    return shard


def _fill_rows(shard: Tensor, whole: MappedTensor, rank: int) -> None:
    """This rank's rows of the vocabulary, zeros where it has ended."""
    first = rank * len(shard)
    held = min(max(whole.get_shape()[0] - first, 0), len(shard))
    shard[:held].copy_(whole[first : first + held])
    shard[held:].zero_()


def ranks_to_hf(
    source: Path,
    target: Path,
    *,
    config_directory: Path | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    verify: bool = True,
    max_shard_bytes: int = 2 << 30,
) -> Converted:
    """Write files of ranks as a Hugging Face directory.

    Args:
        config_directory: where config.json and tokenizer lie; default ``source``/hf, which must
            then be what the files of ranks were made with, if they are ours.

    Raises:
        CheckpointError: ``source`` is not whole, or what was written differs from it.
        OutputError: ``target`` is not empty or cannot be written; nothing is published then.
    """
    side_files = config_directory or source / FOLDER
    if not (side_files / "config.json").is_file():
        raise CheckpointError(
            "no config.json", where=side_files, fix="Name a directory that has it: --hf-cfg-dir"
        )
    made_with = source / _MODEL_FILES
    if config_directory is None and made_with.exists():
        require_model_files(source, read_json(made_with, CheckpointError))
    config = ModelConfig.from_hf(side_files)
    number = latest_iteration(source)
    if number is None:
        raise CheckpointError("no checkpoint here", where=source, expected=LATEST)
    iteration = iteration_directory(source, number)
    grid, files = open_grid(iteration, config)
    staged = start_directory(target, overwrite=overwrite)
    written: dict[str, tuple[str, int]] = {}
    total = sum(len(list(grid.parameters(config, stage))) for stage in range(grid.pp))
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
    verified = 0
    if verify:
        export.write_index(staged, written)
        fresh = open_grid(iteration, config)[1]
        verified = require_same(
            HFReader(staged), fresh, config, grid, dtype=dtype, padding_is_zero=False
        )
    export.finish_directory(
        staged,
        target,
        written,
        export.read_config(side_files),
        dtype=stored,
        source=side_files,
        overwrite=overwrite,
    )
    return Converted(grid, verified)


def _joined(
    files: dict[tuple[int, int], RankFile],
    grid: Grid,
    config: ModelConfig,
    stage: int,
    progress: Progress,
) -> Iterator[tuple[str, Tensor]]:
    """A stage's Hugging Face tensors."""
    for name in grid.parameters(config, stage):
        mapping = mapping_of(name, config, grid.offset(stage))
        ranks = [files[stage, rank] for rank in range(grid.tp)]
        if name == VOCABULARY[1] and config.tie_embeddings:
            pass
        elif name in VOCABULARY:
            yield mapping.names[0], torch.cat([file[name] for file in ranks])[: config.vocab_size]
        else:
            joined = mapping.layout.join([file[name] for file in ranks])
            yield from zip(mapping.names, joined, strict=True)
        progress.advance()
    if config.tie_embeddings and stage == grid.pp - 1:
        _require_tied(files, grid)


def _require_tied(files: dict[tuple[int, int], RankFile], grid: Grid) -> None:
    """The last stage's copy of a tied embedding must be one."""
    for rank in range(grid.tp):
        last, first = files[grid.pp - 1, rank], files[0, rank]
        if VOCABULARY[1] in last.shapes and not same_bits(
            last[VOCABULARY[1]], first[VOCABULARY[0]]
        ):
            raise CheckpointError(
                f"config.json ties {EMBEDDING} and the head, yet output_layer.weight differs",
                where=last.path,
                fix="Correct config.json, or train with tied embeddings",
            )
