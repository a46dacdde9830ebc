"""What the writer accepts, refuses, leaves behind, removes, and how it shares a directory."""

from __future__ import annotations

import dataclasses
import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.errors import OutputError, StoreError
from megatron_replay.locks import DirectoryLock
from megatron_replay.store import CandidateReader, CandidateWriter
from tests.store.examples import (
    contents,
    describe,
    document_of,
    draw_document,
    require_sound,
    write_shard,
    write_store,
)


def test_any_order_and_number_of_writers_give_the_same_bytes(tmp_path: Path) -> None:
    description = describe(num_documents=7, documents_per_shard=2)
    write_store(tmp_path / "one", description)
    first = CandidateWriter(tmp_path / "many", description)
    second = CandidateWriter(tmp_path / "many", description)
    for writer, number in [(first, 3), (second, 0), (first, 2)]:
        write_shard(writer, number)
    assert second.missing_shards() == [1]
    write_shard(second, 1)
    first.finish()
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    write_store(tmp_path / "many", description)  # a finished store can be finished again
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_another_description_is_refused_with_every_difference(tmp_path: Path) -> None:
    CandidateWriter(tmp_path, describe())
    changed = describe(vocab_size=100, selection={"coverage": 0.9, "max_candidates": 200})
    with pytest.raises(StoreError) as caught:
        CandidateWriter(tmp_path, changed)
    message = str(caught.value)
    assert "another vocab_size, selection.coverage, selection.position_seed" in message
    expected = "vocab_size = 100, selection.coverage = 0.9, selection.position_seed = absent"
    found = "vocab_size = 151936, selection.coverage = 0.95, selection.position_seed = 1"
    assert f"(expected {expected}; found {found})" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "unusable vocab_size of a store (expected 1 to 16777216; found 0)"),
        ({"vocab_size": 2**24 + 1}, "found 16777217"),
        ({"num_documents": 0}, "unusable num_documents"),
        ({"documents_per_shard": True}, "expected int; found True"),
        ({"codec": "zip"}, "unusable codec of a store (expected one of planar; found zip)"),
        ({"logits": "fp8"}, "expected one of none, fp16, bf16; found fp8"),
        ({"corpus_fingerprint": 5}, "unusable corpus_fingerprint"),
        ({"selection": {"betas": (1, 2)}}, "expected plain JSON values"),
        ({"selection": {"coverage": float("nan")}}, "expected plain JSON values"),
        ({"selection": {"device": object()}}, "expected plain JSON values"),
    ],
)
def test_an_unusable_description_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreError) as caught:
        describe(**change)
    assert message in str(caught.value)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.permutations(range(8)), st.sampled_from(["none", "fp16"]))
def test_any_order_of_documents_gives_the_same_bytes(order: list[int], logits: str) -> None:
    description = describe(num_documents=8, documents_per_shard=8, logits=logits)
    with tempfile.TemporaryDirectory() as name:
        write_store(Path(name, "ascending"), description)
        writer, added = CandidateWriter(Path(name, "any"), description), set[int]()
        with writer.shard(0) as shard:
            for document_id in order:
                shard.add(document_id, document_of(description, document_id))
                added.add(document_id)
                assert shard.missing_documents() == [d for d in range(8) if d not in added]
        writer.finish()
        assert contents(Path(name, "any")) == contents(Path(name, "ascending"))


def test_each_document_of_a_shard_comes_once(tmp_path: Path) -> None:
    writer = CandidateWriter(tmp_path, describe())
    document = document_of(writer.description, 3)  # of shard 1, with document 2

    def write(number: int, documents: tuple[int, ...]) -> None:
        with writer.shard(number) as shard:
            for document_id in documents:
                shard.add(document_id, document)

    def refusal(number: int, *documents: int) -> str:
        with pytest.raises(StoreError) as caught:
            write(number, documents)
        return str(caught.value)

    for others in [1], [4], [2, 4], [2, 3, 4]:
        assert refusal(1, *others).startswith(f"document {others[-1]}: ")
        assert f"(expected 2 to 3; found {others[-1]})" in refusal(1, *others)
    assert "(expected 4 to 4; found 5)" in refusal(2, 4, 5)
    for again in [2, 2], [3, 3], [2, 3, 2], [3, 2, 3]:
        assert refusal(1, *again).startswith(f"document {again[-1]}: ")
        assert "(expected once; found twice)" in refusal(1, *again)
    for some in [2], [3]:
        assert "0000/shard-0000001.bin: " in refusal(1, *some)
        assert "(expected 2 documents; found 1)" in refusal(1, *some)
    assert "no such shard (expected 0 to 2; found 3)" in refusal(3)
    assert list(contents(tmp_path)) == ["store.json"]


def test_an_unfinished_store_is_not_finished_or_read(tmp_path: Path) -> None:
    writer = CandidateWriter(tmp_path, describe())
    write_shard(writer, 0)
    write_shard(writer, 2)
    with pytest.raises(StoreError, match="unfinished: 2 of 3 shards; the first missing is 1"):
        writer.finish()
    with pytest.raises(StoreError, match=r"unfinished: 2 of 3 shards.* Rerun Stage 0"):
        CandidateReader(tmp_path)
    write_shard(writer, 1)
    os.truncate(tmp_path / "0000/shard-0000001.bin", 13)
    with pytest.raises(StoreError, match=r"Delete shard-0000001.idx and rerun Stage 0"):
        writer.finish()


RNG = np.random.default_rng(0)
Change = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: {"lse": d["lse"] + 70_000}, "lse does not fit fp16 (expected at most 65504"),
        (lambda d: {"label_logprob": d["lse"] * np.nan}, "label_logprob does not fit fp16"),
        (lambda d: {"logits": d["logits"] * np.float16(np.inf)}, "logits does not fit fp16"),
        (lambda d: {"logits": None}, "expected logits; found no logits"),
        (lambda d: {"tail_mass": -d["tail_mass"]}, "tail_mass is no probability"),
        (lambda d: {"tail_mass": d["tail_mass"] + 1}, "tail_mass is no probability"),
        (lambda d: {"positions": d["positions"][::-1]}, "positions do not ascend"),
        (lambda d: {"positions": d["positions"][::-1].astype(np.uint32)}, "positions do not asc"),
        (lambda d: {"positions": d["positions"] - 5000}, "positions do not ascend from 0"),
        (lambda d: {"ids": d["ids"][::-1]}, "candidate ids do not ascend"),
        (lambda d: {"ids": np.repeat(d["ids"][:1], 6)}, "candidate ids do not ascend"),
        (lambda d: {"ids": d["ids"] - 200_000}, "lies outside the vocabulary"),
        (lambda d: {"ids": d["ids"] + 151_936}, "lies outside the vocabulary"),
        (lambda d: {"ids": np.append(d["ids"][:-1], 151_936)}, "to 151936)"),
        (lambda d: {"ids": d["ids"].astype(np.float32)}, "expected integers [6]; found float32"),
        (lambda d: {"lse": d["lse"][:2]}, "wrong lse (expected floats [3]; found float32 [2])"),
        (lambda d: {"offsets": d["offsets"][:-1]}, "wrong offsets"),
        (lambda d: {"offsets": d["offsets"] + 1}, "offsets do not span the ids"),
        (lambda d: {"offsets": np.array([0, 0, 3, 6])}, "found 0 to 3"),
        (lambda d: {"offsets": np.array([0, 5, 3, 6])}, "found -2 to 5"),
        (
            lambda _: vars(draw_document(RNG, vocab_size=300, set_sizes=[257], has_logits=True)),
            "expected 1 to 256; found 257",
        ),
    ],
)
def test_invalid_candidates_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    good = draw_document(RNG, vocab_size=151_936, set_sizes=[1, 2, 3], has_logits=True)
    bad = dataclasses.replace(good, **change(vars(good)))
    writer = CandidateWriter(tmp_path, describe(logits="fp16"))
    with pytest.raises(StoreError) as caught, writer.shard(0) as shard:
        shard.add(0, bad)
    assert str(caught.value).startswith("document 0: ")
    assert message in str(caught.value)


def test_a_second_run_is_refused_until_the_first_lets_go(tmp_path: Path) -> None:
    with CandidateWriter(tmp_path, describe(), lock=True):
        CandidateWriter(tmp_path, describe())  # another process of the same run
        with pytest.raises(OutputError, match="another run is writing this store"):
            CandidateWriter(tmp_path, describe(), lock=True)
    writer = CandidateWriter(tmp_path, describe(), lock=True)
    write_store(tmp_path, describe())
    writer.finish()  # releases too
    CandidateWriter(tmp_path, describe(), lock=True).close()


@pytest.mark.parametrize("step", range(5))
def test_a_full_disk_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The n-th fsync of a shard (new directory, .bin, rename, .idx, rename) finds no space."""
    writer, steps, sync = CandidateWriter(tmp_path, describe()), [], os.fsync

    def fsync(fd: int) -> None:
        steps.append(fd)
        if len(steps) == step + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutputError, match="no space left on the device"):
        write_shard(writer, 0)
    monkeypatch.undo()
    assert not list(tmp_path.rglob(".*.tmp.*"))
    # After the last rename only the directory's fsync is to come: the shard is there, and whole.
    assert writer.missing_shards() == ([0, 1, 2] if step < 4 else [1, 2])
    require_sound(write_store(tmp_path, describe()))


def everything(directory: Path) -> dict[str, bytes | None]:
    """Each path below ``directory``, and what is in it; None: a directory."""
    paths = sorted(directory.rglob("*"))
    return {str(p.relative_to(directory)): p.read_bytes() if p.is_file() else None for p in paths}


def put(directory: Path, name: str, content: bytes = b"mine") -> Path:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt", ".notes.tmp.txt", ".draft.tmp.1", "photos/.cat.tmp.jpg", ".write-test.py",
        ".store.json.tmp.old", "0000/.shard-0000001.bin.tmp.7", "manifest.json",
        ".manifest.json.tmp.1", ".lock",
    ],
)  # fmt: skip
@pytest.mark.parametrize("lock", [True, False])
def test_a_directory_of_other_files_is_refused_and_left_as_it_is(
    tmp_path: Path, name: str, lock: bool
) -> None:
    put(tmp_path, name)
    before = everything(tmp_path)
    with pytest.raises(OutputError, match=r"not a store's .*found .*give another directory") as e:
        CandidateWriter(tmp_path, describe(), lock=lock)
    assert f"found {name.split('/')[0]})" in str(e.value)
    assert everything(tmp_path) == before


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


@pytest.mark.parametrize("lock", ["written", "empty"])
def test_what_a_killed_run_began_with_is_continued(tmp_path: Path, lock: str) -> None:
    """Killed before store.json had its name: the lock, and temporary files of no content."""
    if lock == "written":
        DirectoryLock(tmp_path, purpose="it").release()
    else:
        put(tmp_path, ".lock", b"")
    put(tmp_path, ".store.json.tmp.4321", b"{")
    put(tmp_path, ".write-test.4321", b"")
    CandidateWriter(tmp_path, describe(), lock=True).close()
    assert sorted(everything(tmp_path)) == [".lock", "store.json"]


def test_a_store_removes_the_temporary_files_that_it_makes_and_no_others(tmp_path: Path) -> None:
    write_store(tmp_path, describe())
    ours = [
        ".store.json.tmp.1", ".manifest.json.tmp.12", ".report.json.tmp.3", ".cost.json.tmp.4",
        ".write-test.99999", "0000/.write-test.99999", "0000/.shard-0000001.bin.tmp.99999",
        "0000/.shard-0000001.idx.tmp.99999",
    ]  # fmt: skip
    theirs = [
        ".notes.tmp.txt", ".draft.tmp.1", "photos/.cat.tmp.jpg", ".write-test.py",
        ".store.json.tmp.old", "0000/.draft.tmp.1", "notes/.shard-0000001.bin.tmp.7",
        "0000/sub/.write-test.1",
    ]  # fmt: skip
    for name in ours + theirs:
        put(tmp_path, name)
    (tmp_path / ".write-test.5").mkdir()
    elsewhere = put(tmp_path.parent / "elsewhere", ".write-test.6")
    (tmp_path / "0001").symlink_to(elsewhere.parent)
    (tmp_path / ".write-test.7").symlink_to(elsewhere)
    before = everything(tmp_path)
    CandidateWriter(tmp_path, describe())
    assert everything(tmp_path) == before  # only who holds the lock knows that nobody writes
    CandidateWriter(tmp_path, describe(), lock=True).close()
    after = everything(tmp_path)
    assert after.pop(".lock")
    assert after == {name: content for name, content in before.items() if name not in ours}
    assert elsewhere.exists()
