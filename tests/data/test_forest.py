"""A forest of documents against a plain trie of their shareable tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_replay.data.forest import Forest, plant, stems, without_sharing
from tests.forests import Documents, Tokens, documents


def shareable(corpus: Documents, document: int) -> Tokens:
    """The tokens of the positions before the first whose label carries loss."""
    stop = min(int(corpus.first_labels[document]), int(corpus.lengths[document])) - 1
    return tuple(corpus[document].tokens[:stop].tolist())


def computed_in_a_trie(corpus: Documents, documents: list[int]) -> int:
    """A node a distinct shareable prefix, and every other position by itself."""
    nodes = {
        prefix[: size + 1]
        for prefix in (shareable(corpus, d) for d in documents)
        for size in range(len(prefix))
    }
    others = sum(int(corpus.lengths[d]) - 1 - len(shareable(corpus, d)) for d in documents)
    return len(nodes) + others


def planted(corpus: Documents) -> Forest:
    return plant(corpus, corpus.numbers, corpus.lengths)  # type: ignore[arg-type]


@given(documents())
def test_a_forest_computes_each_shareable_prefix_once(corpus: Documents) -> None:
    forest = planted(corpus)
    assert sorted(forest.document_D) == list(range(len(corpus.lengths)))
    assert forest.positions == int((corpus.lengths - 1).sum())
    assert forest.computed == computed_in_a_trie(corpus, forest.document_D.tolist())
    previous: Tokens = ()
    for document, shared in zip(forest.document_D, forest.shared_D, strict=True):
        tokens = shareable(corpus, document)
        assert tokens[:shared] == previous[:shared]
        assert len(tokens) >= shared <= len(previous)
        previous = tokens


@given(documents(), st.integers(0, 30))
def test_packs_cover_the_documents_in_order_within_capacity(corpus: Documents, spare: int) -> None:
    forest = planted(corpus)
    capacity = int(forest.positions_D.max()) + spare
    packs = forest.cut(capacity)
    assert np.array_equal(np.concatenate([p.document_D for p in packs]), forest.document_D)
    for pack, following in zip(packs, [*packs[1:], None], strict=True):
        assert len(pack) > 0
        assert pack.shared_D[0] == 0
        assert pack.computed == computed_in_a_trie(corpus, pack.document_D.tolist())
        assert pack.computed <= capacity
        if following is not None:  # the next document would not have fitted
            both = [*pack.document_D.tolist(), int(following.document_D[0])]
            assert computed_in_a_trie(corpus, both) > capacity


@given(documents(), st.integers(0, 30), st.integers(1, 4))
def test_balanced_cut_are_as_even_as_consecutive_ones_can_be(
    corpus: Documents, spare: int, multiple: int
) -> None:
    forest = planted(corpus)
    capacity = int(forest.positions_D.max()) + spare
    packs = forest.balanced_cut(capacity, multiple)
    fewest = len(forest.cut(capacity))
    assert len(packs) == -(-fewest // multiple) * multiple
    assert np.array_equal(np.concatenate([p.document_D for p in packs]), forest.document_D)
    largest = max(pack.computed for pack in packs)
    if largest > int(forest.positions_D.max()):
        assert len(forest.cut(largest - 1)) > len(packs)
    sizes = [len(pack) for pack in packs]
    assert sizes == sorted(sizes, key=bool, reverse=True), "empty ones come last"


def groups(stem_D: np.ndarray) -> list[list[int]]:
    """The documents of each stem."""
    return sorted(np.flatnonzero(stem_D == stem).tolist() for stem in np.unique(stem_D))


@given(documents(), st.sets(st.integers(0, 11)))
def test_a_stem_is_a_run_of_the_forest(corpus: Documents, left_out: set[int]) -> None:
    """A document that is left out is one by itself."""
    lengths = corpus.lengths.copy()
    none = sorted(left_out & set(range(len(lengths))))
    lengths[none] = 0
    forest = plant(corpus, corpus.numbers, lengths)  # type: ignore[arg-type]
    stem_D = stems(corpus, lengths)  # type: ignore[arg-type]
    assert stem_D.min() >= 0
    runs = np.split(forest.document_D, np.flatnonzero(np.diff(stem_D[forest.document_D])) + 1)
    expected = [sorted(run.tolist()) for run in runs if len(run)] + [[d] for d in none]
    assert groups(stem_D) == sorted(expected)


def test_no_document_is_a_forest_too() -> None:
    corpus = Documents([((1, 2, 3), 1)])
    forest = without_sharing(np.empty(0, np.int64), corpus.lengths)
    assert (len(forest), forest.computed) == (0, 0)
    assert [len(pack) for pack in forest.balanced_cut(8, 2)] == [0, 0]
    assert forest.cut(8) == []


def test_documents_left_out_and_documents_cut() -> None:
    corpus = Documents([((1, 2, 3, 4, 5), 4), ((1, 2, 3, 4, 6), 4), ((1, 2, 9, 9), 3)])
    lengths = np.array([5, 3, 0], np.int32)  # the second keeps two positions, the third nothing
    forest = plant(corpus, np.arange(3), lengths)  # type: ignore[arg-type]
    assert forest.document_D.tolist() == [1, 0]
    assert forest.positions_D.tolist() == [2, 4]
    assert forest.shared_D.tolist() == [0, 2]


@pytest.mark.parametrize("sharing", [True, False])
def test_equal_documents_share_all_but_their_losses(sharing: bool) -> None:
    corpus = Documents([((7, 8, 9, 1), 3)] * 3)
    ids = np.array([2, 0, 1])
    make = planted(corpus) if sharing else without_sharing(ids, corpus.lengths)
    assert make.document_D.tolist() == ([0, 1, 2] if sharing else [2, 0, 1])
    assert make.own_D.tolist() == ([3, 1, 1] if sharing else [3, 3, 3])


def rows_of(*parts: tuple[int, int], documents: int) -> list[tuple[int, ...]]:
    """Documents of parts (how many tokens, shared by how many documents in turn)."""
    made = []
    for document in range(documents):
        row: list[int] = []
        for number, (size, together) in enumerate(parts):
            first = 1000 * number + document // together * 7
            row += [first + place for place in range(size)]
        made.append(tuple(row))
    return made


def test_stems_are_schemas_behind_a_system_prompt_and_before_long_answers():
    """System prompt 30, schema 20, question 5, answer 40; three documents of each schema."""
    rows = rows_of((30, 9), (20, 3), (5, 1), (40, 1), documents=9)
    corpus = Documents([(row, 55) for row in rows])
    stem_D = stems(corpus, corpus.lengths)  # type: ignore[arg-type]
    assert [len(set(stem_D[first : first + 3])) for first in (0, 3, 6)] == [1, 1, 1]
    assert len(set(stem_D)) == 3


def test_little_in_common_is_not_shared():
    """Behind a common beginning of 3 tokens, 60 of their own: 1/16 of 63 positions is 3.9."""
    for common, computed in ((3, 2 * 63), (4, 4 + 2 * 60)):
        rows = rows_of((common, 2), (61, 1), documents=2)
        corpus = Documents([(row, common + 60) for row in rows])
        assert planted(corpus).computed == computed
