"""A store beside its corpus: every byte and every label, and what is refused before it is read."""

from __future__ import annotations

import random
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_replay.data.corpus import Corpus, Document
from megatron_replay.errors import DataError, StoreError
from megatron_replay.store import CandidateReader
from megatron_replay.store._records import joined_crc
from megatron_replay.store.verify import verify
from tests.store.examples import (
    VOCAB_SIZE,
    describe,
    document_of,
    text_of,
    write_corpus,
    write_store,
)
from tools.inspect_store import main


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """With the corpus that it could have been made from, ``DIRECTORY-corpus``."""
    fields = {"vocab_size": VOCAB_SIZE, "num_documents": 14, "documents_per_shard": 4}
    documents = [document_of(describe(**fields), document_id) for document_id in range(14)]
    corpus = write_corpus(tmp_path / "store-corpus", map(text_of, documents))
    description = describe(**fields, corpus_fingerprint=corpus.fingerprint)
    return write_store(tmp_path / "store", description).directory


def corpus_of(store: Path) -> Corpus:
    return Corpus(f"{store}-corpus")


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("workers", [1, 3])
def test_verification(store: Path, capfd: pytest.CaptureFixture[str], workers: int) -> None:
    assert verify(CandidateReader(store), corpus=corpus_of(store), workers=workers) == []
    arguments = [str(store), "--verify", f"--data-path={store}-corpus", f"--workers={workers}"]
    assert main(arguments) == 0
    captured = capfd.readouterr()
    assert "verify: 14/14 documents" in captured.err
    assert "every byte as written, every position carries loss, every label in its" in captured.err
    assert captured.out.startswith("vocab_size: 70000")
    for shard in (3, 0, 1):
        flip(store / f"0000/shard-{shard:07d}.bin", -1)
    assert main(arguments) == StoreError.exit_code
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    places = [f"shard-000000{s}.bin, document {d}" for s, d in ((0, 3), (1, 7), (3, 13))]
    assert lines == [f"error: {store}/0000/{p}: damaged: the crc32 differs" for p in places]


def test_what_only_the_corpus_shows(store: Path) -> None:
    """Of document 6: another label, a label without loss, and an earlier end."""
    reader, texts = (
        CandidateReader(store),
        [text_of(document) for document in CandidateReader(store)],
    )
    positions, tokens, loss_mask = reader[6].positions, texts[6].tokens, texts[6].loss_mask
    another_label, no_loss, last = tokens.copy(), loss_mask.copy(), positions[-1]
    another_label[positions[1] + 1], no_loss[positions[1] + 1] = 69_999, False
    for changed, message in (
        (Document(another_label, loss_mask), f"{positions[1]}: the label 69999 is not in"),
        (Document(tokens, no_loss), f"{positions[1]} is recorded, but its label carries no loss"),
        (Document(tokens[: last + 1], loss_mask[: last + 1]), f"{last} is recorded, but is beyond"),
    ):
        corpus = write_corpus(store.with_name("changed"), [*texts[:6], changed, *texts[7:]])
        (error,) = verify(reader, corpus=corpus)
        where = f"{store}/0000/shard-0000001.bin: document 6, position "
        assert str(error).startswith(where + message)


def test_labels_of_a_corpus_are_those_of_its_documents(store: Path) -> None:
    corpus, documents = corpus_of(store), np.arange(3, 11)
    counts = corpus.lengths[documents] - 1
    positions = np.concatenate([np.arange(count) for count in counts])
    labels, carries_loss = corpus.labels(documents, counts, positions)
    assert labels.tolist() == np.concatenate([corpus[d].tokens[1:] for d in documents]).tolist()
    expected = np.concatenate([corpus[d].loss_mask[1:] for d in documents])
    assert carries_loss.tolist() == expected.tolist()


def test_another_or_a_damaged_corpus_or_tokenizer_is_refused_before_anything_is_read(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text would be of other tokens."""
    (store / "0000/shard-0000001.bin").write_bytes(b"")
    corpus = corpus_of(store)

    def refusal(code: int, *flags: str) -> str:
        assert main([str(store), "--verify", *flags]) == code
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    write_corpus(store.with_name("other"), [corpus[d] for d in range(13)])
    found = refusal(StoreError.exit_code, f"--data-path={store.with_name('other')}")
    assert "corpus_fingerprint" in found
    write_corpus(store.with_name("told"), [corpus[d] for d in range(14)], fingerprint="another")
    found = refusal(StoreError.exit_code, f"--data-path={store.with_name('told')}")
    assert "told is another corpus: give the one that Stage 0 read" in found
    another: Any = SimpleNamespace(fingerprint="another", decode=lambda ids: "x")
    monkeypatch.setattr("megatron_replay.data.tokenizer.load_tokenizer", lambda path: another)
    found = refusal(StoreError.exit_code, "--document=8", "--tokenizer=dir")
    assert "another tokenizer_fingerprint (expected tokenizer_fingerprint = another; fo" in found
    assert "--tokenizer dir would show other text: give the tokenizer of the store's c" in found
    flip(Path(f"{corpus.prefix}.bin"), 9)
    refusal(DataError.exit_code, f"--data-path={corpus.prefix}")


@pytest.mark.parametrize("sizes", [[], [0], [1], [5, 0, 70_000, 1], [1 << 20] * 3])
def test_crc32s_of_parts_join_to_that_of_the_whole(sizes: list[int]) -> None:
    parts = [random.Random(i).randbytes(size) for i, size in enumerate(sizes)]
    crcs = np.array([zlib.crc32(part) for part in parts], np.uint32)
    found = joined_crc(zlib.crc32(b"header"), crcs, np.array(sizes, np.int64))
    assert found == zlib.crc32(b"header" + b"".join(parts))
