"""Files that are none, or far larger than what they hold: refused, and not read to their end."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest

from megatron_replay.errors import StoreError
from megatron_replay.store import CandidateReader
from megatron_replay.store.manifest import StoreDescription
from megatron_replay.store.merge import merge_parts
from tests.store.examples import describe, write_store

DESCRIPTION = describe(num_documents=3, documents_per_shard=2)
NAMES = ["store.json", "manifest.json", "0000/shard-0000000.idx", "0000/shard-0000000.bin"]
HUGE = 1 << 40
#: Reading one block of a file, and what goes with it.
FEW_BYTES = 8 << 20


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(tmp_path / "store", DESCRIPTION)
    return tmp_path / "store"


def refusal(store: Path) -> str:
    """Of reading all of a store, within some megabytes."""
    tracemalloc.start()
    try:
        with pytest.raises(StoreError) as caught:
            for _ in CandidateReader(store):
                pass
        assert tracemalloc.get_traced_memory()[1] < FEW_BYTES
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
def test_what_is_no_regular_file_is_not_waited_for(store: Path, name: str, kind: str) -> None:
    path = store / name
    path.unlink()
    {
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "directory": path.mkdir,
    }[kind]()
    found = {"pipe": "a pipe (FIFO)"}.get(kind, f"a {kind}")
    assert refusal(store) == f"{path}: cannot read (expected a regular file; found {found})"


@pytest.mark.parametrize("name", NAMES)
def test_a_sparse_file_of_a_terabyte_is_not_read(store: Path, name: str) -> None:
    os.truncate(store / name, HUGE)
    message = refusal(store)
    assert name in message
    assert str(HUGE) in message


def test_an_index_of_the_right_size_is_read_as_far_as_all_is_well(store: Path) -> None:
    """Of 2^36 documents, as store.json and the header say; all but the first offset is a hole."""
    many = 1 << 36
    about = json.loads((store / "store.json").read_text())
    about["description"] |= {"num_documents": many, "documents_per_shard": many}
    (store / "store.json").write_text(json.dumps(about))
    index, size = store / NAMES[2], 44 + 8 * (many + 1) + 8 * many + 4
    content = bytearray(index.read_bytes()[:52])
    struct.pack_into("<QQQ", content, 16, 0, many, HUGE)
    index.write_bytes(content)
    os.truncate(index, size)
    os.truncate(store / NAMES[3], HUGE)
    fingerprint = StoreDescription(**about["description"]).fingerprint
    manifest = json.loads((store / "manifest.json").read_text())
    manifest |= {"description_sha256": fingerprint, "shards": [[HUGE, 0, 0]]}
    (store / "manifest.json").write_text(json.dumps(manifest))
    assert refusal(store) == f"{index}: the index is damaged: its offsets do not ascend"


def lengthen_the_last_record(store: Path) -> None:
    """Shard 0 says that it has a terabyte, and every checksum that can be known is right."""
    records, index = store / NAMES[3], bytearray((store / NAMES[2]).read_bytes())
    os.truncate(records, HUGE)
    struct.pack_into("<Q", index, 32, HUGE)
    struct.pack_into("<q", index, 44 + 16, HUGE)
    struct.pack_into("<I", index, len(index) - 4, zlib.crc32(index[:-4]))
    (store / NAMES[2]).write_bytes(index)
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["shards"][0] = [HUGE, *struct.unpack_from("<I", index, 40), zlib.crc32(index[:-4])]
    (store / "manifest.json").write_text(json.dumps(manifest))


def test_a_record_of_a_terabyte_is_not_read(store: Path) -> None:
    lengthen_the_last_record(store)
    message = refusal(store)
    assert message.startswith(f"{store / NAMES[3]}, document 1: a record of 1 positions has an imp")


def test_a_record_of_a_terabyte_is_not_copied(store: Path, tmp_path: Path) -> None:
    lengthen_the_last_record(store)
    with pytest.raises(StoreError, match="a record of 1 positions has an impossible size"):
        merge_parts([store], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("shard-0000000.bin*")] == []


@pytest.mark.parametrize("documents", [1 << 62, 10**7 + 1])
def test_shards_without_number_are_refused(store: Path, documents: int) -> None:
    about = json.loads((store / "store.json").read_text())
    about["description"] |= {"num_documents": documents, "documents_per_shard": 1}
    (store / "store.json").write_text(json.dumps(about))
    (store / "manifest.json").unlink()
    least = -(-documents // 10**7)
    assert f"unusable documents_per_shard of a store (expected {least} or more; f" in refusal(store)


def test_a_manifest_larger_than_its_shards_need_is_not_parsed(store: Path) -> None:
    with open(store / "manifest.json", "a") as manifest:
        manifest.write(" " * 2000)
    assert "manifest.json: damaged: too large (expected at most 1280 bytes; found" in refusal(store)
