"""Sets cut on the host are those that ``shard_sets`` cuts on a device, their transpose included."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_replay.data.replay import ReplayTargets
from megatron_replay.data.shard import sets_of_shard
from megatron_replay.functional.shard_head import VocabShard, shard_sets

V = 150_000  # more than 16 bits hold


def targets(num_sets: int, largest: int, *, seed: int = 0, groups: bool = False) -> ReplayTargets:
    """Random sets, some empty; with ``groups`` each is two positions' own."""
    rng = np.random.default_rng(seed)
    sets = [np.unique(rng.integers(0, V, rng.integers(0, largest))) for _ in range(num_sets)]
    positions = 2 * num_sets if groups else num_sets
    flat = np.concatenate([np.empty(0, np.int64), *sets]).astype(np.int32)
    sizes = np.array([len(ids) for ids in sets], np.int64)
    zeros_N = torch.zeros(positions)
    return ReplayTargets(
        rows_N=torch.arange(positions),
        labels_N=torch.from_numpy(rng.integers(0, V, positions)),
        candidate_ids=torch.from_numpy(flat),
        candidate_offsets=torch.from_numpy(np.concatenate(([0], np.cumsum(sizes)))),
        group_offsets=torch.arange(0, positions + 1, 2) if groups else None,
        lse_N=zeros_N,
        tail_logit_N=zeros_N,
    )


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize(
    "shard",
    [VocabShard(0, V), VocabShard(V // 2, V // 2)],
)
@pytest.mark.parametrize(("num_sets", "largest"), [(200, 300), (40, 1), (0, 1)])
def test_equals_shard_sets(num_sets, largest, shard, groups):
    given = targets(num_sets, largest, groups=groups)
    found = sets_of_shard(given, shard, by_id=True)
    expected = shard_sets(
        given.candidate_ids, given.candidate_offsets, given.labels_N, given.group_offsets, shard
    )
    for name in ("ids", "offsets", "labels_N"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.dtype is theirs.dtype, name
        assert torch.equal(ours, theirs), name
    assert found.num_rows == expected.num_rows
    assert found.largest() == expected.largest()
    assert found.offset_list() == expected.offset_list()
    if groups:
        assert found.group_offset_list() == expected.group_offset_list()
        assert found.on_host.by_id is None
        return
    assert found.by_id is found.on_host.by_id
    for name, ours, theirs in zip(found.by_id._fields, found.by_id, expected.by_id, strict=True):
        assert ours.dtype is theirs.dtype, name
        assert torch.equal(ours, theirs), name


def test_the_transpose_moves_with_the_sets():
    sets = sets_of_shard(targets(5, 9), VocabShard(0, V), by_id=True)
    moved = sets.moved(torch.Tensor.clone)
    assert moved.by_id.order is not sets.by_id.order
    assert torch.equal(moved.by_id.order, sets.by_id.order)
    assert moved.largest() == sets.largest()
