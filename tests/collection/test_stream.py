"""Shards written on a thread of their own: within the bound, and never half of one."""

from __future__ import annotations

import os
import signal
import threading
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_replay.collection import stream as collection_stream
from megatron_replay.collection.stream import ShardStream
from megatron_replay.errors import OutputError, StoreError
from megatron_replay.store import CandidateReader, CandidateWriter, DocumentCandidates
from megatron_replay.store.writer import ShardWriter
from tests.store.examples import contents, describe, document_of, draw_document

SET_SIZE, POSITIONS = 100, 160
BOUND = 1 << 19


#: 160 positions with 100 candidates each.
DOCUMENT = draw_document(
    np.random.default_rng(0), vocab_size=1000, set_sizes=[SET_SIZE] * POSITIONS
)


def part(start: int, stop: int) -> tuple[Iterator[tuple[int, DocumentCandidates]], int]:
    """Documents ``start`` to ``stop``, cut when they are read; and their bytes."""
    ids = np.tile(DOCUMENT.ids, stop - start)
    cuts = enumerate(np.split(ids, stop - start), start)
    return ((number, replace(DOCUMENT, ids=own)) for number, own in cuts), ids.nbytes


def writer_of(directory: Path, num_documents: int) -> CandidateWriter:
    """Of a store of one shard."""
    description = describe(num_documents=num_documents, documents_per_shard=num_documents)
    return CandidateWriter(directory, description)


def write(writer: CandidateWriter, *parts: list[int], max_bytes: int = 100) -> None:
    """Parts of a byte each, with the documents of ``tests.store.examples``."""
    with ShardStream(writer, 0, max_bytes=max_bytes) as stream:
        for numbers in parts:
            stream.put(((d, document_of(writer.description, d)) for d in numbers), 1)


def published(directory: Path) -> list[str]:
    return [name for name in contents(directory) if name != "store.json"]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A slow disk, that takes nothing before this is set."""
    add, takes = ShardWriter.add, threading.Event()

    def slowly(self: ShardWriter, document_id: int, candidates: DocumentCandidates) -> None:
        takes.wait()
        time.sleep(0.0005)
        add(self, document_id, candidates)

    monkeypatch.setattr(ShardWriter, "add", slowly)
    return takes


def peak_while_writing(directory: Path, max_bytes: int, disk: threading.Event) -> tuple[int, int]:
    """(bytes of the store, most bytes that Python and numpy held at once)."""
    num_documents = 50 * BOUND // (2 * SET_SIZE * POSITIONS) // 2 * 2  # 2 bytes an id, and more
    writer = writer_of(directory, num_documents)
    tracemalloc.start()
    try:
        with ShardStream(writer, 0, max_bytes=max_bytes) as stream:
            for start in range(0, num_documents, 2):
                stream.put(*part(start, start + 2))
            disk.set()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return sum(path.stat().st_size for path in directory.rglob("*.bin")), peak


def test_memory_stays_within_the_bound_before_a_slow_disk(tmp_path, disk):
    disk.set()
    # Beside the bound: a part being made, one being cut, and what encoding a record takes.
    allowed = BOUND + (1 << 19)
    for attempt in range(3):  # what another thread allocates meanwhile counts, too
        written, peak = peak_while_writing(tmp_path / f"bounded-{attempt}", BOUND, disk)
        if peak < allowed:
            break
    assert written > 50 * BOUND
    assert peak < allowed
    disk.clear()
    _, peak = peak_while_writing(tmp_path / "unbounded", 1 << 40, disk)
    assert peak > 25 * BOUND


def test_a_part_beyond_the_bound_is_let_in_alone(tmp_path):
    writer = writer_of(tmp_path, 4)
    with ShardStream(writer, 0, max_bytes=1) as stream:
        stream.put(*part(0, 3))
        stream.put(*part(3, 4))
    writer.finish()
    assert len(CandidateReader(tmp_path)[3].positions) == POSITIONS


def test_documents_in_no_part_are_written_without_candidates(tmp_path):
    writer = writer_of(tmp_path, 8)
    write(writer, [2, 5], [1])
    writer.finish()
    sizes = [len(document.positions) for document in CandidateReader(tmp_path)]
    assert sizes == [0, 1, 2, 0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("documents", "facts"),
    [
        ([2, 1, 2], "document 2: .*expected once; found twice"),
        ([8], "document 8: .*expected 0 to 7; found 8"),
    ],
)
def test_a_document_added_twice_or_outside_the_shard_is_refused(tmp_path, documents, facts):
    writer = writer_of(tmp_path, 8)
    with pytest.raises(StoreError, match=facts):
        write(writer, documents)
    assert writer.missing_shards() == [0]


def test_an_error_of_the_disk_ends_the_work_at_once(tmp_path, monkeypatch):
    """With its own message, from a ``put`` long before the shard's end; nothing is published."""
    refusal, put = OutputError("no space left on the device"), []

    def refuse(self: ShardWriter, document_id: int, candidates: DocumentCandidates) -> None:
        if document_id == 5:
            raise refusal

    def work() -> None:
        with ShardStream(writer_of(tmp_path, 1000), 0, max_bytes=4) as stream:
            for document in range(1000):
                stream.put(iter([(document, None)]), 1)
                put.append(document)

    monkeypatch.setattr(ShardWriter, "add", refuse)
    with pytest.raises(OutputError) as caught:
        work()
    assert caught.value is refusal
    assert len(put) < 12  # the bound, beside what was written
    assert published(tmp_path) == []


def test_an_error_at_the_very_end_is_not_lost(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OutputError("no space left on the device")

    monkeypatch.setattr(ShardWriter, "index", fail)
    with pytest.raises(OutputError, match="no space"):
        write(writer_of(tmp_path, 2), [0, 1])
    assert published(tmp_path) == []


@pytest.mark.parametrize("documents", [[0], [0, 1]])
def test_an_error_of_the_work_publishes_nothing(tmp_path, documents):
    writer, before = writer_of(tmp_path, 2), threading.active_count()

    def work() -> None:
        with ShardStream(writer, 0) as stream:
            stream.put(((d, document_of(writer.description, d)) for d in documents), 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert threading.active_count() == before
    assert published(tmp_path) == []


def test_ctrl_c_ends_a_wait_for_the_disk(tmp_path, disk):
    def work() -> None:
        with ShardStream(writer_of(tmp_path, 2), 0, max_bytes=1) as stream:
            stream.put(*part(0, 1))
            threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGINT]).start()
            try:
                stream.put(*part(1, 2))  # waits for a disk that takes nothing
            finally:
                disk.set()

    # A shell starts what it puts into the background with SIGINT ignored, tests too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        signal.signal(signal.SIGINT, before)
    assert published(tmp_path) == []


@pytest.mark.parametrize("parts", [[[0]], [[0], [1]]])
def test_a_disk_that_hangs_is_an_error(tmp_path, disk, monkeypatch, parts):
    """Where a part is to be let in, and at the end."""
    monkeypatch.setattr(collection_stream, "STALL_SECONDS", 0.05)
    monkeypatch.setattr(collection_stream, "ABORT_SECONDS", 0.05)
    try:
        with pytest.raises(OutputError, match="the disk has taken nothing for 0 s"):
            write(writer_of(tmp_path, 2), *parts, max_bytes=1)
    finally:
        disk.set()
        for thread in threading.enumerate():
            if thread.name.startswith("shard"):
                thread.join()
