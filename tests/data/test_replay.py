"""The join against dictionaries filled one token at a time."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.data.corpus import Document
from megatron_replay.data.packing import PackedBatch, forest_of, pack_batch
from megatron_replay.data.replay import full_targets, join_candidates
from megatron_replay.errors import StoreError
from megatron_replay.store import CandidateBatch, DocumentCandidates
from megatron_replay.store.document import missing_label
from tests.data.examples import PAD_ID, VOCAB_SIZE, random_documents

SEQ_LENGTH = 10
SCOPES = ("position", "document")


class Documents(list):
    """A corpus in memory."""

    pad_id = PAD_ID

    @property
    def first_labels(self) -> np.ndarray:
        masks = (document.loss_mask for document in self)
        return np.array([np.append(np.append(False, mask[1:]), True).argmax() for mask in masks])


class Recorded(list):
    """A store in memory; its candidates' logits are their ids over 8."""

    def read(self, document_ids, *, logits) -> CandidateBatch:
        batch = CandidateBatch.of([self[i] for i in document_ids])
        if logits:
            batch.__dict__["logits"] = (batch.ids / 8).astype(np.float32)
        return batch


def record(positions, sets, **changes) -> DocumentCandidates:
    fields = {
        "positions": np.array(positions, dtype=np.int32),
        "offsets": np.cumsum([0, *map(len, sets)], dtype=np.int64),
        "ids": np.array([i for s in sets for i in s], dtype=np.int32),
        "label_logprob": np.zeros(len(positions), dtype=np.float32),
        "lse": np.arange(len(positions), dtype=np.float32),
        "tail_mass": np.zeros(len(positions), dtype=np.float32),
        "logits": None,
    }
    return DocumentCandidates(**{**fields, **changes})


def random_record(document: Document, rng, share: float) -> DocumentCandidates:
    """Random sets with the label at a random share of the eligible positions."""
    positions = [int(t) for t in document.eligible_positions() if rng.random() < share]
    sets = [
        sorted({int(document.tokens[t + 1]), *rng.integers(0, 40, rng.integers(0, 6)).tolist()})
        for t in positions
    ]
    lse, tail_mass = rng.normal(size=len(sets)), rng.choice([0.0, 0.25, 0.5], size=len(sets))
    return record(positions, sets, lse=lse.astype("f4"), tail_mass=tail_mass.astype("f4"))


def alike(documents: list[Document], size: int) -> list[Document]:
    """The same, but that all begin with the first ``size`` tokens of the first, without loss."""
    for document in documents:
        stop = min(size, len(document), len(documents[0]))
        document.tokens[:stop] = documents[0].tokens[:stop]
        document.loss_mask[:stop] = False
    return documents


def batch_of(corpus, ids, lengths, *, share: bool) -> PackedBatch:
    ids, lengths = np.array(ids, np.int64), np.array(lengths, np.int32)
    return pack_batch(corpus, forest_of(corpus, ids, lengths, share=share), lengths, multiple=4)


def slow_join(batch, recorded):
    """One row of the batch at a time, from the columns a model sees.

    (row, label, lse, tail, set, the document's place, union of the document's sets) of each.
    """
    found, forest = [], batch.forest
    places = np.repeat(np.arange(len(forest)), forest.own_D)
    columns = (places, batch.position_T[: len(places)], batch.label_T[: len(places)])
    for row, (place, position, label) in enumerate(
        zip(*(column.tolist() for column in columns), strict=True)
    ):
        candidates = recorded[forest.document_D[place]]
        for i in np.flatnonzero(candidates.positions == position).tolist():
            lse, tail_mass = float(candidates.lse[i]), float(candidates.tail_mass[i])
            own = candidates.ids[candidates.offsets[i] : candidates.offsets[i + 1]].tolist()
            tail = lse + math.log(tail_mass) if tail_mass else -math.inf
            union = sorted(set(candidates.ids.tolist()))
            found.append((row, label, lse, tail, own, place, union))
    return found


def as_sets(sets):
    offsets, ids = sets.offsets.tolist(), sets.ids.tolist()
    assert (offsets[0], offsets[-1]) == (0, len(ids))
    return [ids[a:b] for a, b in pairwise(offsets)]


def join(batch, source, scope="position", **options):
    return join_candidates(batch, source, vocab_size=VOCAB_SIZE, scope=scope, **options)


@given(
    st.lists(st.integers(2, 16), max_size=8),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from(SCOPES),
    st.sampled_from([0, 3, 9]),
    st.booleans(),
    st.integers(0, 10_000),
)
@settings(deadline=None)
def test_join_against_dictionaries(lengths, share, scope, common, share_prefixes, seed):
    """Documents of up to 16 tokens, of which 11 are used, some of them twice in the batch; the
    first ones are ``common`` to all.
    """
    rng = np.random.default_rng(seed)
    documents = Documents(alike(random_documents(lengths, seed), common))
    recorded = Recorded(random_record(document, rng, share) for document in documents)
    ids = rng.integers(0, len(lengths), rng.integers(0, 7)) if lengths else []
    used = np.minimum(np.array(lengths, dtype=np.int32), SEQ_LENGTH + 1)
    batch = batch_of(documents, ids, used, share=share_prefixes)
    labels, has_loss = batch.label_T.tolist(), batch.loss_mask_T.tolist()
    eligible = [(row, label) for row, label in enumerate(labels) if has_loss[row]]
    rows_N, labels_N = full_targets(batch)
    assert list(zip(rows_N.tolist(), labels_N.tolist(), strict=True)) == eligible
    assert rows_N.dtype == labels_N.dtype == torch.int64
    expected = slow_join(batch, recorded)
    got = join(batch, recorded, scope, logits=True)
    assert got.rows_N.tolist() == [row for row, *_ in expected]
    assert got.sets.labels_N.tolist() == [label for _, label, *_ in expected]
    assert got.lse_N.tolist() == [lse for _, _, lse, *_ in expected]
    tail = torch.tensor([tail for *_, tail, _, _, _ in expected], dtype=torch.float32)
    torch.testing.assert_close(got.tail_logit_N, tail)
    own = [own for *_, own, _, _ in expected]
    assert as_sets(got.own_sets) == own
    assert got.own_sets.values.tolist() == [i / 8 for ids in own for i in ids]
    if scope == "position":
        assert (as_sets(got.sets), got.sets.group_offsets) == (own, None)
    else:
        unions = {place: union for *_, place, union in expected}
        counts = [sum(place == own for *_, own, _ in expected) for place in unions]
        assert as_sets(got.sets) == list(unions.values())
        assert got.sets.group_offsets.tolist() == np.cumsum([0, *counts]).tolist()
        assert got.sets.group_offsets.dtype == torch.int64
    assert got.rows_N.dtype == got.sets.labels_N.dtype == got.sets.offsets.dtype == torch.int64
    assert got.sets.ids.dtype == torch.int32
    assert got.lse_N.dtype == got.tail_logit_N.dtype == torch.float32


#: Positions 1 and 2 carry loss, position 0 can be shared.
DOCUMENT = Document(np.array([3, 4, 5, 6], dtype=np.int32), np.array([0, 0, 1, 1]) > 0)


def one_document(positions=(1, 2), sets=((4, 5), (2, 6)), length=4):
    batch = batch_of(Documents([DOCUMENT]), [0], [length], share=True)
    return batch, Recorded([record(positions, sets)])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        # Its label is in the union.
        ({"sets": ((5, 6), (2, 5))}, "document 0, position 2: the label 6 is not in its"),
        ({"sets": ((2, 6), (5, 6))}, "document 0, position 1: the label 5 is not in its"),
        ({"positions": (0, 2)}, "document 0, position 0 is recorded, but its label carries no"),
    ],
)
def test_a_store_of_other_data_is_refused(scope, change, message):
    join(*one_document(), scope)
    with pytest.raises(StoreError, match=message):
        join(*one_document(**change), scope)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_document_that_shares_its_first_position(scope):
    """Its own positions follow the other's, and a record at the shared one is refused: in its place
    would be a row of the other, whose label may well be in the set.
    """
    batch = batch_of(Documents([DOCUMENT, DOCUMENT]), [1, 0], [4, 4], share=True)
    assert batch.token_T[:5].tolist() == [3, 4, 5, 4, 5]
    first = record((1, 2), ((4, 5), (2, 6)))
    assert join(batch, Recorded([first, first]), scope).rows_N.tolist() == [1, 2, 3, 4]
    other = record((0, 2), ((5, 6), (5, 6)))
    with pytest.raises(StoreError, match="document 1, position 0 is recorded, but its label"):
        join(batch, Recorded([first, other]), scope)


@given(
    st.lists(st.sets(st.integers(0, 300), min_size=1, max_size=256), max_size=12),
    st.integers(0, 10_000),
)
@settings(deadline=None)
def test_missing_label_against_python(sets, seed):
    """Labels in their set, beside it, below and above all of it."""
    rng = np.random.default_rng(seed)
    labels = [int(rng.choice(sorted(s))) for s in sets]
    ids = np.array([i for s in sets for i in sorted(s)], dtype=np.int32)
    offsets = np.cumsum([0, *map(len, sets)], dtype=np.int64)
    assert missing_label(ids, offsets, np.array(labels, dtype=np.int64)) == -1
    for place in rng.permutation(len(sets))[:3]:
        labels[place] = int(rng.integers(-1, 302))
        missing = [n for n, s in enumerate(sets) if labels[n] not in s]
        found = missing_label(ids, offsets, np.array(labels, dtype=np.int64))
        assert found == (missing[0] if missing else -1)


def test_nothing_is_copied_where_nothing_is_cut_off():
    batch, store = one_document()
    recorded = store.read([0], logits=False)
    store.read = lambda *_, **__: recorded
    targets = join(batch, store)
    assert np.shares_memory(targets.sets.ids.numpy(), recorded.ids)
    assert np.shares_memory(targets.sets.offsets.numpy(), recorded.offsets)
