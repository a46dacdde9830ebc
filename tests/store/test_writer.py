"""What the writer accepts, refuses, leaves behind, and how it shares a directory."""

from __future__ import annotations

import dataclasses
import errno
import gc
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_replay.errors import OutputError, StoreError
from megatron_replay.store import CandidateReader, CandidateWriter
from tests import processes
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


def test_a_finished_store_can_be_finished_again(tmp_path: Path) -> None:
    write_store(tmp_path, describe())
    before = contents(tmp_path)
    write_store(tmp_path, describe())
    assert contents(tmp_path) == before


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
        (
            {"codec": "zip"},
            "unusable codec of a store (expected one of planar; found zip)",
        ),
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


def test_each_document_comes_once_and_in_order(tmp_path: Path) -> None:
    writer = CandidateWriter(tmp_path, describe())
    document = document_of(writer.description, 3)
    with (
        pytest.raises(StoreError, match=r"document 3: .*\(expected 2; found 3\)"),
        writer.shard(1) as shard,
    ):
        shard.add(3, document)
    with (
        pytest.raises(StoreError, match=r"0000/shard-0000001.bin: .*expected 2 documents; found 1"),
        writer.shard(1) as shard,
    ):
        shard.add(2, document)
    with writer.shard(2) as shard:
        shard.add(4, document)
        with pytest.raises(StoreError, match=r"expected no more; found 5"):
            shard.add(5, document)
    with pytest.raises(StoreError, match="no such shard"), writer.shard(3):
        pass
    assert writer.missing_shards() == [0, 1]
    assert list(contents(tmp_path)) == [
        "0000/shard-0000002.bin",
        "0000/shard-0000002.idx",
        "store.json",
    ]


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
    ],
)
def test_invalid_candidates_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    rng = np.random.default_rng(0)
    good = draw_document(rng, vocab_size=151_936, set_sizes=[1, 2, 3], has_logits=True)
    bad = dataclasses.replace(good, **change(vars(good)))
    writer = CandidateWriter(tmp_path, describe(logits="fp16"))
    with pytest.raises(StoreError) as caught, writer.shard(0) as shard:
        shard.add(0, bad)
    assert str(caught.value).startswith("document 0: ")
    assert message in str(caught.value)


def test_a_set_of_257_candidates_is_refused(tmp_path: Path) -> None:
    document = draw_document(np.random.default_rng(0), vocab_size=300, set_sizes=[257])
    writer = CandidateWriter(tmp_path, describe(vocab_size=300))
    with (
        pytest.raises(StoreError, match="expected 1 to 256; found 257"),
        writer.shard(0) as shard,
    ):
        shard.add(0, document)


def test_a_second_run_is_refused_until_the_first_lets_go(tmp_path: Path) -> None:
    with CandidateWriter(tmp_path, describe(), lock=True):
        CandidateWriter(tmp_path, describe())  # another process of the same run
        with pytest.raises(OutputError, match="another run is writing this store"):
            CandidateWriter(tmp_path, describe(), lock=True)
    gc.collect()
    writer = CandidateWriter(tmp_path, describe(), lock=True)
    write_store(tmp_path, describe())
    writer.finish()  # releases too
    CandidateWriter(tmp_path, describe(), lock=True).close()


def hold_for_ever(directory: Path) -> None:
    writer = CandidateWriter(directory, describe(), lock=True)
    (directory.parent / "held").touch()
    signal.pause()
    writer.close()


def test_the_lock_ends_with_its_holder(tmp_path: Path) -> None:
    store = tmp_path / "store"
    holder = processes.fork(hold_for_ever, store)
    processes.until((tmp_path / "held").exists, holder)
    with pytest.raises(OutputError, match="another run"):
        CandidateWriter(store, describe(), lock=True)
    os.kill(holder, signal.SIGKILL)
    assert processes.wait(holder) == -signal.SIGKILL
    CandidateWriter(store, describe(), lock=True).close()


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
    write_store(tmp_path, describe())
    require_sound(CandidateReader(tmp_path))


def write_beyond_a_limit(directory: Path) -> None:
    description = describe(num_documents=1, vocab_size=300)
    writer = CandidateWriter(directory, description)
    document = draw_document(np.random.default_rng(0), vocab_size=300, set_sizes=[256] * 40)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    with pytest.raises(OutputError), writer.shard(0) as shard:
        shard.add(0, document)


def test_a_write_cut_short_publishes_nothing(tmp_path: Path) -> None:
    """The kernel itself refuses the bytes: a limit on the size of files, in a child."""
    assert processes.wait(processes.fork(write_beyond_a_limit, tmp_path)) == 0
    assert list(contents(tmp_path)) == ["store.json"]
