"""Orthogonalisation: singular values near 1, vectors kept; whole also when held in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay.optim.muon import newton_schulz, on_whole_matrices
from tests import pool


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16), (1, 9), (9, 1)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    mapped = u.T @ newton_schulz(matrix) @ vh.T
    values = mapped.diagonal()
    # The quintic's fixed band: [0.68, 1.14] for singular values above 1 % of the norm.
    assert (values[s / s.norm() > 0.01] > 0.65).all()
    assert (values < 1.2).all()
    torch.testing.assert_close(mapped, values.diag(), atol=1e-9, rtol=0)


def test_scale_does_not_matter_and_zero_stays():
    matrix = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(newton_schulz(1e3 * matrix), newton_schulz(matrix))
    assert not newton_schulz(torch.zeros(3, 4)).any()


#: Shape and the dimension it is cut along; more than ranks, not a multiple, and unequal.
MATRICES = [((8, 6), 0), ((4, 8), 1), ((16, 4), 0), ((12, 12), 1), ((4, 4), 0)]


def wholes() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape, _ in MATRICES]


def transform_shards(rank: int, world_size: int) -> tuple[float, list[Any]]:
    calls: list[tuple[int, ...]] = []

    def transform(matrix: Tensor) -> Tensor:
        calls.append(tuple(matrix.shape))
        return newton_schulz(matrix)

    dims = [dim for _, dim in MATRICES]
    shards = [m.chunk(world_size, dim)[rank] for m, dim in zip(wholes(), dims, strict=True)]
    found = on_whole_matrices(transform, shards, dims, group=dist.group.WORLD)
    expected = [
        newton_schulz(m).chunk(world_size, dim)[rank] for m, dim in zip(wholes(), dims, strict=True)
    ]
    assert [f.shape for f in found] == [e.shape for e in expected]
    errors = [(f - e).abs().max().item() for f, e in zip(found, expected, strict=True)]
    return max(errors), calls


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_parts_equal_the_whole_and_the_work_is_shared(world_size):
    results = pool.run(world_size, transform_shards)
    assert max(error for error, _ in results) == 0.0
    calls = [call for _, calls in results for call in calls]
    assert sorted(calls) == sorted(shape for shape, _ in MATRICES)  # each once, whole
