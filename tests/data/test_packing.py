"""Packing and batches against what they promise, for lengths that hypothesis chooses."""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import chain, groupby
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_replay.data.loader import GlobalBatches
from megatron_replay.data.packing import (
    document_order,
    fit_documents,
    forest_of,
    pack_batch,
    plan_packs,
    report_long_documents,
)
from megatron_replay.errors import DataError
from tests import forests
from tests.data.examples import PAD_ID, as_lists, random_documents, write_corpus
from tests.tiny import save_corpus

SEQ_LENGTH = 12
ANY_SPEED = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
lengths_lists = st.lists(st.integers(2, SEQ_LENGTH + 1), min_size=1, max_size=40)


def joined(lists):
    return list(chain.from_iterable(lists))


def next_fit(lengths, order, together=True):
    """The definition, one document at a time; length 0: the document is left out."""
    packs, room = [], 0
    for document in (document for document in order if lengths[document]):
        if not packs or lengths[document] - 1 > room or not together:
            packs.append([])
            room = SEQ_LENGTH
        packs[-1].append(document)
        room -= lengths[document] - 1
    return packs


@given(st.lists(st.sampled_from([0, 2, 3, 5, 12, 13]), max_size=40), st.booleans(), st.integers(0))
@ANY_SPEED
def test_packs_hold_every_document_once_within_capacity(lengths, together, seed):
    lengths_D = np.array(lengths, dtype=np.int32)
    order = document_order(len(lengths), seed=seed, epoch=0)
    packs = plan_packs(lengths_D, order, SEQ_LENGTH, together=together)
    assert as_lists(packs) == next_fit(lengths, order.tolist(), together)
    assert all((lengths_D[pack] - 1).sum() <= SEQ_LENGTH for pack in packs)


@pytest.mark.parametrize(
    "options", [{}, {"stem_D": np.arange(50) % 3, "group": 4}], ids=["alone", "in groups"]
)
def test_order_is_a_permutation_that_seed_and_epoch_decide(options):
    orders = {
        (seed, epoch): document_order(50, seed=seed, epoch=epoch, **options).tolist()
        for seed in (0, 1, 2**40)
        for epoch in range(3)
    }
    assert len(set(map(tuple, orders.values()))) == len(orders)
    assert all(sorted(order) == list(range(50)) for order in orders.values())


def test_the_order_never_changes():
    """A run that resumes under another release must see the same."""
    assert document_order(8, seed=1234, epoch=0).tolist() == [1, 6, 2, 0, 3, 5, 7, 4]
    stem_D = np.array([4, 0, 4, 0, 4, 4, 0, 2])
    order = document_order(8, seed=1234, epoch=0, stem_D=stem_D, group=2)
    assert order.tolist() == [1, 2, 4, 0, 5, 3, 6, 7]


@given(st.lists(st.integers(0, 4), max_size=30), st.integers(1, 5), st.integers(0, 99))
@ANY_SPEED
def test_up_to_a_group_of_one_stem_come_together(stems, group, seed):
    """So each stem comes in whole groups, and what is left over."""
    stem_D = np.array(stems, np.int64)
    order = document_order(len(stems), seed=seed, epoch=1, stem_D=stem_D, group=group)
    assert sorted(order.tolist()) == list(range(len(stems)))
    left = defaultdict(list)
    for stem, run in groupby(stem_D[order].tolist()):
        left[stem] += [len(list(run)) % group]
    for stem, remainders in left.items():
        assert sorted(remainders)[-1] == sum(remainders) == stems.count(stem) % group
    if group == 1:
        assert order.tolist() == document_order(len(stems), seed=seed, epoch=1).tolist()


def test_groups_are_drawn_anew_and_come_in_any_order():
    """Not by stem, nor in the same company in every epoch."""
    stem_D, seen = np.arange(60) % 3, set()
    for epoch in range(2):
        order = document_order(60, seed=0, epoch=epoch, stem_D=stem_D, group=4).reshape(-1, 4)
        seen |= {frozenset(group) for group in order.tolist()}
        stems = stem_D[order[:, 0]]
        assert (np.diff(stems) != 0).sum() > 2
    assert len(seen) == 30


# The last two have no label.
LENGTHS, FIRST_LABELS = np.array([[5, 13, 14, 20, 20, 9, 20], [1, 4, 12, 13, 19, 9, 20]], np.int32)


def fit(policy, documents=slice(None), seq_length=SEQ_LENGTH):
    corpus = SimpleNamespace(
        prefix="c", lengths=LENGTHS[documents], first_labels=FIRST_LABELS[documents]
    )
    return fit_documents(corpus, SimpleNamespace(seq_length=seq_length, long_documents=policy))


@pytest.mark.parametrize(
    ("policy", "seq_length", "lengths", "counts", "printed"),
    [
        # (dropped, truncated, without a label, tokens lost), and the numbers that are printed
        ("drop", SEQ_LENGTH, [5, 13, 0, 0, 0, 9, 0], (4, 0, 0, 74), [4, 7, 74]),
        ("truncate", SEQ_LENGTH, [5, 13, 13, 13, 13, 9, 13], (0, 4, 2, 22), [4, 7, 22, 2]),
        ("drop", 19, LENGTHS, (0, 0, 0, 0), []),
        ("error", 19, LENGTHS, (0, 0, 0, 0), []),
    ],
)
def test_long_documents(capsys, policy, seq_length, lengths, counts, printed):
    fitted = fit(policy, seq_length=seq_length)
    assert fitted.lengths.tolist() == list(lengths)
    found = (fitted.num_dropped, fitted.num_truncated, fitted.num_unlabelled)
    assert (*found, fitted.num_tokens_lost) == counts
    report_long_documents(fitted, policy)
    err = capsys.readouterr().err
    assert [int(number) for number in re.findall(r"\b\d+\b", err)] == printed
    assert policy in err or not printed


@pytest.mark.parametrize(
    ("policy", "documents", "message"),
    [
        (
            "error",
            slice(0, 7),
            r"c: 4 of 7 .* \(expected at most 13 .*12; found 20 tokens in document 3",
        ),
        ("drop", slice(2, 5), "would leave no document .*at most 13 tokens; found at least 14"),
        ("truncate", slice(3, 5), r"no answer token is left.*at least 13 tokens"),
    ],
)
def test_long_documents_that_leave_nothing_are_refused(policy, documents, message):
    with pytest.raises(DataError, match=message):
        fit(policy, documents)


def check_batch(corpus, documents, lengths, *, share, multiple):
    """Packed, ``documents`` are each read along its path: the first positions of the path before,
    then its own rows.
    """
    ids = np.array(documents, np.int64)
    batch = pack_batch(
        corpus, forest_of(corpus, ids, lengths, share=share), lengths, multiple=multiple
    )
    forest = batch.forest
    assert sorted(forest.document_D) == sorted(d for d in documents if lengths[d])
    assert share or not forest.shared_D.any()
    path, paths, row = [], [], 0
    for place, document in enumerate(forest.document_D.tolist()):
        used, shared = corpus[document], forest.shared_D[place]
        tokens, has_loss = (x[: lengths[document]] for x in (used.tokens, used.loss_mask))
        own = range(row, row + len(tokens) - 1 - shared)
        path, row = [*path[:shared], *own], own.stop
        paths += [path] if own else []
        assert batch.token_T[path].tolist() == tokens[:-1].tolist()
        assert batch.position_T[path].tolist() == list(range(len(path)))
        assert batch.label_T[own].tolist() == tokens[shared + 1 :].tolist()
        assert batch.loss_mask_T[own].tolist() == has_loss[shared + 1 :].tolist()
        assert not has_loss[1 : shared + 1].any()
        assert list(own) == [batch.first_row_D[place] + p for p in range(shared, len(path))]
    columns = batch.token_T, batch.label_T, batch.loss_mask_T, batch.position_T
    length = len(batch.token_T)
    assert length % multiple == 0 < length
    assert row == forest.computed > length - multiple or row == 0 == length - multiple
    padding = [(corpus.pad_id, corpus.pad_id, False, 0)] * (length - row)
    assert list(zip(*(x[row:].tolist() for x in columns), strict=True)) == padding
    assert [x.dtype for x in columns] == [torch.int64, torch.int64, torch.bool, torch.int32]
    attended = batch.documents
    assert attended.rows == row
    assert attended.path_stops == np.cumsum([len(path) for path in paths], dtype=int).tolist()
    rows = np.arange(row) if attended.path_rows is None else attended.path_rows
    assert rows.tolist() == joined(paths)


@given(forests.documents(), st.integers(2, 12), st.booleans(), st.integers(1, 4), st.data())
@ANY_SPEED
def test_pack_batch_against_the_documents(corpus, longest, share, multiple, data):
    """Some truncated, some left out, some twice."""
    corpus.pad_id = PAD_ID
    lengths = np.minimum(corpus.lengths, longest)
    ids = st.sampled_from(corpus.numbers.tolist())
    lengths[data.draw(st.lists(ids, max_size=2))] = 0
    documents = data.draw(st.lists(ids, max_size=15))
    check_batch(corpus, documents, lengths, share=share, multiple=multiple)


@pytest.mark.parametrize("share", [True, False])
def test_pack_batch_of_a_corpus_on_disk(tmp_path, share):
    corpus = write_corpus(tmp_path / "random", random_documents([4, 6, 20, 3, 13], seed=1))
    lengths = np.minimum(corpus.lengths, SEQ_LENGTH + 1)
    check_batch(corpus, [3, 1, 0, 2], lengths, share=share, multiple=2)
    corpus = save_corpus(tmp_path / "alike", num_documents=20, stems=3)
    check_batch(corpus, range(20), corpus.lengths, share=share, multiple=8)


def batches(lengths, *, gbs=4, epochs=3, **options):
    return GlobalBatches(
        np.array(lengths, dtype=np.int32),
        seq_length=SEQ_LENGTH,
        global_batch_size=gbs,
        seed=5,
        epochs=epochs,
        **options,
    )


@given(lengths_lists, st.integers(1, 5), st.integers(1, 3), st.randoms(use_true_random=False))
@ANY_SPEED
def test_global_batches_are_the_epochs_end_to_end(lengths, gbs, epochs, random):
    """Whatever was requested before; without an end, further epochs follow, shuffled anew."""
    sampler, endless = batches(lengths, gbs=gbs, epochs=epochs), batches(lengths, epochs=None)
    stream = []
    for epoch in range(epochs + 4 * gbs):
        if epoch == epochs:
            num_packs = len(stream)
        order = document_order(len(lengths), seed=5, epoch=epoch).tolist()
        stream += next_fit(lengths, order)
    assert sampler.num_batches == -(-num_packs // gbs)
    numbers = list(range(sampler.num_batches))
    random.shuffle(numbers)
    for k in numbers:
        assert sampler.documents(k).tolist() == joined(stream[:num_packs][k * gbs :][:gbs])
    for k in random.sample(range(len(stream) // 4), min(len(stream) // 4, 5)):
        assert endless.documents(k).tolist() == joined(stream[4 * k :][:4])
    for k in (-1, sampler.num_batches):
        with pytest.raises(IndexError):
            sampler.documents(k)


@given(
    st.lists(st.sampled_from([0, 2, 5, 13]), min_size=1).filter(any),
    st.integers(1, 5),
    st.integers(1, 3),
    st.booleans(),
)
@ANY_SPEED
def test_an_epoch_has_every_document_once(lengths, gbs, group, together):
    """In groups or not, in packs or each by itself; then the number of a batch is that of its
    documents.
    """
    stem_D = np.arange(len(lengths)) // 4
    sampler = batches(
        lengths, gbs=gbs, epochs=1, pack_documents=together, stem_D=stem_D, group=group
    )
    found = [sampler.documents(k).tolist() for k in range(sampler.num_batches)]
    order = document_order(len(lengths), seed=5, epoch=0, stem_D=stem_D, group=group)
    assert joined(found) == [d for d in order.tolist() if lengths[d]]
    assert together or all(len(documents) == gbs for documents in found[:-1])


def test_documents_that_share_nothing_keep_their_order():
    corpus = forests.Documents([((9, 8, 7), 1), ((3, 2, 1, 0), 2), ((3, 3, 3), 2)])
    order = np.array([2, 0, 1])
    assert forest_of(corpus, order[:2], corpus.lengths, share=True).document_D.tolist() == [2, 0]
    assert forest_of(corpus, order, corpus.lengths, share=True).document_D.tolist() == [0, 1, 2]
