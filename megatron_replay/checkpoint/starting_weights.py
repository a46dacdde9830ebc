"""Read weights of ``--load`` again while a run holds its model: one parameter at a time.

``checkpoint.load`` fills a whole model, collectively. Here each rank reads what it needs, without
any communication.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_replay.checkpoint.hf import HFReader
from megatron_replay.checkpoint.load import LoadedModel
from megatron_replay.checkpoint.names import mapping_of
from megatron_replay.checkpoint.training import iteration_directory
from megatron_replay.errors import CheckpointError
from megatron_replay.parallel import Parallel


def weight_reader(
    load: Path, iteration: int | None, model: LoadedModel, parallel: Parallel
) -> Callable[[str], Tensor]:
    """A function from a parameter's name to this rank's shard of it, on the host.

    The shard is rounded to the dtype of the model's parameter, as loading rounds it.

    Args:
        iteration: of the training checkpoint in ``load``; None for a Hugging Face directory.

    Raises:
        CheckpointError: a tensor is missing; raised by the function too.
    """
    if iteration is None:
        return _from_hf(load, model, parallel)
    return _from_checkpoint(iteration_directory(load, iteration), model, parallel)


def _from_hf(load: Path, model: LoadedModel, parallel: Parallel) -> Callable[[str], Tensor]:
    reader, parameters = HFReader(load), dict(model.module.named_parameters())

    def read(name: str) -> Tensor:
        mapping = mapping_of(name, model.shape, model.layer_offset)
        tensors = [reader.slice(hf_name) for hf_name in mapping.names]
        shard = torch.empty_like(parameters[name], device="cpu")
        mapping.layout.fill(shard, tensors, parallel.tp_rank, parallel.tp_size)
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
        entry = dataclasses.replace(entry, data=torch.empty_like(entry.data, device="cpu"))
        # A factory describes parts that are stored apart: the halves of SwiGLU.
        is_joint = isinstance(entry, ShardedTensorFactory)
        parts: list[ShardedTensor] = entry.build() if is_joint else [entry]
        for part in parts:
            file = stored.state_dict_metadata.get(part.key)
            if not isinstance(file, TensorStorageMetadata) or file.size != part.global_shape:
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
