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
from megatron_replay.data.packing import fit_documents, pack_batch
from megatron_replay.data.replay import SCOPES, eligible_rows, full_targets, join_candidates
from megatron_replay.data.sampler import GlobalBatches
from megatron_replay.errors import StoreError
from megatron_replay.store import (
    CandidateBatch,
    CandidateReader,
    CandidateWriter,
    DocumentCandidates,
    StoreDescription,
    missing_label,
)
from tests.data.examples import PAD_ID, VOCAB_SIZE, random_documents, write_corpus

SEQ_LENGTH = 10


class Documents(list):
    """A corpus in memory."""

    pad_id = PAD_ID


class Recorded(list):
    """A store in memory."""

    def read(self, document_ids, *, logits=True) -> CandidateBatch:
        return CandidateBatch.of([self[i] for i in document_ids])


def record(document: Document, rng: np.random.Generator, share: float) -> DocumentCandidates:
    """Random sets with the label at a random share of the eligible positions."""
    positions = [int(t) for t in document.eligible_positions() if rng.random() < share]
    sets = []
    for t in positions:
        others = rng.integers(0, 40, size=rng.integers(0, 6)).tolist()
        sets.append(sorted({int(document.tokens[t + 1]), *others}))
    count = len(positions)
    return DocumentCandidates(
        positions=np.array(positions, dtype=np.int32),
        offsets=np.cumsum([0, *map(len, sets)], dtype=np.int64),
        ids=np.array([i for s in sets for i in s], dtype=np.int32),
        lse=rng.normal(size=count).astype(np.float16).astype(np.float32),
        label_logprob=np.zeros(count, dtype=np.float32),
        tail_mass=rng.choice([0.0, 0.25, 0.5], size=count).astype(np.float32),
        logits=None,
    )


def as_dictionary(candidates: DocumentCandidates):
    """{position: (set, lse, tail mass)}."""
    return {
        int(t): (
            candidates.ids[candidates.offsets[i] : candidates.offsets[i + 1]].tolist(),
            float(candidates.lse[i]),
            float(candidates.tail_mass[i]),
        )
        for i, t in enumerate(candidates.positions)
    }


def slow_join(batch, recorded, scope):
    """One row of the batch at a time, from the columns a model sees."""
    rows, labels, sets, groups, lse, tail = [], [], [], [], [], []
    num_rows, width = batch.tokens_BS.shape
    last = None
    for b in range(num_rows):
        for s in range(width):
            document = int(batch.document_BS[b, s])
            position = int(batch.position_BS[b, s])
            if document < 0 or position not in recorded[document]:
                continue
            candidate_set, lse_t, tail_mass = recorded[document][position]
            rows.append(b * width + s)
            labels.append(int(batch.labels_BS[b, s]))
            lse.append(lse_t)
            tail.append(lse_t + math.log(tail_mass) if tail_mass else -math.inf)
            if scope == "position":
                sets.append(candidate_set)
                continue
            place = (document, s - position, b)
            if place != last:
                last = place
                sets.append(sorted({i for ids, *_ in recorded[document].values() for i in ids}))
                groups.append(0)
            groups[-1] += 1
    return rows, labels, sets, groups, lse, tail


def join(batch, source, scope="position"):
    return join_candidates(batch, source, vocab_size=VOCAB_SIZE, scope=scope)


def assert_joined(batch, candidates, scope, recorded=None):
    recorded = [as_dictionary(c) for c in recorded or candidates]
    rows, labels, sets, groups, lse, tail = slow_join(batch, recorded, scope)
    got = join_candidates(batch, candidates, vocab_size=VOCAB_SIZE, scope=scope)
    assert got.rows_N.tolist() == rows
    joined = got.sets
    assert joined.labels_N.tolist() == labels
    offsets, ids = joined.offsets.tolist(), joined.ids.tolist()
    assert [ids[a:b] for a, b in pairwise(offsets)] == sets
    assert (offsets[0], offsets[-1]) == (0, len(ids))
    if scope == "position":
        assert joined.group_offsets is None
    else:
        assert joined.group_offsets.tolist() == np.cumsum([0, *groups]).tolist()
        assert joined.group_offsets.dtype == torch.int64
    assert got.lse_N.tolist() == lse
    torch.testing.assert_close(got.tail_logit_N, torch.tensor(tail, dtype=torch.float32))
    assert got.rows_N.dtype == joined.labels_N.dtype == joined.offsets.dtype == torch.int64
    assert joined.ids.dtype == torch.int32
    assert got.lse_N.dtype == got.tail_logit_N.dtype == torch.float32


@given(
    st.lists(st.integers(2, 16), min_size=1, max_size=8),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from(SCOPES),
    st.integers(0, 10_000),
)
@settings(deadline=None)
def test_join_against_dictionaries(lengths, share, scope, seed):
    rng = np.random.default_rng(seed)
    documents = Documents(random_documents(lengths, seed))
    candidates = Recorded(record(document, rng, share) for document in documents)
    used = fit_documents(np.array(lengths, dtype=np.int32), SEQ_LENGTH, "truncate").lengths
    sampler = GlobalBatches(
        used, seq_length=SEQ_LENGTH, global_batch_size=3, micro_batch_size=3,
        seed=seed, epochs=2, dp_rank=0, dp_size=1,
    )  # fmt: skip
    for k in range(sampler.num_batches):  # a batch may hold a document of both epochs
        (packs,) = sampler.micro_batches(k)
        assert_joined(pack_batch(documents, packs, SEQ_LENGTH, used), candidates, scope)


@pytest.mark.parametrize("scope", SCOPES)
def test_join_from_files(tmp_path, scope):
    """Corpus and store on disk, read through their own readers."""
    documents = random_documents([5, 11, 16, 3], seed=3)
    corpus = write_corpus(tmp_path / "corpus", documents)
    rng = np.random.default_rng(0)
    candidates = Recorded(record(document, rng, 1.0) for document in documents)
    description = StoreDescription(
        vocab_size=VOCAB_SIZE, num_documents=4, documents_per_shard=2,
        codec="planar", logits="none",
        corpus_fingerprint=corpus.fingerprint, tokenizer_fingerprint="t",
        checkpoint_fingerprint="c", selection={},
    )  # fmt: skip
    with CandidateWriter(tmp_path / "store", description) as writer:
        for shard_number in writer.missing_shards():
            with writer.shard(shard_number) as shard:
                for i in (2 * shard_number, 2 * shard_number + 1):
                    shard.add(i, candidates[i])
        writer.finish()
    used = fit_documents(corpus.lengths, SEQ_LENGTH, "truncate").lengths
    packs = [np.array([0, 3]), np.array([2]), np.array([1])]
    batch = pack_batch(corpus, packs, SEQ_LENGTH, used)
    assert_joined(batch, candidates, scope)
    reader = CandidateReader(tmp_path / "store")
    assert_joined(batch, reader, scope, recorded=candidates)


def one_document(**change):
    document = Document(np.array([3, 4, 5, 6], dtype=np.int32), np.array([0, 0, 1, 1]) > 0)
    fields = {
        "positions": np.array([1, 2], dtype=np.int32),
        "offsets": np.array([0, 2, 4], dtype=np.int64),
        "ids": np.array([4, 5, 2, 6], dtype=np.int32),
        "lse": np.array([1, 2], dtype=np.float32),
        "label_logprob": np.zeros(2, dtype=np.float32),
        "tail_mass": np.zeros(2, dtype=np.float32),
        "logits": None,
    }
    candidates = DocumentCandidates(**{**fields, **change})
    batch = pack_batch(Documents([document]), [np.array([0])], 6, np.array([4], dtype=np.int32))
    return batch, Recorded([candidates])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("ids", "position", "label"), [([5, 6, 2, 5], 2, 6), ([2, 6, 5, 6], 1, 5)])
def test_a_label_outside_its_set_is_refused_even_if_in_the_union(scope, ids, position, label):
    batch, store = one_document()
    join(batch, store, scope=scope)
    batch, store = one_document(ids=np.array(ids, dtype=np.int32))
    message = f"document 0, position {position}: the label {label} is not in its"
    with pytest.raises(StoreError, match=message):
        join(batch, store, scope=scope)


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
    recorded = store.read([0])

    class Once:
        def read(self, document_ids, *, logits=False):
            assert document_ids == [0]
            return recorded

    targets = join(batch, Once(), scope="position")
    assert np.shares_memory(targets.sets.ids.numpy(), recorded.ids)
    assert np.shares_memory(targets.sets.offsets.numpy(), recorded.offsets)


def test_a_recorded_position_without_loss_is_refused():
    batch, store = one_document(positions=np.array([0, 2], dtype=np.int32))
    with pytest.raises(StoreError, match="document 0, position 0 is recorded, but its label"):
        join(batch, store, scope="position")


def test_a_union_includes_positions_that_truncation_cut_off():
    """Of positions 1 and 2, the second is cut off."""
    documents = Documents([one_document()[0]])
    documents[0] = Document(np.array([3, 4, 5, 6], dtype=np.int32), np.array([0, 0, 1, 1]) > 0)
    _, store = one_document()
    batch = pack_batch(documents, [np.array([0])], 2, np.array([3], dtype=np.int32))
    targets = join(batch, store, scope="document")
    assert targets.rows_N.tolist() == [1]
    assert targets.sets.ids.tolist() == [2, 4, 5, 6]
    assert join(batch, store).sets.ids.tolist() == [4, 5]


def test_an_empty_batch():
    empty = pack_batch(Documents(), [np.empty(0, dtype=np.int64)], 4, np.empty(0, dtype=np.int32))
    targets = join(empty, Recorded(), scope="document")
    assert len(targets.rows_N) == len(targets.sets.ids) == 0
    assert targets.sets.offsets.tolist() == targets.sets.group_offsets.tolist() == [0]
    assert [len(t) for t in full_targets(empty)] == [0, 0]


def test_full_targets_are_the_positions_whose_label_carries_loss():
    documents = Documents(random_documents([5, 4, 7], seed=2))
    packs = [np.array([1, 0]), np.array([2])]
    batch = pack_batch(documents, packs, SEQ_LENGTH, np.array([5, 4, 7], dtype=np.int32))
    expected = [
        (b * SEQ_LENGTH + start + int(t), int(documents[i].tokens[t + 1]))
        for b, i, start in ((0, 1, 0), (0, 0, 3), (1, 2, 0))
        for t in documents[i].eligible_positions()
    ]
    rows_N, labels_N = full_targets(batch)
    assert list(zip(rows_N.tolist(), labels_N.tolist(), strict=True)) == expected
    assert eligible_rows(batch).tolist() == rows_N.tolist()
    assert rows_N.dtype == labels_N.dtype == torch.int64
