"""Packing and batches against what they promise, for lengths that hypothesis chooses."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_replay.data.packing import (
    document_order,
    fit_documents,
    pack_batch,
    plan_packs,
    report_long_documents,
)
from megatron_replay.data.sampler import GlobalBatches
from megatron_replay.errors import ConfigError, DataError
from tests.data.examples import PAD_ID, random_documents, write_corpus

SEQ_LENGTH = 12
ANY_SPEED = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
lengths_lists = st.lists(st.integers(2, SEQ_LENGTH + 1), min_size=1, max_size=40)


def next_fit(lengths, order, seq_length):
    """The definition, one document at a time."""
    packs, room = [], 0
    for document in order:
        if not packs or lengths[document] - 1 > room:
            packs.append([])
            room = seq_length
        packs[-1].append(document)
        room -= lengths[document] - 1
    return packs


@given(lengths_lists, st.integers(0, 2**32), st.integers(0, 50))
@ANY_SPEED
def test_packs_hold_every_document_once_within_capacity(lengths, seed, epoch):
    lengths_D = np.array(lengths, dtype=np.int32)
    order = document_order(len(lengths), seed=seed, epoch=epoch)
    packs = plan_packs(lengths_D, order, SEQ_LENGTH)
    assert [p.tolist() for p in packs] == next_fit(lengths, order.tolist(), SEQ_LENGTH)
    assert np.concatenate(packs).tolist() == order.tolist()
    assert all((lengths_D[pack] - 1).sum() <= SEQ_LENGTH for pack in packs)


@given(st.lists(st.sampled_from([0, 2, 5]), min_size=1, max_size=20))
@ANY_SPEED
def test_dropped_documents_are_in_no_pack(lengths):
    lengths_D = np.array(lengths, dtype=np.int32)
    packs = plan_packs(lengths_D, np.arange(len(lengths)), SEQ_LENGTH)
    packed = [i for pack in packs for i in pack.tolist()]
    assert packed == [i for i, n in enumerate(lengths) if n > 0]


def test_order_is_a_permutation_that_seed_and_epoch_decide():
    orders = {
        (seed, epoch): tuple(document_order(50, seed=seed, epoch=epoch).tolist())
        for seed in (0, 1, 2**40)
        for epoch in range(3)
    }
    assert len(set(orders.values())) == len(orders)
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    for (seed, epoch), order in orders.items():
        np.random.seed(3)  # global state must not matter
        assert tuple(document_order(50, seed=seed, epoch=epoch).tolist()) == order


def test_order_never_changes():
    """A run that resumes under another release must see the same order."""
    assert document_order(8, seed=1234, epoch=0).tolist() == [1, 6, 2, 0, 3, 5, 7, 4]


def test_long_documents():
    lengths_D = np.array([5, 13, 14, 20, 2], dtype=np.int32)
    message = (
        r"2 of 5 documents .*document 2 \(expected at most 13 tokens for --seq-length 12; "
        r"found 14 tokens\)"
    )
    with pytest.raises(DataError, match=message):
        fit_documents(lengths_D, SEQ_LENGTH, "error")
    dropped = fit_documents(lengths_D, SEQ_LENGTH, "drop")
    assert dropped.lengths.tolist() == [5, 13, 0, 0, 2]
    assert (dropped.num_dropped, dropped.num_truncated, dropped.num_tokens_lost) == (2, 0, 34)
    cut = fit_documents(lengths_D, SEQ_LENGTH, "truncate")
    assert cut.lengths.tolist() == [5, 13, 13, 13, 2]
    assert (cut.num_dropped, cut.num_truncated, cut.num_tokens_lost) == (0, 2, 8)
    short = fit_documents(lengths_D, 19, "error")
    assert short.lengths.tolist() == lengths_D.tolist()
    with pytest.raises(DataError, match="would leave no document"):
        fit_documents(lengths_D[2:4], SEQ_LENGTH, "drop")


def test_documents_that_lose_every_label_are_counted_and_none_left_is_refused():
    lengths_D = np.array([5, 20, 20, 20], dtype=np.int32)
    first_labels = np.array([3, 12, 13, 19], dtype=np.int32)
    cut = fit_documents(lengths_D, SEQ_LENGTH, "truncate", first_labels)
    assert (cut.num_truncated, cut.num_unlabelled) == (3, 2)
    assert fit_documents(lengths_D, SEQ_LENGTH, "drop", first_labels).num_unlabelled == 0
    with pytest.raises(DataError, match=r"no answer token is left.*at least 13 tokens"):
        fit_documents(lengths_D[2:], SEQ_LENGTH, "truncate", first_labels[2:])


@pytest.mark.parametrize(
    ("seq_length", "policy", "numbers"),
    [
        (SEQ_LENGTH, "drop", [2, 3, 34]),
        (SEQ_LENGTH, "truncate", [2, 3, 8, 1]),
        (19, "drop", []),
    ],
)
def test_what_is_left_out_is_printed(capsys, seq_length, policy, numbers):
    lengths_D, first_labels = np.array([[5, 14, 20], [1, 1, 13]], dtype=np.int32)
    fitted = fit_documents(lengths_D, seq_length, policy, first_labels)
    report_long_documents(fitted, policy)
    err = capsys.readouterr().err
    assert [int(number) for number in re.findall(r"\b\d+\b", err)] == numbers
    assert policy in err or not numbers


def test_pack_batch_against_the_definition(tmp_path):
    documents = random_documents([4, 6, 20, 3, 13], seed=1)
    corpus = write_corpus(tmp_path / "c", documents)
    lengths_D = fit_documents(corpus.lengths, SEQ_LENGTH, "truncate").lengths
    packs = [np.array(p, dtype=np.int64) for p in ([3, 1, 0], [2], [])]
    batch = pack_batch(corpus, packs, SEQ_LENGTH, lengths_D)

    for b, pack in enumerate(packs):
        rows = []
        for i in pack.tolist():
            tokens, loss_mask = documents[i].tokens.tolist(), documents[i].loss_mask.tolist()
            for t in range(min(len(tokens), SEQ_LENGTH + 1) - 1):
                rows.append((tokens[t], tokens[t + 1], loss_mask[t + 1], i, t))
        rows += [(PAD_ID, PAD_ID, False, -1, 0)] * (SEQ_LENGTH - len(rows))
        got = zip(
            batch.tokens_BS[b].tolist(),
            batch.labels_BS[b].tolist(),
            batch.loss_mask_BS[b].tolist(),
            batch.document_BS[b].tolist(),
            batch.position_BS[b].tolist(),
            strict=True,
        )
        assert list(got) == rows
    assert batch.tokens_BS.dtype == batch.labels_BS.dtype == torch.int64
    assert batch.loss_mask_BS.dtype == torch.bool
    assert batch.document_BS.dtype == batch.position_BS.dtype == torch.int32


def batches(lengths, *, gbs=4, mbs=1, seed=5, epochs=3, dp_rank=0, dp_size=1):
    return GlobalBatches(
        np.array(lengths, dtype=np.int32),
        seq_length=SEQ_LENGTH,
        global_batch_size=gbs,
        micro_batch_size=mbs,
        seed=seed,
        epochs=epochs,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )


def as_lists(packs):
    return [pack.tolist() for pack in packs]


@given(lengths_lists, st.integers(1, 5), st.integers(1, 3))
@ANY_SPEED
def test_global_batches_are_the_epochs_end_to_end(lengths, gbs, epochs):
    sampler = batches(lengths, gbs=gbs, epochs=epochs)
    stream = [p for k in range(sampler.num_batches) for p in as_lists(sampler.global_batch(k))]
    expected = []
    for epoch in range(epochs):
        order = document_order(len(lengths), seed=5, epoch=epoch).tolist()
        expected += next_fit(lengths, order, SEQ_LENGTH)
    empty = -len(expected) % gbs
    assert stream == expected + [[]] * empty
    with pytest.raises(IndexError):
        sampler.global_batch(sampler.num_batches)


@given(lengths_lists, st.sampled_from([(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 2)]))
@settings(ANY_SPEED, max_examples=60)
def test_ranks_share_out_the_same_micro_batches(lengths, layout):
    mbs, dp_size = layout
    alone = batches(lengths, gbs=8, mbs=mbs)
    ranks = [batches(lengths, gbs=8, mbs=mbs, dp_rank=r, dp_size=dp_size) for r in range(dp_size)]
    for k in range(alone.num_batches):
        whole = [as_lists(m) for m in alone.micro_batches(k)]
        assert [pack for m in whole for pack in m] == as_lists(alone.global_batch(k))
        for r, rank in enumerate(ranks):
            assert [as_lists(m) for m in rank.micro_batches(k)] == whole[r::dp_size]


@given(lengths_lists, st.randoms(use_true_random=False))
@ANY_SPEED
def test_batch_k_does_not_depend_on_what_was_asked_before(lengths, random):
    fresh = batches(lengths)
    ks = list(range(fresh.num_batches))
    in_order = [as_lists(fresh.global_batch(k)) for k in ks]
    random.shuffle(ks)
    jumping = batches(lengths)
    for k in ks:
        assert as_lists(jumping.global_batch(k)) == in_order[k]


@given(lengths_lists, st.integers(1, 5))
def test_without_an_end_epochs_follow_each_other_and_no_batch_is_padded(lengths, gbs):
    """As under --train-iters: what --train-epochs gives, and then further epochs, shuffled anew."""
    endless, three = batches(lengths, gbs=gbs, epochs=None), batches(lengths, gbs=gbs, epochs=3)
    for k in range(three.num_batches - 1):
        assert as_lists(endless.global_batch(k)) == as_lists(three.global_batch(k))
    held: list[int] = []
    for k in range(three.num_batches + 5):
        packs = as_lists(endless.global_batch(k))
        assert all(packs)
        held += [document for pack in packs for document in pack]
    size = len(lengths)
    epochs = [held[i : i + size] for i in range(0, len(held) - size + 1, size)]
    assert len(epochs) > 2
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert epochs[3:4] != epochs[2:3] or size < 6


def test_more_epochs_only_append():
    lengths = [3, 9, 13, 5, 2, 8, 8, 4]
    few, many = batches(lengths, gbs=2, epochs=1), batches(lengths, gbs=2, epochs=4)
    for k in range(few.num_batches - 1):
        assert as_lists(few.global_batch(k)) == as_lists(many.global_batch(k))


@pytest.mark.parametrize(("gbs", "mbs", "dp_size"), [(6, 4, 1), (6, 1, 4), (8, 4, 4), (0, 1, 1)])
def test_a_global_batch_that_cannot_be_shared_out(gbs, mbs, dp_size):
    message = rf"^--global-batch-size: .*expected a multiple of {mbs * dp_size} .*found {gbs}\)"
    with pytest.raises(ConfigError, match=message):
        batches([5], gbs=gbs, mbs=mbs, dp_size=dp_size)
