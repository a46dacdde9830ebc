"""Every kind of damage, found by bytes alone or beside the corpus, the first of each shard."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_replay.data.corpus import Corpus
from megatron_replay.errors import DataError, StoreError
from megatron_replay.store import CandidateReader
from megatron_replay.store._records import joined_crc
from megatron_replay.store.verify import verify
from tests.store.corpora import write_both, write_corpus
from tools.inspect_store import main


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_both(tmp_path / "store", 0, 14, documents_per_shard=4)
    return tmp_path / "store"


def corpus_of(store: Path) -> Corpus:
    return Corpus(f"{store}-corpus")


@pytest.mark.parametrize("workers", [1, 3])
def test_a_good_store(store: Path, capfd: pytest.CaptureFixture[str], workers: int) -> None:
    assert verify(CandidateReader(store), corpus=corpus_of(store), workers=workers) == []
    corpus, workers_flag = f"--data-path={store}-corpus", f"--workers={workers}"
    assert main([str(store), "--verify", corpus, workers_flag]) == 0
    captured = capfd.readouterr()
    assert "verify: 14/14 documents" in captured.err
    assert "every byte as written, every position carries loss, every label in its" in captured.err
    assert "in 4 shards" in captured.err
    assert captured.out.startswith("vocab_size: 70000")


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: flip(path, -1), "document 7: damaged: the crc32 differs"),
        (lambda path: flip(path, 0), "not a file of a candidate store"),
        (lambda path: flip(path.with_suffix(".idx"), 60), "the index is damaged"),
        (lambda path: flip(path.with_suffix(".idx"), 40), "the index is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "damaged: another size"),
        (lambda path: path.unlink(), "cannot read"),
        (lambda path: path.with_suffix(".idx").unlink(), "cannot read"),
    ],
)
def test_each_kind_of_damage(store: Path, damage: Callable[[Path], None], message: str) -> None:
    path = store / "0000/shard-0000001.bin"
    damage(path)
    (found,) = verify(CandidateReader(store))
    assert str(path.with_suffix("")) in str(found)
    assert message in str(found)


def test_a_wrong_crc_of_the_whole_bin_alone(store: Path) -> None:
    reader = CandidateReader(store)
    reader.index(2).__dict__["bin_crc"] ^= 1
    (found,) = verify(reader)
    assert str(found) == f"{store}/0000/shard-0000002.bin: damaged: crc32 differs"


@pytest.mark.parametrize("workers", [1, 2])
def test_all_damaged_shards_are_listed_in_order(
    store: Path, capfd: pytest.CaptureFixture[str], workers: int
) -> None:
    for shard in (3, 0, 1):
        flip(store / f"0000/shard-{shard:07d}.bin", -1)
    assert main([str(store), "--verify", f"--workers={workers}"]) == StoreError.exit_code
    lines = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error: ")]
    assert [line.split("shard-000000")[1][0] for line in lines] == ["0", "1", "3"]


def changed(store: Path, change: Callable[[np.ndarray, np.ndarray], None]) -> Any:
    """The store's corpus with document 6 changed; document 6 has positions."""
    corpus = corpus_of(store)
    tokens, loss_mask = corpus[6].tokens.copy(), corpus[6].loss_mask.copy()
    change(tokens, loss_mask)

    def labels(documents: Any, counts: Any, positions: Any) -> tuple[np.ndarray, np.ndarray]:
        found, carries = (array.copy() for array in corpus.labels(documents, counts, positions))
        owner = np.repeat(documents, counts)
        found[owner == 6] = tokens[positions[owner == 6] + 1]
        carries[owner == 6] = loss_mask[positions[owner == 6] + 1]
        return found, carries

    return SimpleNamespace(lengths=corpus.lengths.copy(), labels=labels)


def test_what_only_the_corpus_tells(store: Path) -> None:
    reader = CandidateReader(store)
    document = reader[6]
    position = int(document.positions[1])

    def found(corpus: Any) -> str:
        (error,) = verify(reader, corpus=corpus)
        return str(error)

    def no_label(tokens: np.ndarray, loss_mask: np.ndarray) -> None:
        tokens[position + 1] = 69_999

    def no_loss(tokens: np.ndarray, loss_mask: np.ndarray) -> None:
        loss_mask[position + 1] = False

    where = f"{store}/0000/shard-0000001.bin: document 6, position {position}"
    assert found(changed(store, no_label)).startswith(f"{where}: the label 69999 is not in")
    assert found(changed(store, no_loss)).startswith(
        f"{where} is recorded, but its label carries no loss"
    )
    short = changed(store, lambda tokens, loss_mask: None)
    short.lengths[6] = document.positions[-1] + 1
    last = f"document 6, position {document.positions[-1]}"
    assert f"{last} is recorded, but is beyond the document's end" in found(short)


def test_labels_of_a_corpus_are_those_of_its_documents(store: Path) -> None:
    corpus, reader = corpus_of(store), CandidateReader(store)
    batch = reader.read(range(3, 11))
    labels, carries_loss = corpus.labels(
        np.arange(3, 11), np.diff(batch.document_offsets), batch.positions
    )
    one_by_one = [int(corpus[d].tokens[t + 1]) for d in range(3, 11) for t in reader[d].positions]
    assert labels.tolist() == one_by_one
    assert len(set(one_by_one)) > 5
    assert carries_loss.all()
    first = np.array([0])
    assert corpus.labels(np.array([6]), np.array([1]), first)[1][0] == corpus[6].loss_mask[1]


def test_another_or_a_damaged_corpus_is_refused(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = corpus_of(store)
    write_corpus(store.with_name("other"), [corpus[d] for d in range(13)])
    other = store.with_name("other")
    assert main([str(store), "--verify", f"--data-path={other}"]) == StoreError.exit_code
    assert "corpus_fingerprint" in capsys.readouterr().err
    write_corpus(store.with_name("told"), [corpus[d] for d in range(14)], fingerprint="another")
    told = store.with_name("told")
    assert main([str(store), "--verify", f"--data-path={told}"]) == StoreError.exit_code
    assert "told is another corpus: give the one that Stage 0 read" in capsys.readouterr().err
    flip(Path(f"{corpus.prefix}.bin"), 9)
    assert main([str(store), "--verify", f"--data-path={corpus.prefix}"]) == DataError.exit_code


@pytest.mark.parametrize("sizes", [[], [0], [1], [5, 0, 70_000, 1], [1 << 20] * 3])
def test_crc32s_of_parts_join_to_that_of_the_whole(sizes: list[int]) -> None:
    parts = [random.Random(i).randbytes(size) for i, size in enumerate(sizes)]
    crcs = np.array([zlib.crc32(part) for part in parts], np.uint32)
    found = joined_crc(zlib.crc32(b"header"), crcs, np.array(sizes, np.int64))
    assert found == zlib.crc32(b"header" + b"".join(parts))
