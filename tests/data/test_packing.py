"""Packing and batches against what they promise, for lengths that hypothesis chooses."""

from __future__ import annotations

import re
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
    pack_batch,
    plan_packs,
    report_long_documents,
)
from megatron_replay.errors import ConfigError, DataError
from tests.data.examples import PAD_ID, as_lists, random_documents, write_corpus

SEQ_LENGTH = 12
ANY_SPEED = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
lengths_lists = st.lists(st.integers(2, SEQ_LENGTH + 1), min_size=1, max_size=40)


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


def test_order_is_a_permutation_that_seed_and_epoch_decide():
    """It never changes: a run that resumes under another release must see the same order."""
    orders = {
        (seed, epoch): document_order(50, seed=seed, epoch=epoch).tolist()
        for seed in (0, 1, 2**40)
        for epoch in range(3)
    }
    assert len(set(map(tuple, orders.values()))) == len(orders)
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert document_order(8, seed=1234, epoch=0).tolist() == [1, 6, 2, 0, 3, 5, 7, 4]


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


def test_pack_batch_against_the_definition(tmp_path):
    documents = random_documents([4, 6, 20, 3, 13], seed=1)
    corpus = write_corpus(tmp_path / "c", documents)
    packs = [np.array(p, dtype=np.int64) for p in ([3, 1, 0], [2], [])]
    batch = pack_batch(corpus, packs, SEQ_LENGTH, np.minimum(corpus.lengths, SEQ_LENGTH + 1))
    for b, pack in enumerate(packs):
        rows = []
        for i in pack.tolist():
            tokens, loss_mask = documents[i].tokens.tolist(), documents[i].loss_mask.tolist()
            for t in range(min(len(tokens), SEQ_LENGTH + 1) - 1):
                rows.append((tokens[t], tokens[t + 1], loss_mask[t + 1], i, t))
        rows += [(PAD_ID, PAD_ID, False, -1, 0)] * (SEQ_LENGTH - len(rows))
        columns = (
            batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS,
            batch.document_BS, batch.position_BS,
        )  # fmt: skip
        assert list(zip(*(column[b].tolist() for column in columns), strict=True)) == rows
    assert batch.tokens_BS.dtype == batch.labels_BS.dtype == torch.int64
    assert batch.loss_mask_BS.dtype == torch.bool
    assert batch.document_BS.dtype == batch.position_BS.dtype == torch.int32


def batches(lengths, *, gbs=4, mbs=1, epochs=3, dp_rank=0, dp_size=1):
    return GlobalBatches(
        np.array(lengths, dtype=np.int32),
        seq_length=SEQ_LENGTH,
        global_batch_size=gbs,
        micro_batch_size=mbs,
        seed=5,
        epochs=epochs,
        dp_rank=dp_rank,
        dp_size=dp_size,
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
    padded = stream[:num_packs] + [[]] * (-num_packs % gbs)
    numbers = list(range(sampler.num_batches))
    random.shuffle(numbers)
    for k in numbers:
        assert as_lists(sampler.global_batch(k)) == padded[k * gbs :][:gbs]
    for k in random.sample(range(len(stream) // 4), min(len(stream) // 4, 5)):
        assert as_lists(endless.global_batch(k)) == stream[4 * k :][:4]
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


@pytest.mark.parametrize(("gbs", "mbs", "dp_size"), [(6, 4, 1), (6, 1, 4), (8, 4, 4), (0, 1, 1)])
def test_a_global_batch_that_cannot_be_shared_out(gbs, mbs, dp_size):
    message = rf"^--global-batch-size: .*expected a multiple of {mbs * dp_size} .*found {gbs}\)"
    with pytest.raises(ConfigError, match=message):
        batches([5], gbs=gbs, mbs=mbs, dp_size=dp_size)
