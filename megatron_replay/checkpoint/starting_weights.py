"""Read the weights of ``--load`` again, one parameter at a time, without any collective.

``checkpoint.load`` fills a whole model at once, every rank together. Here each rank asks for what
it wants, when it wants it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
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


def starting_weights(
    load: Path,
    iteration: int | None,
    model: LoadedModel,
    names: Sequence[str],
    parallel: Parallel,
) -> Iterator[Tensor]:
    """This rank's shard of each named parameter, rounded to its dtype, as loading rounds it.

    Args:
        iteration: of the training checkpoint in ``load``; None for a Hugging Face directory.

    Raises:
        CheckpointError: a tensor is missing.
    """
    if iteration is None:
        return _from_hf(HFReader(load), model, names, parallel)
    return _from_checkpoint(iteration_directory(load, iteration), model, names, parallel)


def _from_hf(
    reader: HFReader, model: LoadedModel, names: Sequence[str], parallel: Parallel
) -> Iterator[Tensor]:
    dtypes = {name: parameter.dtype for name, parameter in model.module.named_parameters()}
    for name in names:
        mapping = mapping_of(name, model.shape, model.layer_offset)
        tensors = [reader.slice(hf_name) for hf_name in mapping.names]
        shard = mapping.layout.split(tensors, parallel.tp_rank, parallel.tp_size)
        yield shard.to(dtypes[name])


def _from_checkpoint(
    path: Path, model: LoadedModel, names: Sequence[str], parallel: Parallel
) -> Iterator[Tensor]:
    """megatron-core's description of a parameter says where its shards lie in the files."""
    reader = FileSystemReader(path)
    stored = reader.read_metadata()
    reader.set_up_storage_reader(stored, is_coordinator=False)
    described = model.module.sharded_state_dict(metadata={"dp_cp_group": parallel.dp_group})
    for name in names:
        # Its data are the weights as they are now: read beside them, not into them.
        entry = described[name]
        entry = dataclasses.replace(entry, data=torch.empty_like(entry.data, device="cpu"))
        # A factory stands for parts that are stored apart: the halves of SwiGLU.
        is_joint = isinstance(entry, ShardedTensorFactory)
        parts: list[ShardedTensor] = entry.build() if is_joint else [entry]
        for part in parts:
            in_file = stored.state_dict_metadata.get(part.key)
            if not isinstance(in_file, TensorStorageMetadata) or in_file.size != part.global_shape:
                raise CheckpointError(f"no tensor {part.key} of the model's shape", where=path)
            shape = (1,) * part.prepend_axis_num + tuple(part.local_shape)
            _read(reader, in_file, part.key, part.global_offset, part.data.view(shape))
        yield entry.merge_fn([part.data for part in parts]) if is_joint else entry.data


def _read(
    reader: FileSystemReader,
    stored: TensorStorageMetadata,
    key: str,
    offset: Sequence[int],
    target: Tensor,
) -> None:
    """Fill ``target``, which may lie across several chunks of the file, or in one of them."""
    chunk = ChunkStorageMetadata(torch.Size(offset), target.shape)
    items = create_read_items_for_chunk_list(key, stored, [chunk])
    reader.read_data(LoadPlan(items), _Into(target)).wait()


class _Into(DefaultLoadPlanner):
    """Sends what is read to its place in ``target``."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of the target that ``read_item`` is."""
        place = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._target[tuple(slice(start, start + length) for start, length in place)]
