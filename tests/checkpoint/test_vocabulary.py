"""Rows of the vocabulary dealt out over ranks, and back."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_replay.checkpoint.vocabulary import deinterleave, interleave
from tests import pool

pytestmark = pytest.mark.distributed


def deal_on(rank: int, world_size: int, rows: int) -> tuple[torch.Tensor, bool]:
    """Rows whose numbers are their ids; they, and whether the way back restores the shard."""
    contiguous = torch.arange(rank * rows, (rank + 1) * rows).float()[:, None].expand(-1, 3)
    dealt = interleave(contiguous, dist.group.WORLD)
    return dealt, torch.equal(deinterleave(dealt, dist.group.WORLD), contiguous)


@pytest.mark.parametrize(("world_size", "rows"), [(1, 5), (2, 6), (2, 7), (4, 1), (4, 8), (4, 10)])
def test_row_i_of_rank_r_is_that_of_id_r_plus_i_n(world_size: int, rows: int) -> None:
    """Shards that the number of ranks divides, and others, from which ranks get unequal parts."""
    for rank, (dealt, restored) in enumerate(pool.run(world_size, deal_on, rows)):
        ids = rank + world_size * torch.arange(rows)
        assert torch.equal(dealt, ids.float()[:, None].expand(-1, 3))
        assert restored
