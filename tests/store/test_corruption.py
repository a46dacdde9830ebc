"""Damage anywhere gives a StoreError or the same data: never other data, never another exception.

Accidents, which the crcs must catch; forgeries whose crcs are right, which only the checks of
contents can catch; and files that are none, or far larger than what they hold.
"""

from __future__ import annotations

import json
import os
import random
import struct
import tracemalloc
from pathlib import Path

import pytest

from megatron_replay.errors import StoreError
from megatron_replay.store import CandidateReader, DocumentCandidates
from megatron_replay.store.manifest import StoreDescription
from megatron_replay.store.merge import merge_parts
from tests.store.examples import (
    BIN_HEADER_BYTES,
    INDEX_HEADER_BYTES,
    assert_same,
    contents,
    describe,
    document_of,
    forge,
    overwrite,
    require_sound,
    write_store,
)
from tests.store.fuzz import attack, damaged, seeds

# Three documents with 0, 1 and 2 positions, a high plane with padding, logits, a short last shard.
DESCRIPTION = describe(
    vocab_size=70_000, num_documents=3, documents_per_shard=2, logits="fp16", selection={"f": 0.5}
)
BIN, INDEX, SECOND_BIN, SECOND_INDEX, MANIFEST, ABOUT = FILES = [
    "0000/shard-0000000.bin", "0000/shard-0000000.idx", "0000/shard-0000001.bin",
    "0000/shard-0000001.idx", "manifest.json", "store.json",
]  # fmt: skip
VERSION_1 = b'{"format": "megatron_replay candidate store", "version": 1}'
HUGE = 1 << 40
#: Reading one block of a file, and what goes with it.
FEW_BYTES = 8 << 20


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(tmp_path / "store", DESCRIPTION)
    assert list(contents(tmp_path / "store")) == FILES
    return tmp_path / "store"


def read_all(directory: Path) -> list[DocumentCandidates]:
    reader = CandidateReader(directory)
    require_sound(reader)
    return list(reader)


def refusal(store: Path) -> str:
    """The one line with which reading all of a store ends, within some megabytes."""
    tracemalloc.start()
    try:
        with pytest.raises(StoreError) as caught:
            for _ in CandidateReader(store):
                pass
        assert tracemalloc.get_traced_memory()[1] < FEW_BYTES
        with pytest.raises(StoreError):
            read_all(store)
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def is_refused(directory: Path, expected: list[DocumentCandidates]) -> bool:
    """Whether reading ends in a StoreError; otherwise it must give the expected data."""
    try:
        found = list(CandidateReader(directory))
    except StoreError:
        with pytest.raises(StoreError):
            read_all(directory)
        return True
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    return False


@pytest.mark.parametrize("name", FILES)
def test_every_byte_flipped_or_cut_off(store: Path, name: str) -> None:
    path, expected = store / name, read_all(store)
    good = path.read_bytes()

    def is_noticed(content: bytes) -> bool:
        overwrite(path, content)
        return is_refused(store, expected)

    flipped = [
        good[at : at + 1]
        for at in range(len(good))
        for flip in (0x01, 0x80, 0xFF)
        if not is_noticed(good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :])
    ]
    cut = [length for length in range(len(good)) if not is_noticed(good[:length])]
    if name.endswith(".json"):
        assert set(flipped) <= {b" ", b"\n"}  # spaces may become other spaces
        assert cut == [len(good) - 1]  # the last newline
    else:
        assert flipped == cut == []
        overwrite(path, good + b"\0")
        assert name in refusal(store)
    path.unlink()
    refusal(store)


def test_shards_of_another_store_are_noticed(store: Path, tmp_path: Path) -> None:
    other = describe(vocab_size=60_000, num_documents=3, documents_per_shard=2)
    write_store(tmp_path / "other", other)
    for name in (SECOND_BIN, SECOND_INDEX):
        overwrite(store / name, (tmp_path / "other" / name).read_bytes())
    assert "shard 1 is not the one the manifest was written for" in refusal(store)


def test_damaged_stores_are_read_or_refused(tmp_path: Path) -> None:
    """A short attack on every run; a long one is in docs/log.md."""
    stores, found = seeds(), []
    for case in range(400):
        draw = random.Random(case)
        directory = tmp_path / str(case)
        directory.mkdir()
        found.append(attack(damaged(draw, draw.choice(stores)), directory))
    assert 20 < sum(found) < 380  # both ends are reached


# Document 1 begins after the header and the four bytes of document 0, which has no positions.
RECORD, OFFSETS = BIN_HEADER_BYTES + 4, INDEX_HEADER_BYTES
# Its ids have one bit above the low 16, so the last byte of its high plane has padding.
HIGH_PLANE = RECORD + 4 + 11 + 2 * len(document_of(DESCRIPTION, 1).ids)


@pytest.mark.parametrize(
    ("name", "at", "content", "message"),
    [
        (BIN, 0, b"X", f"{BIN}: not a file of a candidate store"),
        (BIN, 8, b"\1", f"{BIN}: another version of the format"),
        (BIN, RECORD, struct.pack("<I", 2**32 - 1), "an impossible size"),
        (BIN, RECORD + 4, struct.pack("<i", -1), "positions do not ascend"),
        (BIN, RECORD + 8, b"\xff", "too short for its logits"),
        (BIN, RECORD + 9, struct.pack("<e", float("inf")), "lse does not fit"),
        (BIN, RECORD + 13, struct.pack("<e", 2.0), "tail_mass is no probability"),
        (BIN, HIGH_PLANE, b"\x80", "the padding after the last planar id is not zero"),
        (INDEX, 12, b"\1", "unknown codec (expected 0; found 1)"),
        (INDEX, 13, b"\1", "reserved bytes"),
        (INDEX, OFFSETS, struct.pack("<q", BIN_HEADER_BYTES - 1), "do not fill the .bin"),
        (INDEX, OFFSETS + 8, struct.pack("<q", 2**62), "offsets do not ascend"),
        (INDEX, OFFSETS + 36, struct.pack("<i", 7), "another last position (expected 6;"),
    ],
)
def test_forgeries_are_refused_for_what_they_are(
    store: Path, name: str, at: int, content: bytes, message: str
) -> None:
    forge(store, name, at, content, records=name == BIN)
    assert message in refusal(store)


def test_a_forged_crc_of_the_whole_bin(store: Path) -> None:
    forge(store, INDEX, INDEX_HEADER_BYTES - 4, bytes(4), records=False)
    with pytest.raises(StoreError, match=f"{BIN}: damaged: crc32 differs"):
        read_all(store)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (ABOUT, b"[]", "no JSON object"),
        (ABOUT, b"\xff", "not UTF-8"),
        (ABOUT, b"[" * 100_000, "not JSON"),
        (MANIFEST, b"{}", "not a file of a candidate store"),
        (ABOUT, VERSION_1, "another version of the format (expected 2; found 1)"),
        (MANIFEST, VERSION_1, "another version of the format (expected 2; found 1)"),
    ],
)
def test_foreign_json_is_refused(store: Path, name: str, content: bytes, message: str) -> None:
    overwrite(store / name, content)
    assert f"{name}: " in refusal(store)
    assert message in refusal(store)


def test_what_is_not_there(store: Path, tmp_path: Path) -> None:
    assert "no candidate store here (expected store.json)" in refusal(tmp_path / "nothing")
    reader = CandidateReader(store)
    for document_id in (-1, 3):
        with pytest.raises(IndexError):
            reader[document_id]


def test_a_store_of_something_else_is_refused_by_name(store: Path) -> None:
    reader = CandidateReader(store)
    reader.require(
        corpus_fingerprint="corpus", tokenizer_fingerprint="tokenizer", vocab_size=70_000
    )
    with pytest.raises(StoreError) as caught:
        reader.require(corpus_fingerprint="mine", vocab_size=5)
    assert "another corpus_fingerprint, vocab_size" in str(caught.value)
    assert (
        "(expected corpus_fingerprint = mine, vocab_size = 5; "
        "found corpus_fingerprint = corpus, vocab_size = 70000)" in str(caught.value)
    )


def test_more_shards_than_mappings(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_all(store)
    monkeypatch.setattr("megatron_replay.store.reader.MAX_MAPPED_SHARDS", 1)
    reader = CandidateReader(store)
    for document_id in (2, 0, 1, 2):
        assert_same(reader[document_id], expected[document_id])
        assert Path("/proc/self/maps").read_text().count(f"{store}/0000/shard") == 1


@pytest.mark.parametrize("name", [ABOUT, MANIFEST, INDEX, BIN])
def test_what_is_no_regular_file_is_not_waited_for(store: Path, name: str) -> None:
    path = store / name
    for make, found in (
        (os.mkfifo, "a pipe (FIFO)"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
        (Path.mkdir, "a directory"),
    ):
        path.unlink()
        make(path)
        assert refusal(store) == f"{path}: cannot read (expected a regular file; found {found})"


@pytest.mark.parametrize("name", [ABOUT, MANIFEST, INDEX, BIN])
def test_a_sparse_file_of_a_terabyte_is_not_read(store: Path, name: str) -> None:
    os.truncate(store / name, HUGE)
    message = refusal(store)
    assert name in message
    assert str(HUGE) in message


def describe_as(store: Path, **changes: int) -> str:
    """Change the description; returns its fingerprint."""
    about = json.loads((store / ABOUT).read_text())
    about["description"] |= changes
    (store / ABOUT).write_text(json.dumps(about))
    return StoreDescription(**about["description"]).fingerprint


def test_an_index_of_the_right_size_is_read_as_far_as_all_is_well(store: Path) -> None:
    """Of 2^36 documents, as store.json and the header say; all but the first offset is a hole."""
    many = 1 << 36
    fingerprint = describe_as(store, num_documents=many, documents_per_shard=many)
    content = bytearray((store / INDEX).read_bytes()[: INDEX_HEADER_BYTES + 8])
    struct.pack_into("<QQQ", content, 16, 0, many, HUGE)
    overwrite(store / INDEX, content)
    os.truncate(store / INDEX, 44 + 8 * (many + 1) + 8 * many + 4)
    os.truncate(store / BIN, HUGE)
    manifest = json.loads((store / MANIFEST).read_text())
    manifest |= {"description_sha256": fingerprint, "shards": [[HUGE, 0, 0]]}
    (store / MANIFEST).write_text(json.dumps(manifest))
    assert refusal(store).endswith("the index is damaged: its offsets do not ascend")


def test_a_record_of_a_terabyte_is_neither_read_nor_copied(store: Path, tmp_path: Path) -> None:
    """Every checksum that can be known is right."""
    for at in (32, INDEX_HEADER_BYTES + 16):
        forge(store, INDEX, at, struct.pack("<Q", HUGE), records=False)
    os.truncate(store / BIN, HUGE)
    assert f"{store / BIN}, document 1: a record of 1 positions has an imp" in refusal(store)
    with pytest.raises(StoreError, match="a record of 1 positions has an impossible size"):
        merge_parts([store], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("shard-0000000.bin*")] == []


@pytest.mark.parametrize("documents", [(1 << 63) - 1, 10**7 + 1])
def test_shards_without_number_are_refused(store: Path, documents: int) -> None:
    with pytest.raises(StoreError, match="documents_per_shard"):
        describe_as(store, num_documents=documents, documents_per_shard=1)
    least = -(-documents // 10**7)
    assert f"unusable documents_per_shard of a store (expected {least} or more; f" in refusal(store)


def test_a_manifest_larger_than_its_shards_need_is_not_parsed(store: Path) -> None:
    overwrite(store / MANIFEST, (store / MANIFEST).read_bytes() + b" " * 2000)
    assert "manifest.json: damaged: too large (expected at most 1280 bytes; f" in refusal(store)
