"""Parts of one store, and stores of corpora that were concatenated; and what is no such thing."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_replay.data.corpus import Corpus, Document
from megatron_replay.errors import ConfigError, StoreError
from megatron_replay.store import CandidateReader, CandidateWriter
from megatron_replay.store.manifest import bin_path, index_path
from megatron_replay.store.merge import merge_corpora, merge_parts
from tests.store.corpora import write_both, write_corpus
from tests.store.examples import (
    assert_same,
    contents,
    describe,
    document_of,
    write_shard,
    write_store,
)
from tools.inspect_store import main

FIELDS = {"num_documents": 13, "documents_per_shard": 3}  # 5 shards
DESCRIPTION = describe(**FIELDS)


def write_part(directory: Path, shards: Sequence[int], **changes: Any) -> Path:
    writer = CandidateWriter(directory, describe(**(FIELDS | changes)))
    for shard in shards:
        write_shard(writer, shard)
    return directory


@pytest.mark.parametrize("workers", [1, 2])
def test_parts_make_the_whole(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], workers: int
) -> None:
    write_store(tmp_path / "whole", DESCRIPTION)
    parts = [write_part(tmp_path / f"part{i}", shards) for i, shards in enumerate([[4, 0], [1, 3]])]
    parts.append(write_part(tmp_path / "part2", [1, 2]))  # shard 1 is there twice
    out = tmp_path / "out"
    arguments = ["merge", str(out), *map(str, parts), f"--workers={workers}"]
    assert main(arguments) == 0
    assert capfd.readouterr().out == f"{out}: 13 documents in 5 shards\n"
    assert contents(out) == contents(tmp_path / "whole")
    assert main(arguments) == 0  # again: nothing to do
    assert contents(out) == contents(tmp_path / "whole")


def test_shards_that_no_part_has_are_told_and_may_come_later(tmp_path: Path) -> None:
    write_store(tmp_path / "whole", DESCRIPTION)
    parts = [write_part(tmp_path / "a", [0, 3]), write_part(tmp_path / "b", [4])]
    with pytest.raises(StoreError, match="2 of 5 shards are in no part; the first is 1"):
        merge_parts(parts, tmp_path / "out")
    with pytest.raises(StoreError, match="unfinished: 3 of 5"):
        CandidateReader(tmp_path / "out")
    merge_parts([write_part(tmp_path / "c", [1, 2])], tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_parts_that_are_not_of_one_store_are_refused(tmp_path: Path) -> None:
    one = write_part(tmp_path / "a", [0])
    other = write_part(tmp_path / "b", [1], vocab_size=160_000, selection={"coverage": 0.9})
    with pytest.raises(StoreError, match=r"another vocab_size, selection\.coverage, .*--data-path"):
        merge_parts([one, other], tmp_path / "out")
    with pytest.raises(ConfigError, match="the output is also read, as IN"):
        merge_parts([one], one)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("bin", "shard 1 is not the same in two parts"),
        ("lone bin", "shard-0000000.bin: damaged: crc32 differs"),
        ("idx", "the index is damaged"),
        ("other", "shard 1 is not the same in two parts"),
    ],
)
def test_damaged_or_other_shards_are_refused(tmp_path: Path, damage: str, message: str) -> None:
    one, other = write_part(tmp_path / "a", [0, 1]), write_part(tmp_path / "b", [1, 2, 3, 4])
    path = {
        "bin": bin_path(other, 1), "lone bin": bin_path(one, 0), "idx": index_path(other, 2)
    }.get(damage)  # fmt: skip
    if path is None:  # a whole and undamaged shard, but with other documents
        writer = CandidateWriter(tmp_path / "c", DESCRIPTION)
        with writer.shard(1) as shard:
            for document in DESCRIPTION.documents(1):
                shard.add(document, document_of(DESCRIPTION, document + 1))
        shutil.copytree(tmp_path / "c/0000", other / "0000", dirs_exist_ok=True)
    else:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.raises(StoreError, match=message):
        merge_parts([one, other], tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.fixture
def concatenated(tmp_path: Path) -> tuple[list[CandidateReader], Corpus, list[Document]]:
    """Stores of 5, 6 and 3 documents in shards of 2, 4 and 3, and their corpora end to end."""
    readers, texts = [], []
    for name, first, count, per_shard in (("a", 0, 5, 2), ("b", 5, 6, 4), ("c", 11, 3, 3)):
        reader, own = write_both(tmp_path / name, first, count, documents_per_shard=per_shard)
        readers.append(reader)
        texts += own
    return readers, write_corpus(tmp_path / "all", texts), texts


@pytest.mark.parametrize("workers", [1, 2])
def test_stores_of_concatenated_corpora(
    tmp_path: Path,
    concatenated: tuple[list[CandidateReader], Corpus, list[Document]],
    capfd: pytest.CaptureFixture[str],
    workers: int,
) -> None:
    readers, corpus, _ = concatenated
    names = [str(reader.directory) for reader in readers]
    flags = ["--data-path", corpus.prefix, f"--workers={workers}"]
    assert main(["merge", str(tmp_path / "out"), *names, *flags]) == 0
    assert "14 documents in 7 shards" in capfd.readouterr().out
    merged = CandidateReader(tmp_path / "out")
    merged.require(corpus_fingerprint=corpus.fingerprint, tokenizer_fingerprint="tokenizer")
    expected = [document for reader in readers for document in reader]
    for found, document in zip(merged, expected, strict=True):
        assert_same(found, document)
    selection = dict(merged.description.selection)
    assert selection.pop("merged_from") == [r.description.fingerprint for r in readers]
    assert selection == readers[0].description.selection
    assert main([str(tmp_path / "out"), "--verify", *flags]) == 0


def test_a_merged_store_can_be_merged(
    tmp_path: Path, concatenated: tuple[list[CandidateReader], Corpus, list[Document]]
) -> None:
    readers, corpus, texts = concatenated
    two = write_corpus(tmp_path / "two", texts[:11])
    merge_corpora(readers[:2], tmp_path / "ab", two)
    nested = [CandidateReader(tmp_path / "ab"), readers[2]]
    assert merge_corpora(nested, tmp_path / "abc", corpus).num_documents == 14


def test_a_wrong_order_or_count_is_refused(
    tmp_path: Path, concatenated: tuple[list[CandidateReader], Corpus, list[Document]]
) -> None:
    readers, corpus, _ = concatenated
    with pytest.raises(StoreError, match=r"other documents \(expected 14; found 11\)"):
        merge_corpora(readers[:2], tmp_path / "out", corpus)
    with pytest.raises(StoreError, match=r"document \d+, position \d+.* Use the corpus"):
        merge_corpora(readers[::-1], tmp_path / "out", corpus)
    assert not (tmp_path / "out/manifest.json").exists()


def test_stores_made_in_other_ways_are_refused(
    tmp_path: Path,
    concatenated: tuple[list[CandidateReader], Corpus, list[Document]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    readers, corpus, _ = concatenated
    other, _ = write_both(
        tmp_path / "other", 11, 3,
        checkpoint_fingerprint="x", logits="bf16", selection={"coverage": 0.9, "n": 1},
    )  # fmt: skip
    names = [str(reader.directory) for reader in (*readers[:2], other)]
    code = main(["merge", str(tmp_path / "out"), *names, "--data-path", corpus.prefix])
    assert code == StoreError.exit_code
    message = capsys.readouterr().err
    assert message.startswith(f"error: {other.directory}: ")
    for name in ("logits", "checkpoint_fingerprint", "selection.coverage", "selection.n"):
        assert name in message
    assert "num_documents" not in message
    assert not (tmp_path / "out").exists()
