"""Candidate sets cut down to a rank's rows of the output layer, on the host: beside the step.

On a device each cut has a size that only the numbers tell, for which the host would have to wait.

Shapes: N positions, P pairs of a position and a candidate of the shard, U distinct candidates.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from megatron_replay.data.loader import to_device
from megatron_replay.data.replay import ReplayTargets
from megatron_replay.functional.shard_head import HostSets, PairsById, ShardSets, VocabShard

#: numpy sorts 16-bit integers by counting, in linear time; ids have more.
_DIGIT = 16


def sets_of_shard(targets: ReplayTargets, shard: VocabShard, *, by_id: bool) -> ShardSets:
    """``targets``' sets as ``shard`` has them, bit for bit those of ``shard_sets``.

    ``by_id``: make the transpose as well, which needs position scope.
    """
    ids, offsets = targets.candidate_ids.numpy(), targets.candidate_offsets.numpy()
    rows, inside = shard.rows(cast(Any, ids))
    if not inside.all():
        rows = rows[inside]
        offsets = np.concatenate(([0], np.cumsum(inside)))[offsets]
    labels_N, found_N = shard.rows(cast(Any, targets.labels_N.numpy()))
    groups = targets.group_offsets
    transposed = pairs_by_id(cast(Any, rows), offsets) if by_id and groups is None else None
    return ShardSets(
        ids=torch.from_numpy(rows),
        offsets=torch.from_numpy(offsets),
        group_offsets=groups,
        labels_N=torch.from_numpy(np.where(found_N, labels_N, -1)),
        num_rows=shard.num_rows,
        on_host=HostSets(
            largest=int(np.diff(offsets).max(initial=0)),
            offsets=offsets.tolist(),
            group_offsets=None if groups is None else groups.numpy().tolist(),
            by_id=transposed,
        ),
    )


def pairs_by_id(ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64]) -> PairsById:
    """The pairs in the order of their ids, those of one id by position."""
    order = np.argsort((ids & (1 << _DIGIT) - 1).astype(np.uint16), kind="stable")
    high = (ids >> _DIGIT).astype(np.uint16)
    if high.any():
        order = order[np.argsort(high[order], kind="stable")]
    sorted_ids = ids[order]
    starts = np.flatnonzero(np.diff(sorted_ids, prepend=-1))
    positions = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))[order]
    return PairsById(
        order=torch.from_numpy(order),
        positions=torch.from_numpy(positions),
        rows=torch.from_numpy(sorted_ids[starts]),
        offsets=torch.from_numpy(np.append(starts, len(ids))),
    )


def sets_to_device(sets: ShardSets, device: torch.device) -> ShardSets:
    """The same sets on ``device``, what the host knows of them included."""
    return sets.moved(lambda tensor: to_device(tensor, device))
