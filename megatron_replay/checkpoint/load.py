"""From ``--load`` to a model with its weights, whatever the directory holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_replay.checkpoint.hf import HFReader, load_hf_weights
from megatron_replay.checkpoint.training import (
    iteration_directory,
    latest_iteration,
    load_checkpoint,
    model_files_directory,
)
from megatron_replay.checkpoint.vocabulary import interleave_parameters
from megatron_replay.config import ModelConfigSource, ParallelConfig
from megatron_replay.errors import CheckpointError
from megatron_replay.files import sha256_of_files
from megatron_replay.model.config import ModelConfig
from megatron_replay.model.gpt import (
    ReplayGPTModel,
    build_model,
    layer_offset,
    transformer_config,
)
from megatron_replay.parallel import Parallel
from megatron_replay.platform.megatron_core import fuses_gradient_accumulation


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model on this rank, its shape, and where its config.json and tokenizer lie."""

    shape: ModelConfig
    config: TransformerConfig
    module: ReplayGPTModel
    files: Path
    layer_offset: int


def model_files(load: str | Path) -> Path:
    """The directory with config.json and tokenizer behind ``--load``.

    Raises:
        CheckpointError: ``load`` is neither a Hugging Face directory nor a training checkpoint.
    """
    directory = Path(load)
    iteration = latest_iteration(directory)
    if iteration is not None:
        if any(iteration_directory(directory, iteration).glob("mp_rank_*")):
            raise CheckpointError(
                "files of ranks (mg) are not loaded as they are",
                where=directory,
                fix="Convert them: tools/convert_checkpoint.py --load-model-type mg "
                "--save-model-type hf",
            )
        return model_files_directory(directory)
    if (directory / "config.json").exists():
        return directory
    raise CheckpointError(
        "no checkpoint here",
        where=directory,
        expected="config.json (Hugging Face) or latest_checkpointed_iteration.txt",
        found="nothing of either" if directory.is_dir() else "no such directory",
    )


def load_model(
    source: ModelConfigSource,
    parallel_config: ParallelConfig,
    parallel: Parallel,
    *,
    recompute: bool = False,
    iteration: int | None = None,
) -> LoadedModel:
    """Build this rank's part of the model and fill it from ``source.load``.

    ``iteration``: of a training checkpoint; None: the newest.
    """
    files = model_files(source.load)
    shape = ModelConfig.from_hf(files)
    shape.check_layout(parallel.tp_size, parallel.pp_size)
    config = transformer_config(
        shape,
        parallel_config,
        bf16=source.bf16,
        recompute=recompute,
        gradient_accumulation_fusion=fuses_gradient_accumulation(parallel.device),
    )
    module = build_model(shape, config, parallel).to(parallel.device)
    offset = layer_offset(config)
    newest = latest_iteration(Path(source.load))
    if newest is None:
        load_hf_weights(
            module.named_parameters(),
            HFReader(files),
            shape,
            tp_rank=parallel.tp_rank,
            tp_size=parallel.tp_size,
            layer_offset=offset,
        )
        if parallel.interleaved_vocabulary:
            interleave_parameters(module, parallel.tp_group)
    else:
        chosen = newest if iteration is None else iteration
        load_checkpoint(Path(source.load), chosen, module, None, parallel)
    if parallel.interleaved_vocabulary:
        module.interleave_vocabulary()
    return LoadedModel(shape, config, module, files, offset)


def checkpoint_fingerprint(load: str | Path) -> str:
    """SHA-256 of the weights behind ``--load``: which model a candidate store was made with."""
    directory = Path(load)
    iteration = latest_iteration(directory)
    if iteration is None:
        return HFReader(directory).fingerprint()
    files = [path for path in iteration_directory(directory, iteration).iterdir() if path.is_file()]
    return sha256_of_files(files)
