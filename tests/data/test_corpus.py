"""The corpus's bytes, what damage is found where, and what a writer leaves behind."""

from __future__ import annotations

import errno
import json
import os
import pickle
import struct
import warnings
import zlib
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_replay.data.corpus import Corpus, Document, index_parts
from megatron_replay.data.corpus_writer import CorpusWriter
from megatron_replay.errors import DataError, OutputError
from tests import processes, tiny
from tests.data.examples import FACTS, PAD_ID, VOCAB_SIZE, random_documents, write_corpus

SUFFIXES = ("bin", "idx", "loss_mask", "json")


@pytest.fixture
def documents():
    return random_documents([2, 9, 5, 130, 3])


@pytest.fixture
def prefix(tmp_path):
    return tmp_path / "data.v1"  # a dot in the prefix is not a suffix


@pytest.fixture
def corpus(prefix, documents):
    return write_corpus(prefix, documents)


def file_of(prefix, suffix):
    return prefix.with_name(f"{prefix.name}.{suffix}")


def contents(prefix):
    return [file_of(prefix, suffix).read_bytes() for suffix in SUFFIXES]


def masked(tokens, *masks):
    return [Document(np.arange(len(m), dtype=np.int32) + tokens, np.array(m) > 0) for m in masks]


def refused(prefix, message, read=Corpus):
    with pytest.raises(DataError, match=message):
        read(prefix)


# -------------------------------------------------------------------------------- what is written
def test_round_trip(corpus, prefix, documents, tmp_path):
    assert len(corpus) == 5
    assert corpus.lengths.tolist() == [2, 9, 5, 130, 3]
    for i, document in enumerate(documents):
        assert (corpus[i].tokens.dtype, corpus[i].loss_mask.dtype) == (np.int32, np.bool_)
        np.testing.assert_array_equal(corpus[i].tokens, document.tokens)
        np.testing.assert_array_equal(corpus[i].loss_mask, document.loss_mask)
    with pytest.raises(IndexError):
        corpus[5]
    about = corpus.description
    assert (about.num_documents, about.num_tokens) == (5, 149)
    assert about.num_loss_tokens == sum(sum(d.loss_mask[1:].tolist()) for d in documents)
    assert (corpus.vocab_size, corpus.pad_id) == (VOCAB_SIZE, PAD_ID)
    assert about.max_token_id == max(d.tokens.max() for d in documents)
    assert about.tokenizer_files == FACTS.files
    assert corpus.tokenizer_fingerprint == FACTS.fingerprint
    corpus.verify()
    refused(tmp_path / "nothing", r"nothing.json: cannot read: No such file.*without .bin or .json")
    write_corpus(tmp_path / "again", documents)
    assert contents(tmp_path / "again") == contents(prefix)


def test_pickled_and_opened_again(corpus, prefix, documents, monkeypatch):
    monkeypatch.chdir(prefix.parent)
    sent = pickle.dumps(Corpus(prefix.name))
    monkeypatch.chdir("/")
    assert len(sent) < 1000
    np.testing.assert_array_equal(pickle.loads(sent)[3].tokens, documents[3].tokens)


def test_megatron_reads_and_would_write_the_token_pair(corpus, prefix, documents, tmp_path):
    with warnings.catch_warnings():  # about the torch it sits on
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    dataset = indexed_dataset.IndexedDataset(str(prefix), multimodal=False, mmap=True)
    assert dataset.document_indices.tolist() == list(range(len(documents) + 1))
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for read, document in zip(dataset, documents, strict=True):
        np.testing.assert_array_equal(read, document.tokens)
        assert read.dtype == np.int32
        builder.add_document(document.tokens, [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"theirs.{suffix}").read_bytes() == file_of(prefix, suffix).read_bytes()


def test_loss_mask_bytes_and_first_labels(tmp_path):
    corpus = write_corpus(tmp_path / "c", masked(0, [1, 0, 1, 1], [0, 1], [1, 0, 0], [0, 0, 0, 1]))
    assert corpus.first_labels.tolist() == [2, 1, 3, 3]
    assert corpus.first_labels.dtype == np.int32
    assert corpus[0].eligible_positions().tolist() == [1, 2]
    assert corpus[0].eligible_positions().dtype == np.int32
    masks = bytes([1, 0, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 1])
    tokens, starts = (tmp_path / "c.bin").read_bytes(), [0, 4, 6, 9, 13]
    crcs = [zlib.crc32(tokens[4 * a : 4 * b] + masks[a:b]) for a, b in pairwise(starts)]
    header = struct.pack("<8sQQ", b"MRLOSSMK", 2, 13)
    trailer = struct.pack("<4I4i", *crcs, 2, 1, 3, 3)
    whole = header + masks + trailer + struct.pack("<I", zlib.crc32(header + trailer))
    assert (tmp_path / "c.loss_mask").read_bytes() == whole


def test_fingerprint_sees_token_mask_and_boundary(tmp_path):
    variants = [
        masked(0, [0, 1, 1], [1, 0]),
        masked(1, [0, 1, 1], [1, 0]),
        masked(0, [0, 1, 1], [1, 1]),
        [Document(np.array([0, 1, 2, 0, 1], np.int32), np.array([0, 1, 1, 1, 0]) > 0)],
    ]
    written = [write_corpus(tmp_path / f"v{i}", v).fingerprint for i, v in enumerate(variants)]
    assert len(set(written)) == 4


# ------------------------------------------------------------------------------------- damage
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_another_size_or_kind_is_named_and_not_waited_for(corpus, prefix, suffix):
    path = file_of(prefix, suffix)
    size = path.stat().st_size
    for change in (-2, -7, 4):
        os.truncate(path, size + change)
        sizes = rf"{suffix}: .*expected {size} bytes; found {size + change} bytes"
        refused(prefix, "json: damaged: not JSON" if suffix == "json" else sizes)
    path.unlink()
    refused(prefix, rf"data.v1.{suffix}: cannot read: No such file.*tools/preprocess_data")
    os.mkfifo(path)
    refused(prefix, rf"{suffix}: cannot read .*regular file; found a pipe")


def read_all(corpus):
    return [corpus[i] for i in range(len(corpus))]


def label_all(corpus):
    documents_D, counts_D = np.arange(len(corpus)), corpus.lengths - 1
    positions_P = np.concatenate([np.arange(count) for count in counts_D])
    return corpus.labels(documents_D, counts_D, positions_P)


READS = (read_all, label_all, Corpus.verify)


@pytest.mark.parametrize(
    ("suffix", "read"),
    [
        *((suffix, read) for suffix in ("bin", "loss_mask") for read in READS),
        *((suffix, lambda corpus: None) for suffix in ("json", "idx")),
    ],
)
def test_every_flipped_bit_is_noticed_where_it_is_read(prefix, suffix, read):
    """A bit of each byte in turn."""
    write_corpus(prefix, random_documents([2, 5]))
    path = file_of(prefix, suffix)
    whole = path.read_bytes()
    for i in range(0, len(whole), 5 if suffix == "json" else 1):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :])
        refused(prefix, "tools/preprocess_data", lambda prefix: read(Corpus(prefix)))
    path.write_bytes(whole)
    read(Corpus(prefix))


def test_a_document_that_is_damaged_is_named_and_the_others_are_read(corpus, prefix, documents):
    content = np.fromfile(file_of(prefix, "bin"), "<i4")
    content[2 + 9] ^= 1
    content.tofile(file_of(prefix, "bin"))
    damaged = Corpus(prefix)
    message = r"data.v1: document 2 is damaged: the crc32"
    for _ in range(2):  # it stays so
        refused(2, message, damaged.__getitem__)
        refused(np.array([1, 2]), message, lambda d: damaged.labels(d, np.ones(2, int), d * 0))
    np.testing.assert_array_equal(damaged[3].tokens, documents[3].tokens)


@pytest.mark.parametrize("token", [-1, -(2**31), VOCAB_SIZE, 2**31 - 1])
def test_a_token_outside_the_vocabulary_is_named(prefix, token):
    """Also under checksums that fit."""
    documents = random_documents([4, 6])
    documents[1].tokens[5] = VOCAB_SIZE + 3
    write_corpus(prefix, documents, SimpleNamespace(**{**vars(FACTS), "vocab_size": 2**31 - 1}))
    tiny.change_description(prefix, vocab_size=VOCAB_SIZE, max_token_id=0)
    refused(1, r"document 1, position 5: token 90003 is outside", Corpus(prefix).__getitem__)
    content = np.fromfile(file_of(prefix, "bin"), "<i4")
    content[4 + 3] = token
    content.tofile(file_of(prefix, "bin"))
    corpus, message = Corpus(prefix), rf"document 1, position 3: token {token} is outside"
    refused(1, message, corpus.__getitem__)
    refused(corpus, message, label_all)
    corpus[0]


@pytest.mark.parametrize(
    ("num_documents", "num_tokens", "message"),
    [
        (5, 5 * (2**31 - 1), "the index is damaged"),  # lengths that do not add up
        (65, 1 << 37, "the index is damaged"),
        (2**31 - 1, 1 << 37, "the index is damaged"),  # another number in the index's header
        (1 << 36, 1 << 37, "the counts are damaged"),
    ],
)
def test_sizes_that_lie_are_refused_before_they_are_read(
    corpus, prefix, num_documents, num_tokens, message
):
    """Files of up to a terabyte, all holes: nothing of their size is read or allocated."""
    for suffix, size in (
        ("idx", 34 + 20 * num_documents + 8),
        ("bin", 4 * num_tokens),
        ("loss_mask", 24 + num_tokens + 8 * num_documents + 4),
    ):
        os.truncate(file_of(prefix, suffix), size)
    tiny.change_description(prefix, num_documents=num_documents, num_tokens=num_tokens)
    refused(prefix, message)
    with open(file_of(prefix, "idx"), "r+b") as handle:  # the header fits: the lengths are holes
        handle.seek(18)
        handle.write(struct.pack("<QQ", num_documents, num_documents + 1))
    refused(prefix, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, r"\(expected 2; found 3\)"),
        ({"version": 1}, r"\(expected 2; found 1\).*tools/preprocess_data"),
        ({"num_tokens": "149"}, "'num_tokens' is damaged .*found '149'"),
        ({"num_tokens": -149}, "the counts are damaged"),
        ({"num_documents": 0}, "the counts are damaged"),
        ({"num_documents": 2**31, "num_tokens": 2**33}, "the counts are damaged"),
        ({"max_token_id": VOCAB_SIZE}, "the counts are damaged"),
        ({"vocab_size": 2**31}, "the counts are damaged"),
        ({"num_loss_tokens": 149}, "the counts are damaged"),
        ({"pad_id": None}, "'pad_id' is damaged"),
        ({"tokenizer_files": []}, "'tokenizer_files' is damaged"),
        # Without a checksum that fits.
        ({"tokenizer_path": "x", "checksum": ""}, "data.v1.json: .*its own checksum differs"),
        ({"more": 1, "checksum": None}, "data.v1.json: .*its own checksum differs"),
    ],
)  # fmt: skip
def test_a_damaged_description(corpus, prefix, change, message):
    if "checksum" in change:
        path = file_of(prefix, "json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    else:
        tiny.change_description(prefix, **change)
    refused(prefix, message)


def test_an_index_that_lies_about_its_counts(corpus, prefix):
    path = file_of(prefix, "idx")
    content = bytearray(path.read_bytes())
    struct.pack_into("<ii", content, 34, 3, 8)  # same total, other boundary, same pointers
    path.write_bytes(content)
    refused(prefix, "the index is damaged")
    parts = index_parts(np.array([1, 10, 5, 130, 3], dtype=np.int32))  # consistent, and too short
    path.write_bytes(b"".join(parts))
    refused(prefix, "the index is damaged")


# ---------------------------------------------------------------------------- writing that fails
@pytest.mark.parametrize("error", [DataError("bad row"), KeyboardInterrupt()])
def test_a_failed_write_publishes_nothing_and_keeps_the_old_corpus(
    corpus, prefix, documents, error
):
    def failing():
        yield documents[0]
        raise error

    before = {path: path.read_bytes() for path in prefix.parent.iterdir()}
    for target in (prefix, prefix.parent / "new"):
        with pytest.raises(type(error)):
            write_corpus(target, failing())
        assert {path: path.read_bytes() for path in prefix.parent.iterdir()} == before


def test_the_second_of_two_writers_says_so(prefix, documents):
    def write():
        with CorpusWriter(prefix, FACTS, row_format="text", source={}) as second:
            second.add(documents[0])
            assert processes.wait(processes.fork(write_corpus, prefix, documents)) == 0

    with pytest.raises(OutputError, match="another process has written a corpus under this prefix"):
        write()
    assert Corpus(prefix).lengths.tolist() == [len(document) for document in documents]


def test_a_crash_while_publishing_leaves_no_mixture(corpus, prefix, documents, monkeypatch):
    """Once a file of the new corpus has replaced an old one, PREFIX.json is gone."""

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_replay.files.fsync_path", crash)  # right after the first rename
    with pytest.raises(KeyboardInterrupt):
        write_corpus(prefix, documents[:2])
    refused(prefix, "without .bin or .json")


def test_disk_full(tmp_path, documents, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("megatron_replay.files.os.fsync", full)
    with pytest.raises(OutputError, match="no space left"):
        write_corpus(tmp_path / "c", documents)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([0, VOCAB_SIZE]), r"outside the vocabulary .*found 0 to 90000"),
        (np.array([-1, 0]), r"outside the vocabulary .*found -1 to 0"),
        (np.array([0]), "needs two tokens"),
        (np.broadcast_to(0, 2**31), r"more than a corpus can hold .*of 2147483648 tokens"),
        (None, "no document to write"),
    ],
)
def test_documents_that_cannot_be_in_a_corpus(tmp_path, tokens, message):
    documents = []
    if tokens is not None:
        documents.append(Document(tokens, np.broadcast_to(np.True_, len(tokens))))  # no memory
    refused(tmp_path / "c", message, lambda prefix: write_corpus(prefix, documents))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.json", b'{"prompt": "a", "completion": "b"}\n'),
        ("c.json", b""),
        ("c.json", b'{"version": 3, "num_documents": 4}'),
        ("c.bin", b"tokens of somebody's"),
        ("c.idx", b"MMIDIDX\0\0"),
        ("c.loss_mask", b"another mask"),
    ],
)
def test_a_file_that_is_not_ours_is_not_replaced(tmp_path, documents, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OutputError, match=rf"{name}: a file is here"):
        write_corpus(tmp_path / "c", documents)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, content)]


@pytest.mark.parametrize(
    "missing", [("json",), ("loss_mask",), ("bin", "idx"), ("json", "idx"), ()]
)
def test_what_is_left_of_a_corpus_is_replaced(corpus, prefix, documents, missing):
    """By a run that was killed, say: either of two files proves whose the others are."""
    tiny.change_description(prefix, version=1)  # even an older one
    for suffix in missing:
        file_of(prefix, suffix).unlink()
    assert len(write_corpus(prefix, documents[:2])) == 2
