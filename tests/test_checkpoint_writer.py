"""Threads of this process write a checkpoint's files: no fork, and no wait without a limit."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import pickle
import queue
import threading
import zlib

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils.tensorboard import SummaryWriter

from megatron_replay.data.loader import Loader
from megatron_replay.platform import checkpoint_writer
from megatron_replay.platform.checkpoint_writer import checkpointing
from tests import pool

SAVES = 300


def content(rank: int = 0, size: int = 1) -> dict[str, ShardedTensor]:
    return {
        name: ShardedTensor.from_rank_offsets(name, torch.full((4, 8), i + rank), (0, rank, size))
        for i, name in enumerate(("first", "second", "third"))
    }


def save_alone(rank: int, world_size: int, folder) -> tuple[dict, dict, int]:
    """Our files, those of megatron-core's own function, and the number of processes started."""
    started = []
    process = multiprocessing.get_context("fork").Process
    process.start = lambda self: started.append(self)
    kept, ours = [], filesystem_async.FileSystemWriterAsync
    with checkpointing() as written:
        write = ours.write_preloaded_data_multiproc

        def keeping(transforms, msc, rank, buckets, results):
            kept.append((transforms, buckets))
            write(transforms, msc, rank, buckets, results)

        ours.write_preloaded_data_multiproc = staticmethod(keeping)
        (folder / "ours").mkdir()
        dist_checkpointing.save(content(), str(folder / "ours"))
    [(transforms, buckets)] = kept
    for number, (path, name, data) in enumerate(buckets):
        theirs, done = queue.Queue(), queue.Queue()
        done.put(number)
        bucket = (path.replace("ours", "theirs"), name, data)
        (folder / "theirs").mkdir(exist_ok=True)
        ours.write_preloaded_data(transforms, number, bucket, theirs, done, use_fsync=True)
        assert not isinstance(theirs.get()[1], Exception)
    read = {
        side: {path.name: path.read_bytes() for path in (folder / side).glob("*.distcp")}
        for side in ("ours", "theirs")
    }
    return read, dict(written), len(started)


@pytest.mark.distributed
def test_same_bytes_as_megatron_cores_and_no_process(tmp_path):
    [(read, written, started)] = pool.run(1, save_alone, tmp_path)
    assert started == 0
    assert len(read["ours"]) == 2
    assert read["ours"] == read["theirs"]
    assert written == {name: (len(data), zlib.crc32(data)) for name, data in read["ours"].items()}


@contextlib.contextmanager
def busy(folder):
    """Threads that take and release the locks that a trainer's own threads have."""
    stop, events = threading.Event(), SummaryWriter(str(folder))

    def load():
        with Loader(lambda step: torch.zeros(step), range(3), depth=2) as loader:
            assert len(list(loader)) == 3

    def repeat(work):
        while not stop.wait(0.0005):
            work()

    works = (
        lambda: torch.ones(64, 64) @ torch.ones(64, 64),
        lambda: events.add_scalar("x", 1.0, 1),
        lambda: bytearray(1 << 16),
        load,
    )
    threads = [threading.Thread(target=repeat, args=[work], daemon=True) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        events.close()


def save_often(rank: int, world_size: int, folder) -> int:
    with busy(folder / "events"):
        for number in range(SAVES):
            path = folder / str(number)
            path.mkdir(exist_ok=True)
            with checkpointing():
                dist_checkpointing.save(content(rank, world_size), str(path))
    with checkpointing():
        loaded = dist_checkpointing.load(content(rank, world_size), str(path))
    return int(loaded["second"].sum())


@pytest.mark.distributed
def test_hundreds_of_saves_beside_busy_threads(tmp_path):
    assert pool.run(1, save_often, tmp_path) == [4 * 8]


def refused(rank: int, world_size: int, folder, fault: str) -> str:
    write, save, hung = checkpoint_writer.CountingFile.write, torch.save, threading.Event()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def failing(self, data):
        if rank == 1 and fault == "full":
            full()
        if rank == 1 and fault == "hangs":
            hung.wait()
        if rank == 1 and fault == "dies":
            raise SystemExit  # ends a thread silently
        return write(self, data)

    checkpoint_writer.CountingFile.write = failing
    places = {"common": (torch, "save"), "metadata": (pickle, "dump"), "config": (json, "dump")}
    if fault in places and rank == 0:
        setattr(*places[fault], full)
        checkpoint_writer.CountingFile.write = lambda self, data: write(self, data)
    folder.mkdir(exist_ok=True)
    try:
        with checkpointing(stall_seconds=0.5 if fault == "hangs" else 60):
            dist_checkpointing.save(content(rank, world_size), str(folder))
    except (CheckpointException, OSError) as error:
        return str(error)
    finally:
        torch.save = save
    return "saved"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("fault", "printed"),
    [
        ("full", "No space left"), ("hangs", "the disk accepted nothing"), ("dies", "SystemExit"),
        ("common", "No space left"), ("metadata", "No space left"), ("config", "No space left"),
    ],
)  # fmt: skip
def test_a_writer_that_fails_is_an_error_on_every_rank(tmp_path, fault, printed):
    first, second = pool.run(2, refused, tmp_path / "it", fault)
    assert printed in first  # rank 0 reports the details of all ranks
    assert second.startswith("saved" if fault in ("metadata", "config") else "Checkpoint")
