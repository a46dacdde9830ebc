from __future__ import annotations

import errno
import json
import struct
import warnings

import numpy as np
import pytest

from megatron_replay.data.corpus import Corpus, idx_bytes
from megatron_replay.data.corpus_writer import CorpusWriter
from megatron_replay.data.document import Document
from megatron_replay.errors import DataError, OutputError
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
    assert corpus.tokenizer_fingerprint == FACTS.fingerprint
    corpus.verify()


def test_megatron_reads_the_token_pair(corpus, prefix, documents, indexed_dataset):
    dataset = indexed_dataset.IndexedDataset(str(prefix), multimodal=False, mmap=True)
    assert len(dataset) == len(documents)
    assert dataset.document_indices.tolist() == list(range(len(documents) + 1))
    for i, document in enumerate(documents):
        np.testing.assert_array_equal(dataset[i], document.tokens)
        assert dataset[i].dtype == np.int32


def test_megatron_would_write_the_same_bytes(corpus, prefix, documents, tmp_path, indexed_dataset):
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for document in documents:
        builder.add_document(document.tokens, [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    ours_bin, ours_idx, *_ = contents(prefix)
    assert (tmp_path / "theirs.bin").read_bytes() == ours_bin
    assert (tmp_path / "theirs.idx").read_bytes() == ours_idx


def test_loss_mask_bytes(tmp_path):
    write_corpus(tmp_path / "c", [Document(np.arange(3, dtype=np.int32), np.arange(3) > 0)])
    header = b"MRLOSSMK" + (1).to_bytes(8, "little") + (3).to_bytes(8, "little")
    assert (tmp_path / "c.loss_mask").read_bytes() == header + b"\0\1\1"


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
    with open(path, "r+b") as handle:
        handle.truncate(size + change)
    word = "truncated" if change < 0 else "longer"
    with pytest.raises(
        DataError, match=rf"{suffix}: {word}.*expected {size} bytes; found {size + change} bytes"
    ):
        Corpus(prefix)


@pytest.mark.parametrize("suffix", ["bin", "idx", "loss_mask"])
def test_a_missing_file_is_named(corpus, prefix, suffix):
    prefix.with_name(f"data.v1.{suffix}").unlink()
    with pytest.raises(DataError, match=rf"data.v1.{suffix}: cannot read: No such file"):
        Corpus(prefix)


def test_every_flipped_byte_is_noticed(prefix):
    """Opening or verify() refuses each damage to index, tokens and loss mask."""
    write_corpus(prefix, random_documents([2, 9, 5]))
    for suffix in ("idx", "bin", "loss_mask"):
        path = prefix.with_name(f"data.v1.{suffix}")
        whole = path.read_bytes()
        for i in range(len(whole)):
            path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x81]) + whole[i + 1 :])
            with pytest.raises(DataError):
                Corpus(prefix).verify()
        path.write_bytes(whole)
    Corpus(prefix).verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"unknown corpus version \(expected 1; found 2\)"),
        ({"num_tokens": "149"}, "'num_tokens' is damaged .*found '149'"),
        ({"num_tokens": -149}, "the counts are damaged"),
        ({"num_documents": 0}, "the counts are damaged"),
        ({"pad_id": None}, "'pad_id' is damaged"),
    ],
)
def test_a_damaged_description(corpus, prefix, change, message):
    path = prefix.with_name("data.v1.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=message):
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
    path.write_bytes(idx_bytes(np.array([1, 10, 5, 130, 3], dtype=np.int32)))  # consistent
    with pytest.raises(DataError, match="the index is damaged"):
        Corpus(prefix)


def test_an_error_publishes_nothing(tmp_path, documents):
    def fail():
        with CorpusWriter(tmp_path / "c", FACTS, row_format="text", source={}) as writer:
            writer.add(documents[0])
            raise DataError("bad row")

    with pytest.raises(DataError, match="bad row"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_rewrite_keeps_the_old_corpus(corpus, prefix, documents):
    before = contents(prefix)

    def fail():
        with CorpusWriter(prefix, FACTS, row_format="text", source={}) as writer:
            writer.add(documents[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert contents(prefix) == before


def test_a_crash_while_publishing_leaves_no_mixture(corpus, prefix, documents, monkeypatch):
    """Once a file of the new corpus has replaced an old one, PREFIX.json is gone."""
    import megatron_replay.files as files

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "fsync_directory", crash)  # right after the first rename
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
    with pytest.raises(DataError, match="no document to write"):
        write_corpus(tmp_path / "c", [])
    assert list(tmp_path.iterdir()) == []
