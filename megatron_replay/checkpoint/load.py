"""Load a model from ``--load``: a Hugging Face directory or a training checkpoint.

A run may later read its starting weights again, one parameter at a time: ``weight_reader``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_replay.checkpoint.directories import (
    CHECKSUMS,
    checkpoint_type,
    iteration_directory,
    latest_iteration,
)
from megatron_replay.checkpoint.hf import HFReader
from megatron_replay.checkpoint.model_files import FOLDER, digests_of
from megatron_replay.checkpoint.names import Mapping, mapping_of
from megatron_replay.checkpoint.training import (
    CONVERTED_FROM,
    load_checkpoint,
    read_state,
    require_finite,
)
from megatron_replay.config import ModelConfigSource, ParallelConfig
from megatron_replay.errors import CheckpointError
from megatron_replay.model.config import ModelConfig
from megatron_replay.model.gpt import ReplayGPTModel, build_model, transformer_config
from megatron_replay.parallel import Parallel
from megatron_replay.platform.megatron_core import fuses_gradient_accumulation


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model on this rank, its shape, and the directory of its config.json and tokenizer.

    ``layer_offset``: the global number of this stage's first layer.
    """

    shape: ModelConfig
    config: TransformerConfig
    module: ReplayGPTModel
    files: Path
    layer_offset: int

    def mapping(self, parameter: str) -> Mapping:
        """The Hugging Face tensors of a parameter."""
        return mapping_of(parameter, self.shape, self.layer_offset)


def model_files(load: str | Path) -> Path:
    """The directory with config.json and tokenizer behind ``--load``.

    Raises:
        CheckpointError: ``load`` is neither a Hugging Face directory nor a training checkpoint.
    """
    directory = Path(load)
    kind = checkpoint_type(directory)
    if kind == "mg":
        raise CheckpointError(
            "files of ranks (mg) cannot be loaded directly",
            where=directory,
            fix="Convert them: tools/convert_checkpoint.py --load-model-type mg "
            "--save-model-type hf",
        )
    return directory / FOLDER if kind == "mcore" else directory


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
    offset = int(get_transformer_layer_offset(config))
    if chosen is None:
        reader = HFReader(files)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                mapping = mapping_of(name, shape, offset)
                reader.fill(parameter, mapping, parallel.tp_rank, parallel.tp_size)
    else:
        load_checkpoint(directory, chosen, module, None, parallel)
    parallel.agreed(
        lambda: require_finite(
            module, CheckpointError, where=directory, fix="Give another checkpoint"
        )
    )
    return LoadedModel(shape, config, module, files, offset)


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
        paths = [iteration_directory(directory, iteration) / CHECKSUMS]
    return digests_of(paths)


def weight_reader(
    load: Path, iteration: int | None, model: LoadedModel, parallel: Parallel
) -> Callable[[str], Tensor]:
    """A function from a parameter's name to this rank's shard of it in ``load``, on the host.

    Reads one parameter at a time, without communication, while a run holds its model. The shard is
    rounded to the dtype of the model's parameter, as loading rounds it.

    Args:
        iteration: of the training checkpoint in ``load``; None for a Hugging Face directory.

    Raises:
        CheckpointError: a tensor is missing; raised by the function too.
    """
    if iteration is not None:
        return _from_checkpoint(iteration_directory(load, iteration), model, parallel)
    reader, parameters = HFReader(load), dict(model.module.named_parameters())

    def read(name: str) -> Tensor:
        shard = torch.empty_like(parameters[name], device="cpu")
        reader.fill(shard, model.mapping(name), parallel.tp_rank, parallel.tp_size)
        return shard

    return read


def _from_checkpoint(path: Path, model: LoadedModel, parallel: Parallel) -> Callable[[str], Tensor]:
    reader = FileSystemReader(path)
    stored = reader.read_metadata()
    reader.set_up_storage_reader(stored, is_coordinator=False)
    described = model.module.sharded_state_dict(metadata={"dp_cp_group": parallel.dp_group})

    def read(name: str) -> Tensor:
        # Its data are the weights as they are now: read into a copy.
        entry = described[name]
        entry = dataclasses.replace(entry, data=torch.zeros_like(entry.data, device="cpu"))
        # A factory describes parts that are stored apart: the halves of SwiGLU.
        is_joint = isinstance(entry, ShardedTensorFactory)
        parts: list[ShardedTensor] = entry.build() if is_joint else [entry]
        for part in parts:
            file = stored.state_dict_metadata.get(part.key)
            # The vocabulary's padding is that of the layout that wrote it.
            if not isinstance(file, TensorStorageMetadata) or not (
                part.allow_shape_mismatch or file.size == part.global_shape
            ):
                raise CheckpointError(f"no tensor {part.key} of the model's shape", where=path)
            target = part.data.view((1,) * part.prepend_axis_num + tuple(part.local_shape))
            chunk = ChunkStorageMetadata(torch.Size(part.global_offset), target.shape)
            items = create_read_items_for_chunk_list(part.key, file, [chunk])
            reader.read_data(LoadPlan(items), _Into(target)).wait()
        shard: Tensor = entry.merge_fn([part.data for part in parts]) if is_joint else entry.data
        return shard

    return read


class _Into(DefaultLoadPlanner):
    """Writes what is read, from one or several chunks of the file, into ``target``."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of the target that ``read_item`` fills."""
        place = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._target[tuple(slice(start, start + length) for start, length in place)]
