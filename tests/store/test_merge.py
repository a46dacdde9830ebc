"""Parts of one store are merged; anything else is refused."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_replay.errors import ConfigError, StoreError
from megatron_replay.store import CandidateReader, CandidateWriter
from megatron_replay.store.merge import merge_parts
from tests.store.examples import contents, describe, document_of, write_shard, write_store
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
    for _ in range(2):  # the second time, nothing is to do
        assert main(arguments) == 0
        assert capfd.readouterr().out == f"{out}: 13 documents in 5 shards\n"
        assert contents(out) == contents(tmp_path / "whole")


def test_shards_that_no_part_has_are_named_and_may_come_later(tmp_path: Path) -> None:
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
    with pytest.raises(StoreError, match=r"another vocab_size, selection\.coverage"):
        merge_parts([one, other], tmp_path / "out")
    with pytest.raises(ConfigError, match="the output is also read, as IN"):
        merge_parts([one], one)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ("b/0000/shard-0000001.bin", "shard 1 is not the same in two parts"),
        ("a/0000/shard-0000000.bin", "shard-0000000.bin: damaged: crc32 differs"),
        ("b/0000/shard-0000002.idx", "the index is damaged"),
        (None, "shard 1 is not the same in two parts"),
    ],
)
def test_damaged_or_other_shards_are_refused(
    tmp_path: Path, damaged: str | None, message: str
) -> None:
    parts = [write_part(tmp_path / "a", [0, 1]), write_part(tmp_path / "b", [1, 2, 3, 4])]
    if damaged is None:  # a whole and undamaged shard, but with other documents
        writer = CandidateWriter(tmp_path / "c", DESCRIPTION)
        write_shard(writer, 1, lambda about, document: document_of(about, document + 1))
        shutil.copytree(tmp_path / "c/0000", tmp_path / "b/0000", dirs_exist_ok=True)
    else:
        content = bytearray((tmp_path / damaged).read_bytes())
        content[-1] ^= 1
        (tmp_path / damaged).write_bytes(content)
    with pytest.raises(StoreError, match=message):
        merge_parts(parts, tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()
