"""The vocabulary dealt out over TP ranks id by id, and back into one piece each.

A tokenizer numbers frequent tokens first, so that of contiguous shards the first holds nearly all
candidates, and its rank does nearly all of the restricted head's work. Interleaved, row i of rank r
is that of id r + i n.

Only a run's memory knows of it. What is read and written, Hugging Face weights and training
checkpoints, has contiguous shards: rows change ranks after loading and before saving.

Shapes: V ids, n TP ranks, H hidden channels.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_replay.model.gpt import ReplayGPTModel

#: Keys and indices that lead to an entry of nested containers.
Path = tuple[Any, ...]

#: Parameters with a row for each id.
PARAMETERS = ("embedding.word_embeddings.weight", "output_layer.weight")


def interleave(contiguous: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's interleaved rows [V/n, H] of contiguous shards. One all-to-all of [V/n, H]."""
    rank, size, rows = dist.get_rank(group), dist.get_world_size(group), len(contiguous)
    sent = contiguous[_dealt(rank, size, rows, contiguous.device)]
    received = torch.empty_like(sent)
    # What comes is in order: shards ascend with the rank, and ids in each part.
    splits = _counts_from(rank, size, rows), _counts_to(rank, size, rows)
    dist.all_to_all_single(received, sent, *splits, group=group)
    return received


def deinterleave(interleaved: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``interleave`` undone: the same rows, the other way."""
    rank, size, rows = dist.get_rank(group), dist.get_world_size(group), len(interleaved)
    sent = interleaved.contiguous()
    received = torch.empty_like(sent)
    splits = _counts_to(rank, size, rows), _counts_from(rank, size, rows)
    dist.all_to_all_single(received, sent, *splits, group=group)
    contiguous = torch.empty_like(sent)
    contiguous[_dealt(rank, size, rows, sent.device)] = received
    return contiguous


def interleave_parameters(model: ReplayGPTModel, group: dist.ProcessGroup) -> None:
    """Deal out the vocabulary of a model that was filled with contiguous shards."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in PARAMETERS:
                parameter.copy_(interleave(parameter, group))


def vocabulary_places(content: Any, above: Path = ()) -> list[Path]:
    """Where a sharded state has rows of the vocabulary: weights and the optimizer's state."""
    if isinstance(content, ShardedTensor):
        return [above] if content.key.endswith(PARAMETERS) else []
    items: Any = ()
    if isinstance(content, dict):
        items = content.items()
    elif isinstance(content, (list, tuple)):
        items = enumerate(content)
    return [place for key, part in items for place in vocabulary_places(part, (*above, key))]


def change_places(content: Any, places: list[Path], change: Callable[[Any], Any]) -> None:
    """Put ``change(x)`` in the place of every x."""
    for *path, last in places:
        holder = functools.reduce(operator.getitem, path, content)
        holder[last] = change(holder[last])


def _dealt(rank: int, size: int, rows: int, device: torch.device) -> Tensor:
    """Rows of contiguous shard ``rank`` in the order of the ranks that they are dealt to."""
    parts = [_range_to(rank, other, size, rows) for other in range(size)]
    return torch.tensor([row for part in parts for row in part], device=device)


def _counts_to(rank: int, size: int, rows: int) -> list[int]:
    return [len(_range_to(rank, other, size, rows)) for other in range(size)]


def _counts_from(rank: int, size: int, rows: int) -> list[int]:
    return [len(_range_to(other, rank, size, rows)) for other in range(size)]


def _range_to(contiguous_rank: int, rank: int, size: int, rows: int) -> range:
    """Rows of a contiguous shard whose ids, first + row, are ``rank`` modulo ``size``."""
    return range((rank - contiguous_rank * rows) % size, rows, size)
