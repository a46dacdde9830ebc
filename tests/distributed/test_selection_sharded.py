"""The store is byte for byte the same for every TP: candidate sets of shards cut at any place.

Shapes: T positions, V vocabulary. Shard ends fall on every place of a vector register, where the
exponential of a register and that of its remainder could differ by a bit.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay.functional import SelectedCandidates, select_candidates
from megatron_replay.kernels import SELECTION
from tests import pool

pytestmark = pytest.mark.distributed

#: Every pairing of logits, coverage and cap that ``selection_case`` makes occurs.
SEEDS = range(125)
#: Shard sizes of the first seeds, cut to the number of ranks; later seeds draw theirs.
SIZES = ((37, 61, 129, 1), (1, 8, 255, 3), (129, 130, 127, 131), (64, 64, 64, 64))


def shard_ends(world_size: int, seed: int) -> list[int]:
    """First id of each shard, then the vocabulary size. Most shards are below max_candidates."""
    if seed < len(SIZES):
        sizes = list(SIZES[seed][:world_size])
    else:
        generator = torch.Generator().manual_seed(1000 + seed)
        sizes = torch.randint(1, 330, (world_size,), generator=generator).tolist()
    return list(itertools.accumulate(sizes, initial=0))


def selection_case(V: int, seed: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits of a kind that could break a merge, labels that they allow, and options."""
    generator = torch.Generator().manual_seed(seed)
    T = 5
    logits_TV = torch.randn(T, V, generator=generator) * (0.3, 2.0, 6.0)[seed % 3]
    kind = seed % 5
    if kind == 1:
        logits_TV = logits_TV.bfloat16()
    elif kind == 2:  # few levels, zeros of both signs: ties across every cut and every shard
        logits_TV = logits_TV.round()
        logits_TV *= torch.where(torch.rand(T, V, generator=generator) < 0.5, -1.0, 1.0)
    elif kind == 3:  # masked tokens; in the last position all but the label
        share = torch.tensor([0.1, 0.5, 0.9, 0.99, 1.0])[:, None]
        logits_TV[torch.rand(T, V, generator=generator) < share] = -math.inf
    elif kind == 4:
        logits_TV = torch.zeros(T, V)
    labels_T = torch.randint(V, (T,), generator=generator)
    labelled = logits_TV.gather(1, labels_T[:, None]).nan_to_num(neginf=-3.0)
    logits_TV.scatter_(1, labels_T[:, None], labelled)
    options = {
        "coverage": (0.5, 0.9, 0.95, 0.999, 1.0)[seed // 5 % 5],
        "max_candidates": (1, 7, 40, 200, 255)[seed // 25 % 5],
    }
    return logits_TV, labels_T, options


def select_on_shard(rank: int, world_size: int) -> list[str]:
    """Seeds, forms and fields in which what this rank gets differs from the whole's."""
    wrong = []
    for seed in SEEDS:
        ends = shard_ends(world_size, seed)
        logits_TV, labels_T, options = selection_case(ends[-1], seed)
        whole = select_candidates(logits_TV, labels_T, **options)
        shard_TV = logits_TV[:, ends[rank] : ends[rank + 1]]
        for name in ("torch", "cpu"):
            found = select_candidates(
                shard_TV.clone() if seed % 2 else shard_TV,  # memory of its own, or a strided view
                labels_T,
                vocab_start=ends[rank],
                tp_group=dist.group.WORLD,
                backend=SELECTION.choose(name, logits_TV),
                **options,
            )
            for field in SelectedCandidates.__dataclass_fields__:
                expected, ours = getattr(whole, field), getattr(found, field)
                # Bytes, as the store writes them: torch.equal takes -0.0 for 0.0.
                same = expected.numpy().tobytes() == ours.numpy().tobytes()
                if expected.dtype != ours.dtype or not same:
                    wrong.append(f"seed {seed}, {name}: {field}")
    return wrong


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_sets_are_byte_for_byte_those_of_one_process(world_size: int) -> None:
    assert pool.run(world_size, select_on_shard) == [[]] * world_size
