"""``--kl-weight``'s targets: the base model's stored logits as distributions, cut to a rank's rows.

On the host, beside the step, as ``shard.sets_of_shard``.

Shapes: N positions, P pairs of a position and a candidate of the shard, C of the vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from megatron_replay.data.loader import to_device
from megatron_replay.functional.shard_head import VocabShard
from megatron_replay.functional.soft_targets import SoftTargets, TargetSpan

#: Positions whose union of sets is multiplied at one time, as in ``functional.tiled_head``.
_SPAN_POSITIONS = 128


def soft_targets(
    ids: torch.Tensor,
    offsets: torch.Tensor,
    logits: torch.Tensor,
    labels_N: torch.Tensor,
    shard: VocabShard,
) -> SoftTargets:
    """q = softmax of the stored logits over each position's own set, as ``shard`` has it.

    Args:
        ids, offsets: int32 [C] and int64 [N + 1], sets that hold their labels.
        logits: float32 [C].
        labels_N: int64.
    """
    starts, sizes = offsets.numpy(), np.diff(offsets.numpy())
    q, negentropy_N = _distributions(logits.numpy(), starts[:-1], sizes)
    coefficients = (ids.numpy() == np.repeat(labels_N.numpy(), sizes)) - q
    rows, inside = shard.rows(cast(Any, ids.numpy()))
    if not inside.all():
        rows, coefficients = rows[inside], coefficients[cast(Any, inside)]
        starts = np.concatenate(([0], np.cumsum(inside)))[starts]
    unions, places, spans = _unions(cast(Any, rows), starts, shard.num_rows)
    return SoftTargets(
        rows=torch.from_numpy(unions),
        places=torch.from_numpy(places),
        coefficients=torch.from_numpy(coefficients.astype(np.float32)),
        negentropy_N=torch.from_numpy(negentropy_N.astype(np.float32)),
        spans=spans,
    )


def targets_to_device(targets: SoftTargets, device: torch.device) -> SoftTargets:
    """The same targets on ``device``."""
    return targets.moved(lambda tensor: to_device(tensor, device))


def _distributions(
    logits: npt.NDArray[np.float32],
    starts_N: npt.NDArray[np.int64],
    sizes_N: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(q [C], sum of q log q [N])."""
    z = logits.astype(np.float64)
    z -= np.repeat(np.maximum.reduceat(z, starts_N), sizes_N)
    z -= np.repeat(np.log(np.add.reduceat(np.exp(z), starts_N)), sizes_N)
    q = np.exp(z)
    return q, np.add.reduceat(q * z, starts_N)


def _unions(
    rows: npt.NDArray[np.int32], starts: npt.NDArray[np.int64], num_rows: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], list[TargetSpan]]:
    """``SoftTargets``' rows, places and spans; by a flag per row, far faster than sorting."""
    seen, column = np.zeros(num_rows, np.bool_), np.empty(num_rows, np.int64)
    positions = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    places = np.empty(len(rows), np.int64)
    unions: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
    spans, total = [], 0
    for first in range(0, len(starts) - 1, _SPAN_POSITIONS):
        last = min(first + _SPAN_POSITIONS, len(starts) - 1)
        pairs = slice(int(starts[first]), int(starts[last]))
        mine = rows[pairs].astype(np.intp)
        if not len(mine):
            continue
        seen[mine] = True
        union = np.flatnonzero(seen)
        seen[union] = False
        column[union] = np.arange(len(union))
        places[pairs] = (positions[pairs] - first) * len(union) + column[mine]
        spans.append(TargetSpan(slice(first, last), slice(total, total + len(union)), pairs))
        unions.append(union)
        total += len(union)
    return np.concatenate(unions), places, spans
