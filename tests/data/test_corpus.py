from __future__ import annotations

import errno
import json
import os
import pickle
import struct
import warnings
import zlib
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


@pytest.fixture(scope="module")
def indexed_dataset():
    """Megatron's own reader and writer; importing them warns about the torch they sit on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def contents(prefix):
    return [prefix.with_name(f"{prefix.name}.{suffix}").read_bytes() for suffix in SUFFIXES]


def test_round_trip(corpus, documents):
    assert len(corpus) == 5
    assert corpus.lengths.tolist() == [2, 9, 5, 130, 3]
    for i, document in enumerate(documents):
        assert corpus[i].tokens.dtype == np.int32
        assert corpus[i].loss_mask.dtype == np.bool_
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


def test_megatron_reads_and_would_write_the_token_pair(
    corpus, prefix, documents, tmp_path, indexed_dataset
):
    dataset = indexed_dataset.IndexedDataset(str(prefix), multimodal=False, mmap=True)
    assert dataset.document_indices.tolist() == list(range(len(documents) + 1))
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for read, document in zip(dataset, documents, strict=True):
        np.testing.assert_array_equal(read, document.tokens)
        assert read.dtype == np.int32
        builder.add_document(document.tokens, [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    ours_bin, ours_idx, *_ = contents(prefix)
    assert (tmp_path / "theirs.bin").read_bytes() == ours_bin
    assert (tmp_path / "theirs.idx").read_bytes() == ours_idx


def test_loss_mask_bytes(tmp_path):
    write_corpus(tmp_path / "c", [Document(np.arange(3, dtype=np.int32), np.arange(3) > 0)])
    header = b"MRLOSSMK" + (2).to_bytes(8, "little") + (3).to_bytes(8, "little")
    crc = zlib.crc32((tmp_path / "c.bin").read_bytes() + b"\0\1\1").to_bytes(4, "little")
    trailer = crc + (1).to_bytes(4, "little")
    whole = header + b"\0\1\1" + trailer + zlib.crc32(header + trailer).to_bytes(4, "little")
    assert (tmp_path / "c.loss_mask").read_bytes() == whole


def test_first_labels(tmp_path):
    masks = [[1, 0, 1, 1], [0, 1], [1, 0, 0], [0, 0, 0, 0, 1]]
    documents = [
        Document(np.arange(len(mask), dtype=np.int32), np.array(mask, np.bool_)) for mask in masks
    ]
    corpus = write_corpus(tmp_path / "c", documents)
    assert corpus.first_labels.tolist() == [2, 1, 3, 4]
    assert corpus.first_labels.dtype == np.int32


def test_eligible_positions_are_those_whose_next_token_carries_loss():
    document = Document(np.arange(6, dtype=np.int32), np.array([1, 0, 1, 1, 0, 1], dtype=np.bool_))
    assert document.eligible_positions().tolist() == [1, 2, 4]
    assert document.eligible_positions().dtype == np.int32


def test_same_documents_same_bytes(corpus, prefix, documents, tmp_path):
    again = write_corpus(tmp_path / "again", documents)
    assert contents(tmp_path / "again") == contents(prefix)
    assert again.fingerprint == corpus.fingerprint


def test_fingerprint_sees_token_mask_and_boundary(corpus, documents, tmp_path):
    tokens, mask = documents[1].tokens.copy(), documents[1].loss_mask.copy()
    tokens[3] ^= 1
    mask[3] ^= True
    joined = Document(
        np.concatenate([documents[0].tokens, documents[1].tokens]),
        np.concatenate([documents[0].loss_mask, documents[1].loss_mask]),
    )
    variants = [
        [documents[0], Document(tokens, documents[1].loss_mask), *documents[2:]],
        [documents[0], Document(documents[1].tokens, mask), *documents[2:]],
        [joined, *documents[2:]],
    ]
    fingerprints = {write_corpus(tmp_path / f"v{i}", v).fingerprint for i, v in enumerate(variants)}
    assert len(fingerprints | {corpus.fingerprint}) == 4


@pytest.mark.parametrize("suffix", ["bin", "idx", "loss_mask"])
@pytest.mark.parametrize("change", [-1, -7, 4])
def test_another_size_is_named_in_bytes(corpus, prefix, suffix, change):
    path = prefix.with_name(f"data.v1.{suffix}")
    size = path.stat().st_size
    os.truncate(path, size + change)
    with pytest.raises(
        DataError, match=rf"{suffix}: .*expected {size} bytes; found {size + change} bytes"
    ):
        Corpus(prefix)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_is_missing_or_a_pipe_is_named_and_not_waited_for(corpus, prefix, suffix):
    path = prefix.with_name(f"data.v1.{suffix}")
    path.unlink()
    with pytest.raises(DataError, match=rf"data.v1.{suffix}: cannot read: No such file"):
        Corpus(prefix)
    os.mkfifo(path)
    with pytest.raises(DataError, match=rf"{suffix}: cannot read .*regular file; found a pipe"):
        Corpus(prefix)


def read_all(corpus):
    return [corpus[i] for i in range(len(corpus))]


def label_all(corpus):
    documents_D, counts_D = np.arange(len(corpus)), corpus.lengths - 1
    positions_P = np.concatenate([np.arange(count) for count in counts_D])
    return corpus.labels(documents_D, counts_D, positions_P)


def flips(path, step=1):
    """Damage a bit of every ``step``-th byte in turn; the file is whole again at the end."""
    whole = path.read_bytes()
    for i in range(0, len(whole), step):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :])
        yield
    path.write_bytes(whole)


@pytest.mark.parametrize("read", [read_all, label_all, Corpus.verify])
def test_every_flipped_bit_is_noticed_where_it_is_read(prefix, read):
    """Of the tokens, masks, checksums and first labels."""
    write_corpus(prefix, random_documents([2, 5]))
    for path in (prefix.with_name(f"data.v1.{suffix}") for suffix in ("bin", "loss_mask")):
        for _ in flips(path):
            with pytest.raises(DataError):
                read(Corpus(prefix))
    read(Corpus(prefix))


@pytest.mark.parametrize(("suffix", "step"), [("json", 5), ("idx", 1)])
def test_every_flipped_bit_is_noticed_when_a_corpus_is_opened(corpus, prefix, suffix, step):
    for _ in flips(prefix.with_name(f"data.v1.{suffix}"), step):
        with pytest.raises(DataError):
            Corpus(prefix)


def test_a_document_that_is_damaged_is_named_and_the_others_are_read(corpus, prefix, documents):
    path = prefix.with_name("data.v1.bin")
    content = bytearray(path.read_bytes())
    content[4 * (2 + 9)] ^= 1
    path.write_bytes(content)
    damaged = Corpus(prefix)
    for _ in range(2):  # it stays so
        with pytest.raises(DataError, match=r"data.v1: document 2 is damaged: the crc32"):
            damaged[2]
        with pytest.raises(DataError, match=r"data.v1: document 2 is damaged: the crc32"):
            damaged.labels(np.array([1, 2]), np.array([1, 1]), np.array([0, 0]))
    np.testing.assert_array_equal(damaged[3].tokens, documents[3].tokens)


@pytest.mark.parametrize("token", [-1, -(2**31), VOCAB_SIZE, 2**31 - 1])
def test_a_token_outside_the_vocabulary_is_named(prefix, token):
    write_corpus(prefix, random_documents([4, 6]))
    content = np.fromfile(prefix.with_name("data.v1.bin"), "<i4")
    content[4 + 3] = token
    content.tofile(prefix.with_name("data.v1.bin"))
    corpus = Corpus(prefix)
    for read in (lambda: corpus[1], lambda: label_all(corpus)):
        with pytest.raises(DataError, match=rf"document 1, position 3: token {token} is outside"):
            read()
    corpus[0]


def test_a_token_outside_the_vocabulary_under_checksums_that_fit(prefix):
    documents = random_documents([4, 6])
    documents[1].tokens[5] = VOCAB_SIZE + 3
    larger = SimpleNamespace(**{**vars(FACTS), "vocab_size": VOCAB_SIZE + 9})
    assert write_corpus(prefix, documents, tokenizer=larger)[1].tokens[5] == VOCAB_SIZE + 3
    tiny.change_description(prefix, vocab_size=VOCAB_SIZE, max_token_id=0)
    with pytest.raises(DataError, match=r"document 1, position 5: token 90003 is outside"):
        Corpus(prefix)[1]


def claim(prefix, num_documents, num_tokens):
    """Let sparse files claim to be a corpus of this size, and PREFIX.json as well."""
    sizes = {
        "idx": 34 + 20 * num_documents + 8,
        "bin": 4 * num_tokens,
        "loss_mask": 24 + num_tokens + 8 * num_documents + 4,
    }
    for suffix, size in sizes.items():
        with open(prefix.with_name(f"data.v1.{suffix}"), "r+b") as handle:
            handle.truncate(size)
    tiny.change_description(prefix, num_documents=num_documents, num_tokens=num_tokens)


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
    claim(prefix, num_documents, num_tokens)
    with pytest.raises(DataError, match=message):
        Corpus(prefix)
    idx = prefix.with_name("data.v1.idx")
    with open(idx, "r+b") as handle:  # the header fits: the lengths are holes
        handle.seek(18)
        handle.write(struct.pack("<QQ", num_documents, num_documents + 1))
    with pytest.raises(DataError, match=message):
        Corpus(prefix)


def test_pickled_and_opened_again(corpus, prefix, documents, monkeypatch):
    monkeypatch.chdir(prefix.parent)
    sent = pickle.dumps(Corpus(prefix.name))
    monkeypatch.chdir("/")
    assert len(sent) < 1000
    again = pickle.loads(sent)
    assert again.fingerprint == corpus.fingerprint
    np.testing.assert_array_equal(again[3].tokens, documents[3].tokens)


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
    ],
)
def test_a_damaged_description(corpus, prefix, change, message):
    tiny.change_description(prefix, **change)
    with pytest.raises(DataError, match=message):
        Corpus(prefix)


@pytest.mark.parametrize("change", [{"tokenizer_path": "other"}, {"source": {"a": 1}}, {"more": 1}])
def test_a_description_that_was_edited(corpus, prefix, change):
    path = prefix.with_name("data.v1.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=r"data.v1.json: damaged: its own checksum differs"):
        Corpus(prefix)


def test_no_corpus_and_no_json(tmp_path):
    with pytest.raises(DataError, match=r"nothing.json: cannot read: No such file.*let it finish"):
        Corpus(tmp_path / "nothing")
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        Corpus(tmp_path / "c")


def test_an_index_that_lies_about_its_counts(corpus, prefix):
    path = prefix.with_name("data.v1.idx")
    content = bytearray(path.read_bytes())
    struct.pack_into("<ii", content, 34, 3, 8)  # same total, other boundary, same pointers
    path.write_bytes(content)
    with pytest.raises(DataError, match="the index is damaged"):
        Corpus(prefix)
    path.write_bytes(
        b"".join(index_parts(np.array([1, 10, 5, 130, 3], dtype=np.int32)))
    )  # consistent
    with pytest.raises(DataError, match="the index is damaged"):
        Corpus(prefix)


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
    import megatron_replay.files as files

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "fsync_path", crash)  # right after the first rename
    with pytest.raises(KeyboardInterrupt):
        write_corpus(prefix, documents[:2])
    with pytest.raises(DataError, match="let it finish"):
        Corpus(prefix)


def test_disk_full(tmp_path, documents, monkeypatch):
    import megatron_replay.files as files

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OutputError, match="no space left"):
        write_corpus(tmp_path / "c", documents)
    assert list(tmp_path.iterdir()) == []


def test_documents_that_cannot_be_in_a_corpus(tmp_path):
    mask = np.ones(2, dtype=np.bool_)
    with pytest.raises(DataError, match=r"outside the vocabulary .*found 0 to 90000"):
        write_corpus(tmp_path / "c", [Document(np.array([0, VOCAB_SIZE], dtype=np.int32), mask)])
    with pytest.raises(DataError, match="needs two tokens"):
        write_corpus(tmp_path / "c", [Document(np.array([0], dtype=np.int32), mask[:1])])
    endless = np.broadcast_to(np.int32(1), 2**31)  # without memory
    with pytest.raises(DataError, match=r"more than a corpus can hold .*of 2147483648 tokens"):
        write_corpus(tmp_path / "c", [Document(endless, np.broadcast_to(np.True_, 2**31))])
    with pytest.raises(DataError, match="no document to write"):
        write_corpus(tmp_path / "c", [])
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


@pytest.mark.parametrize("missing", [("json",), ("loss_mask",), ("bin", "idx"), ("json", "idx")])
def test_what_is_left_of_a_corpus_is_replaced(corpus, prefix, documents, missing):
    """By a run that was killed, say: either of two files proves whose the others are."""
    for suffix in missing:
        prefix.with_name(f"data.v1.{suffix}").unlink()
    assert len(write_corpus(prefix, documents[:2])) == 2


def test_a_corpus_of_version_1_is_replaced(corpus, prefix, documents):
    tiny.change_description(prefix, version=1)
    assert len(write_corpus(prefix, documents[:2])) == 2
