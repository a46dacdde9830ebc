"""A store starts in an empty directory or its own, and removes nothing that is not its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_replay.errors import OutputError, StoreError
from megatron_replay.locks import DirectoryLock
from megatron_replay.store import CandidateWriter
from tests.store.examples import contents, describe, write_store

#: Names of somebody's files that look like a killed run's.
LOOKALIKES = [
    "notes.txt", ".notes.tmp.txt", ".draft.tmp.1", "photos/.cat.tmp.jpg", ".write-test.py",
    ".store.json.tmp.old", "0000/.shard-0000001.bin.tmp.7", "manifest.json", ".manifest.json.tmp.1",
]  # fmt: skip


def everything(directory: Path) -> dict[str, bytes | None]:
    """Each path below ``directory``, and what is in it; None: a directory."""
    paths = sorted(directory.rglob("*"))
    return {str(p.relative_to(directory)): p.read_bytes() if p.is_file() else None for p in paths}


def put(directory: Path, name: str, content: bytes = b"mine") -> Path:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("lock", [True, False])
@pytest.mark.parametrize("name", LOOKALIKES)
def test_a_directory_of_somebody_s_is_refused_and_left_as_it_is(
    tmp_path: Path, name: str, lock: bool
) -> None:
    put(tmp_path, name)
    before = everything(tmp_path)
    with pytest.raises(OutputError, match=r"not a store's .*found .*give another directory") as e:
        CandidateWriter(tmp_path, describe(), lock=lock)
    assert f"found {name.split('/')[0]})" in str(e.value)
    assert everything(tmp_path) == before


def test_a_lock_of_another_program_is_not_written_to(tmp_path: Path) -> None:
    put(tmp_path, ".lock", b"pid 7")
    with pytest.raises(OutputError, match=r"found \.lock"):
        CandidateWriter(tmp_path, describe(), lock=True)
    assert everything(tmp_path) == {".lock": b"pid 7"}


@pytest.mark.parametrize(
    "content", [b"{}", b'{"name": "app"}', b'{"format": "another"}', b"{"], ids=str
)
def test_a_store_json_of_another_program_is_refused(tmp_path: Path, content: bytes) -> None:
    put(tmp_path, "store.json", content)
    put(tmp_path, "0000/.shard-0000001.bin.tmp.7")
    before = everything(tmp_path)
    with pytest.raises(StoreError, match=r"store\.json"):
        CandidateWriter(tmp_path, describe(), lock=True)
    assert everything(tmp_path) == before


def test_many_strangers_are_counted(tmp_path: Path) -> None:
    for name in "abcde":
        put(tmp_path, name)
    with pytest.raises(OutputError, match=r"found a, b, c and 2 more"):
        CandidateWriter(tmp_path, describe())


def test_what_a_killed_run_began_with_is_gone_on_with(tmp_path: Path) -> None:
    """Killed before store.json had its name: the lock, and temporary files of no content."""
    DirectoryLock(tmp_path, purpose="it").release()
    put(tmp_path, ".store.json.tmp.4321", b"{")
    put(tmp_path, ".write-test.4321", b"")
    CandidateWriter(tmp_path, describe(), lock=True).close()
    assert sorted(everything(tmp_path)) == [".lock", "store.json"]


def test_an_empty_lock_is_one_of_a_run_killed_at_its_very_start(tmp_path: Path) -> None:
    put(tmp_path, ".lock", b"")
    CandidateWriter(tmp_path, describe(), lock=True).close()


def test_a_store_removes_the_temporary_files_that_it_makes_and_no_others(tmp_path: Path) -> None:
    write_store(tmp_path, describe())
    ours = [
        ".store.json.tmp.1", ".manifest.json.tmp.12", ".report.json.tmp.3", ".cost.json.tmp.4",
        ".write-test.99999", "0000/.write-test.99999", "0000/.shard-0000001.bin.tmp.99999",
        "0000/.shard-0000001.idx.tmp.99999",
    ]  # fmt: skip
    for name in ours:
        put(tmp_path, name, b"")
    theirs = [
        ".notes.tmp.txt", ".draft.tmp.1", "photos/.cat.tmp.jpg", ".write-test.py",
        ".store.json.tmp.old", "0000/.draft.tmp.1", "notes/.shard-0000001.bin.tmp.7",
        "0000/sub/.write-test.1",
    ]  # fmt: skip
    for name in theirs:
        put(tmp_path, name)
    (tmp_path / ".write-test.5").mkdir()
    elsewhere = put(tmp_path.parent / "elsewhere", ".write-test.6")
    (tmp_path / "0001").symlink_to(elsewhere.parent)
    before = everything(tmp_path)
    CandidateWriter(tmp_path, describe())
    assert everything(tmp_path) == before  # only who holds the lock knows that nobody writes
    CandidateWriter(tmp_path, describe(), lock=True).close()
    after = everything(tmp_path)
    assert after.pop(".lock")
    assert after == {name: content for name, content in before.items() if name not in ours}
    assert elsewhere.exists()


def test_shards_whose_store_json_is_lost_are_nobody_s(tmp_path: Path) -> None:
    write_store(tmp_path / "whole", describe())
    shutil.copytree(tmp_path / "whole", tmp_path / "copy")
    (tmp_path / "copy" / "store.json").unlink()
    with pytest.raises(OutputError, match=r"found 0000, manifest\.json"):
        CandidateWriter(tmp_path / "copy", describe())
    shutil.copy(tmp_path / "whole" / "store.json", tmp_path / "copy")
    CandidateWriter(tmp_path / "copy", describe())
    assert json.loads((tmp_path / "copy" / "store.json").read_text())
    assert contents(tmp_path / "copy") == contents(tmp_path / "whole")
