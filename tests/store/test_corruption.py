"""Damage anywhere gives a StoreError or the same data: never other data, never another exception.

Two kinds: accidents, which the crcs must catch, and forgeries whose crcs are right, which only
the checks of contents can catch.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron_replay.errors import StoreError
from megatron_replay.store import CandidateReader, DocumentCandidates
from megatron_replay.store.format import decode_ids, encode_ids
from tests.store.examples import assert_same, contents, describe, require_sound, write_store

# Three documents with 0, 1 and 2 positions, a high plane with padding, logits, a short last shard.
DESCRIPTION = describe(
    vocab_size=70_000, num_documents=3, documents_per_shard=2, logits="fp16", selection={"f": 0.5}
)
FILES = [
    "0000/shard-0000000.bin",
    "0000/shard-0000000.idx",
    "0000/shard-0000001.bin",
    "0000/shard-0000001.idx",
    "manifest.json",
    "store.json",
]
INDEX_HEADER_BYTES, BIN_HEADER_BYTES = 44, 12


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(tmp_path, DESCRIPTION)
    assert list(contents(tmp_path)) == FILES
    return tmp_path


def overwrite(path: Path, content: bytes | bytearray) -> None:
    """Replace in place: truncating first makes a file system flush, thousands of times here."""
    with open(path, "r+b") as handle:
        handle.write(content)
        handle.truncate()


def read_all(directory: Path) -> list[DocumentCandidates]:
    reader = CandidateReader(directory)
    require_sound(reader)
    return list(reader)


def refused(directory: Path, expected: list[DocumentCandidates]) -> bool:
    """Whether reading ends in a StoreError; otherwise it must give the expected data."""
    try:
        found = list(CandidateReader(directory))
    except StoreError:
        with pytest.raises(StoreError):
            read_all(directory)
        return True
    read_all(directory)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    return False


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_every_byte_flipped(store: Path, name: str, flip: int) -> None:
    path, expected = store / name, read_all(store)
    good = path.read_bytes()
    unnoticed = []
    for at in range(len(good)):
        overwrite(path, good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :])
        if not refused(store, expected):
            unnoticed.append(good[at : at + 1])
    if name.endswith(".json"):
        assert set(unnoticed) <= {b" ", b"\n"}  # spaces may become other spaces
    else:
        assert unnoticed == []


@pytest.mark.parametrize("name", FILES)
def test_truncated_at_every_length(store: Path, name: str) -> None:
    path, expected = store / name, read_all(store)
    good = path.read_bytes()
    unnoticed = []
    for length in reversed(range(len(good))):
        os.truncate(path, length)
        if not refused(store, expected):
            unnoticed.append(length)
    assert unnoticed == ([len(good) - 1] if name.endswith(".json") else [])  # the last newline


@pytest.mark.parametrize("name", FILES)
def test_each_file_missing(store: Path, name: str) -> None:
    (store / name).unlink()
    with pytest.raises(StoreError):
        read_all(store)


def test_appended_bytes_are_noticed(store: Path) -> None:
    for name in FILES[:4]:
        good = (store / name).read_bytes()
        (store / name).write_bytes(good + b"\0")
        with pytest.raises(StoreError, match=name):
            read_all(store)
        (store / name).write_bytes(good)


def test_shards_of_another_store_are_noticed(store: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_store(other, describe(vocab_size=60_000, num_documents=3, documents_per_shard=2))
    for name in FILES[2:4]:
        (store / name).write_bytes((other / name).read_bytes())
    with pytest.raises(StoreError, match="shard 1 is not the one the manifest was written for"):
        read_all(store)


def sign(directory: Path) -> None:
    """Make every crc32 and the manifest of shard 0 fit what its files now hold."""
    records = (directory / "0000/shard-0000000.bin").read_bytes()
    index = bytearray((directory / "0000/shard-0000000.idx").read_bytes())
    offsets = struct.unpack_from("<3q", index, INDEX_HEADER_BYTES)
    struct.pack_into("<I", index, INDEX_HEADER_BYTES - 4, zlib.crc32(records))
    crcs = [zlib.crc32(records[max(a, 0) : max(b, 0)]) for a, b in pairwise(offsets)]
    struct.pack_into("<2I", index, INDEX_HEADER_BYTES + 24, *crcs)
    struct.pack_into("<I", index, len(index) - 4, zlib.crc32(index[:-4]))
    overwrite(directory / "0000/shard-0000000.idx", index)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["shards"][0] = [len(records), zlib.crc32(records), zlib.crc32(index[:-4])]
    overwrite(directory / "manifest.json", json.dumps(manifest).encode())


@pytest.mark.parametrize("name", FILES[:2])
@pytest.mark.parametrize("forged", [0x00, 0x80, 0xFF])
def test_every_byte_forged(store: Path, name: str, forged: int) -> None:
    """Right crcs over wrong contents: a StoreError, or a document that obeys every rule."""
    path = store / name
    originals = {p: p.read_bytes() for p in store.rglob("*") if p.is_file()}
    for at in range(len(originals[path])):
        for other, content in originals.items():
            overwrite(other, content)
        content = bytearray(originals[path])
        content[at] = forged
        overwrite(path, content)
        sign(store)
        try:
            documents = read_all(store)
        except StoreError:
            continue
        for document in documents:
            assert (document.ids < DESCRIPTION.vocab_size).all()
            assert (document.positions >= 0).all()


def forge(store: Path, at: int, content: bytes) -> None:
    path = store / "0000/shard-0000000.bin"
    records = bytearray(path.read_bytes())
    records[at : at + len(content)] = content
    path.write_bytes(records)
    sign(store)


# Document 1 begins after the header and the four bytes of document 0, which has no positions.
RECORD = BIN_HEADER_BYTES + 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: forge(s, 0, b"X"), "0000/shard-0000000.bin: not a file of a candidate store"),
        (lambda s: forge(s, 8, b"\1"), "0000/shard-0000000.bin: another version of the format"),
        (lambda s: forge(s, RECORD, struct.pack("<I", 2**32 - 1)), "an impossible size"),
        (lambda s: forge(s, RECORD + 4, struct.pack("<i", -1)), "positions do not ascend"),
        (lambda s: forge(s, RECORD + 8, b"\xff"), "too short for its logits"),
        (lambda s: forge(s, RECORD + 9, struct.pack("<e", float("inf"))), "lse does not fit"),
        (lambda s: forge(s, RECORD + 13, struct.pack("<e", 2.0)), "tail_mass is no probability"),
    ],
)
def test_forged_records_are_refused_for_what_they_are(
    store: Path, change: Callable[[Path], None], message: str
) -> None:
    change(store)
    with pytest.raises(StoreError) as caught:
        read_all(store)
    assert message in str(caught.value)


def test_bits_after_the_last_id_must_be_zero() -> None:
    payload = encode_ids(np.array([1, 2, 65_537], np.int32), 70_000)
    assert payload[-1] == 0b100
    with pytest.raises(StoreError, match="padding"):
        decode_ids(memoryview(payload[:-1] + bytes([0b1100])), 3, 70_000)


def sign_index(store: Path, at: int, content: bytes) -> None:
    """Change shard 0's index alone, with its own crc32 right."""
    index = bytearray((store / "0000/shard-0000000.idx").read_bytes())
    index[at : at + len(content)] = content
    struct.pack_into("<I", index, len(index) - 4, zlib.crc32(index[:-4]))
    overwrite(store / "0000/shard-0000000.idx", index)
    manifest = json.loads((store / "manifest.json").read_text())
    (bin_crc,) = struct.unpack_from("<I", index, INDEX_HEADER_BYTES - 4)
    manifest["shards"][0][1:] = [bin_crc, zlib.crc32(index[:-4])]
    overwrite(store / "manifest.json", json.dumps(manifest).encode())


@pytest.mark.parametrize(
    ("at", "content", "message"),
    [
        (12, b"\1", "unknown codec (expected 0; found 1)"),
        (13, b"\1", "reserved bytes"),
        (INDEX_HEADER_BYTES, struct.pack("<q", BIN_HEADER_BYTES - 1), "do not fill the .bin"),
        (INDEX_HEADER_BYTES + 8, struct.pack("<q", 2**62), "offsets do not ascend"),
        (
            INDEX_HEADER_BYTES + 24 + 8 + 4,
            struct.pack("<i", 7),
            "another last position (expected 6;",
        ),
        (INDEX_HEADER_BYTES - 4, bytes(4), "0000/shard-0000000.bin: damaged: crc32 differs"),
    ],
)
def test_forged_indexes_are_refused_for_what_they_are(
    store: Path, at: int, content: bytes, message: str
) -> None:
    sign_index(store, at, content)
    with pytest.raises(StoreError) as caught:
        read_all(store)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("store.json", b"[]", "no JSON object"),
        ("store.json", b"\xff", "not UTF-8"),
        ("store.json", b"[" * 100_000, "not JSON"),
        ("manifest.json", b"{}", "not a file of a candidate store"),
    ],
)
def test_foreign_json_is_refused(store: Path, name: str, content: bytes, message: str) -> None:
    (store / name).write_bytes(content)
    with pytest.raises(StoreError) as caught:
        CandidateReader(store)
    assert message in str(caught.value)
    assert name in str(caught.value)


def test_another_version_is_named(store: Path) -> None:
    for name in ("store.json", "manifest.json"):
        value = json.loads((store / name).read_text())
        value["version"] = 1
        (store / name).write_text(json.dumps(value))
        with pytest.raises(StoreError, match=rf"{name}: another version.*expected 2; found 1"):
            CandidateReader(store)
        value["version"] = 2
        (store / name).write_text(json.dumps(value))


def test_a_directory_without_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no candidate store here.*store\.json"):
        CandidateReader(tmp_path / "nothing")


def test_documents_beyond_the_end(store: Path) -> None:
    reader = CandidateReader(store)
    for document_id in (-1, 3):
        with pytest.raises(IndexError):
            reader[document_id]


def test_a_store_of_something_else_is_refused_by_name(store: Path) -> None:
    reader = CandidateReader(store)
    reader.require(
        corpus_fingerprint="corpus", tokenizer_fingerprint="tokenizer", vocab_size=70_000
    )
    reader.require()
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
