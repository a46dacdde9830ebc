"""Load a model from ``--load``: a Hugging Face directory or a training checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_replay.checkpoint import checksums
from megatron_replay.checkpoint.hf import HFReader, load_hf_weights
from megatron_replay.checkpoint.model_files import FOLDER, digests_of
from megatron_replay.checkpoint.training import (
    CONVERTED_FROM,
    iteration_directory,
    latest_iteration,
    load_checkpoint,
    read_state,
    require_finite,
)
from megatron_replay.config import ModelConfigSource, ParallelConfig
from megatron_replay.errors import CheckpointError, TrainingError
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
    """A model on this rank, its shape, and the directory of its config.json and tokenizer."""

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
                "files of ranks (mg) cannot be loaded directly",
                where=directory,
                fix="Convert them: tools/convert_checkpoint.py --load-model-type mg "
                "--save-model-type hf",
            )
        return directory / FOLDER
    if (directory / "config.json").exists():
        return directory
    raise CheckpointError(
        "no checkpoint here",
        where=directory,
        expected="config.json (Hugging Face) or latest_checkpointed_iteration.txt",
        found="neither" if directory.is_dir() else "no such directory",
    )


def describe_model(load: str | Path, iteration: int | None = None) -> tuple[Path, ModelConfig]:
    """The directory of config.json and tokenizer of ``--load``, and the model's shape.

    Checks, before any memory is allocated, that the weights have that shape or, for a training
    checkpoint, that it was made with these files.

    Raises:
        CheckpointError: weights and config.json do not belong together.
    """
    files, newest = model_files(load), latest_iteration(Path(load))
    if newest is not None:
        read_state(Path(load), newest if iteration is None else iteration)
    shape = ModelConfig.from_hf(files)
    if newest is None:
        HFReader(files).check(shape)
    return files, shape


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

    Raises:
        CheckpointError: the weights are damaged, not finite, or do not fit config.json.
    """
    directory, newest = Path(source.load), latest_iteration(Path(source.load))
    chosen = newest if iteration is None else iteration
    files, shape = describe_model(source.load, chosen)
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
    if chosen is None:
        load_hf_weights(
            module.named_parameters(),
            HFReader(files),
            shape,
            tp_rank=parallel.tp_rank,
            tp_size=parallel.tp_size,
            layer_offset=offset,
        )
    else:
        load_checkpoint(directory, chosen, module, None, parallel)
    parallel.agreed(lambda: _require_numbers(module, directory))
    return LoadedModel(shape, config, module, files, offset)


def _require_numbers(module: ReplayGPTModel, directory: Path) -> None:
    try:
        require_finite(module)
    except TrainingError as error:
        raise CheckpointError(
            str(error).partition(". ")[0],
            where=directory,
            fix="Give another checkpoint",
        ) from error


def base_fingerprint(load: str | Path) -> str:
    """Identifies the weights of ``--load``: the SHA-256 of each file, a JSON object by name.

    For a Hugging Face directory: of config.json and the weights. For a training checkpoint: of its
    checksums.json, which stands for the other files; or, if it was converted without rounding, the
    fingerprint of its source, so that both count as the same model.

    Raises:
        CheckpointError: a file cannot be read.
    """
    directory = Path(load)
    iteration = latest_iteration(directory)
    if iteration is None:
        paths = HFReader(directory).files()
    else:
        converted_from = read_state(directory, iteration).identity.get(CONVERTED_FROM)
        if isinstance(converted_from, str):
            return converted_from
        paths = [iteration_directory(directory, iteration) / checksums.FILE]
    return digests_of(paths)
