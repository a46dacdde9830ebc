"""The placement of what a rule updates in megatron-core: parameters, fp32 masters, or shards."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from megatron_replay.checkpoint.load import LoadedModel
from megatron_replay.checkpoint.names import Mapping, hf_tensor_shapes, mapping_of
from megatron_replay.optim.placement import Piece, Place, Placement
from megatron_replay.parallel import Parallel

_ATTENTION = re.compile(r"model\.layers\.(\d+)\.self_attn\.[qkvo]_proj\.")


def place_model(
    optimizer: MegatronOptimizer, model: LoadedModel, parallel: Parallel
) -> tuple[Placement, dict[Tensor, Tensor]]:
    """The placement of what ``optimizer`` updates, and its tensors' bf16 copies in the model."""
    sharded = isinstance(optimizer, DistributedOptimizer)
    shapes = hf_tensor_shapes(model.shape)
    row_of = {name: row for row, name in enumerate(shapes)}
    pieces: dict[Tensor, list[Piece]] = {}
    names: dict[Tensor, Mapping] = {}
    sizes: list[int] = []
    for name, param in model.module.named_parameters():
        mapping = names[param] = mapping_of(name, model.shape, model.layer_offset)
        if param.dim() == 2:
            wholes = [math.prod(shapes[name]) for name in mapping.names]
            pieces[param] = _pieces(param, mapping, parallel.tp_size, wholes, first=len(sizes))
            sizes += wholes
    places, copies = {}, {}
    for param, tensor, start, copy in _stepped(optimizer, model):
        attention = _ATTENTION.match(names[param].names[0])
        places[tensor] = Place(
            row=row_of[names[param].names[0]],
            counts=counts_once(tensor, tp_group=parallel.tp_group),
            pieces=tuple(
                _within(piece, start, start + tensor.numel()) for piece in pieces.get(param, [])
            ),
            orthogonal=param.dim() == 2 and names[param].names[0].startswith("model.layers."),
            attention_layer=int(attention[1]) if attention else None,
        )
        if copy is not None:
            copies[tensor] = copy
    world = dist.group.WORLD
    assert world is not None
    return (
        Placement(
            places=places,
            model_group=world if sharded else parallel.model_group,
            tensor_group=parallel.tp_dp_group if sharded else parallel.tp_group,
            tp_group=parallel.tp_group,
            num_tensors=len(shapes),
            piece_sizes=tuple(sizes),
            num_layers=model.shape.num_layers,
        ),
        copies,
    )


def counts_once(param: Tensor, *, tp_group: Any) -> bool:
    """Whether ``param`` enters this rank's share of a sum over the whole model.

    A weight that every TP rank holds whole (a norm) counts on TP rank 0; the last stage's copy of a
    tied embedding does not count, since the first stage's does.
    """
    return bool(
        param_is_not_shared(param)
        and param_is_not_tensor_parallel_duplicate(param, tp_group=tp_group)
    )


def _pieces(
    param: Tensor, mapping: Mapping, tp_size: int, wholes: Sequence[int], *, first: int
) -> list[Piece]:
    """The Hugging Face matrices in a parameter, of ``wholes`` elements over all ranks."""
    rows, columns = param.shape
    return [
        Piece(
            index=first + i,
            numel=whole,
            columns=columns,
            ranges=_merged([(r.start * columns, r.stop * columns) for r in ranges]),
            split_dim=mapping.layout.dim,
        )
        for i, (whole, ranges) in enumerate(
            zip(wholes, mapping.layout.rows(rows, tp_size), strict=True)
        )
    ]


def _within(piece: Piece, start: int, stop: int) -> Piece:
    """The piece as seen from a flat part [start, stop) of its parameter."""
    ranges = tuple(
        (max(a, start) - start, min(b, stop) - start)
        for a, b in piece.ranges
        if a < stop and b > start
    )
    return dataclasses.replace(piece, ranges=ranges)


def _merged(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Neighbouring ranges as one."""
    merged: list[tuple[int, int]] = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)


def _stepped(
    optimizer: MegatronOptimizer, model: LoadedModel
) -> Iterator[tuple[Tensor, Tensor, int, Tensor | None]]:
    """(model parameter, the tensor updated for it, where that starts in it, its bf16 copy)."""
    if not isinstance(optimizer, DistributedOptimizer):
        for param in model.module.parameters():
            master = getattr(param, "main_param", None)
            if master is None:
                yield param, param, 0, None
            else:
                yield param, master, 0, param.data
        return
    groups = (
        (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
        (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
    )
    for models, shards in groups:
        for param, shard in (
            pair for ours in zip(models, shards, strict=True) for pair in zip(*ours, strict=True)
        ):
            start = optimizer._get_model_param_range_map(param)["param"].start
            view = param.data.view(-1)[start : start + shard.numel()]
            # In fp32 the shard is part of the model's own buffer; nothing to copy.
            yield param, shard, start, None if view.dtype == shard.dtype else view
