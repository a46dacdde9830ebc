"""Sets cut to a shard, transposed and joined in blocks, against Python's own sets."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.loss.blocks import Blocks
from megatron_replay.loss.candidate_sets import CandidateSets, unions

V = 150_000  # more than 16 bits hold


SIZES = pytest.mark.parametrize(("num_sets", "largest"), [(200, 300), (40, 1), (0, 1)])


def random_sets(
    num_sets: int, largest: int, *, groups: bool = False
) -> tuple[list[list[int]], CandidateSets]:
    """Random sets, some empty, and the same as ``CandidateSets`` with a value for each candidate.

    With ``groups`` each is two positions' own.
    """
    rng = np.random.default_rng(num_sets)
    sets = [np.unique(rng.integers(0, V, rng.integers(0, largest))) for _ in range(num_sets)]
    borders = [0, V // 4 - 1, V // 4, V // 2 - 1, V // 2, V - 1]
    sets = [np.union1d(s, borders) if number % 3 == 1 else s for number, s in enumerate(sets)]
    ids = np.concatenate([np.empty(0, np.int64), *sets]).astype(np.int32)
    offsets = np.cumsum([0, *map(len, sets)])
    labels_N = rng.integers(0, V, num_sets * (1 + groups))
    labels_N[: len(borders)] = borders[: len(labels_N)]
    shared = np.arange(0, len(labels_N) + 1, 2) if groups else None
    values = ids.astype(np.float32)
    made = CandidateSets.of(ids, offsets, labels_N, shared, vocab_size=V, values=values)
    return [s.tolist() for s in sets], made


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize(("start", "rows"), [(0, V), (V // 2, V // 2), (V // 4, V // 4)])
@SIZES
def test_a_cut_keeps_the_rows_of_the_shard(num_sets, largest, start, rows, groups):
    sets, whole = random_sets(num_sets, largest, groups=groups)
    cut = whole.shard(start, rows)
    expected = [[i - start for i in s if start <= i < start + rows] for s in sets]
    assert [cut.ids[a:b].tolist() for a, b in pairwise(cut.offsets.tolist())] == expected
    labels = cut.labels_N.tolist()
    label_rows = [i - start if start <= i < start + rows else -1 for i in labels]
    assert labels == whole.labels_N.tolist()
    assert cut.label_rows_N.tolist() == label_rows
    assert cut.values.tolist() == [i + start for s in expected for i in s]
    assert cut.largest == max(map(len, expected), default=0)
    assert (cut.vocab_start, cut.num_rows) == (start, rows)
    assert (cut.ids.dtype, cut.offsets.dtype) == (torch.int32, torch.int64)
    assert cut.label_rows_N.dtype == torch.int64


@SIZES
def test_the_transpose_has_every_pair_by_id_then_by_position(num_sets, largest):
    sets, whole = random_sets(num_sets, largest)
    order, positions, rows, offsets = (part.tolist() for part in whole.with_transpose().transpose)
    pairs = [(i, n) for n, s in enumerate(sets) for i in s]
    expected = sorted(pairs)
    assert [pairs[place] for place in order] == expected
    assert positions == [n for _, n in expected]
    assert rows == sorted({i for i, _ in pairs})
    found = [[expected[p][0] for p in range(a, b)] for a, b in pairwise(offsets)]
    assert all(set(ids) == {row} for ids, row in zip(found, rows, strict=True))
    assert offsets[-1] == len(pairs)


def test_shared_sets_have_no_transpose():
    assert random_sets(5, 9, groups=True)[1].with_transpose().transpose is None


def test_what_moves_still_knows_the_host():
    sets = random_sets(5, 9)[1].shard(0, V).with_transpose()
    moved = sets.moved(torch.Tensor.clone)
    assert moved.transpose.order is not sets.transpose.order
    assert torch.equal(moved.transpose.order, sets.transpose.order)
    assert moved.host is sets.host
    assert moved.largest == sets.largest


@given(
    st.lists(st.lists(st.sets(st.integers(0, 40), max_size=6), max_size=9), max_size=5),
    st.integers(1, 4),
)
@settings(deadline=None)
def test_unions_and_blocks_against_sets(documents, block):
    sets = [sorted(s) for document in documents for s in document]
    ids = np.array([i for s in sets for i in s], np.int32)
    offsets = np.cumsum([0, *map(len, sets)]).astype(np.int64)
    bounds = np.cumsum([0, *map(len, documents)])
    spans = [(offsets[a], offsets[b]) for a, b in pairwise(bounds)]
    expected = [sorted(set().union(*document)) for document in documents]
    assert [union.tolist() for union in unions(ids, spans)] == expected
    labels_N = np.zeros(len(sets), np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Blocks, "POSITIONS", block)
        blocks = Blocks.of(CandidateSets.of(ids, offsets, labels_N, vocab_size=41))
    found = {}
    for positions, rows, pairs in blocks.spans:
        union = blocks.rows[rows].tolist()
        assert union == sorted(set().union(*sets[positions]))
        for place in blocks.places[pairs].tolist():
            n, column = divmod(place, len(union))
            found.setdefault(positions.start + n, []).append(union[column])
    assert found == {n: s for n, s in enumerate(sets) if s}
