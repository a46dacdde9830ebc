"""Records to disk on a thread of their own, through a queue bounded in bytes.

The device continues while records are cut, encoded and written. Where the disk is slower than the
device, the device waits, and memory stays within the bound.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType

from megatron_replay.errors import OutputError
from megatron_replay.store import CandidateWriter, DocumentCandidates, no_candidates

#: Candidate sets that may wait for the disk: some seconds of a device's work.
QUEUE_BYTES = 64 << 20
#: Seconds that an error waits for a write in progress, so that its temporary file is removed.
ABORT_SECONDS = 5.0
#: Seconds within which a disk must take a part: a longer wait is an error.
STALL_SECONDS = 600.0

#: Documents and their records.
Records = Iterator[tuple[int, DocumentCandidates]]


class _AbortedError(Exception):
    """The producer failed: the shard must not be published."""


class ShardStream:
    """Write one shard: ``with ShardStream(...) as stream: stream.put(records, nbytes)``.

    The parts that wait and the one being written hold at most ``max_bytes``; a larger part is
    admitted alone. Documents come in any order; the writer holds encoded records that come early
    (see ``ShardWriter``). Documents in no part are written without candidates, at the end. The
    shard is published when the block ends without an error, and before the block returns: a killed
    process loses the shard it was writing, never two.

    Raises:
        Exception: any error of the writing thread, from the next ``put`` or at the block's end;
            nothing is published.
        OutputError: the disk has taken nothing for ``STALL_SECONDS``.

    Attributes:
        waited: seconds for which ``put`` and the block's end waited for the disk.
    """

    def __init__(
        self, writer: CandidateWriter, number: int, *, max_bytes: int = QUEUE_BYTES
    ) -> None:
        self._writer, self._number, self._max_bytes = writer, number, max_bytes
        self._parts: deque[tuple[Records, int]] = deque()
        self._held = 0
        self._closed = self._aborted = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write, name=f"shard {number}", daemon=True)
        self.waited = 0.0

    def put(self, records: Records, nbytes: int) -> None:
        """Take over a part of ``nbytes`` as soon as there is room for it.

        The writing thread iterates over ``records``, so a generator does its work there.
        """
        start = time.perf_counter()
        with self._changed:
            while self._held and self._held + nbytes > self._max_bytes and not self._error:
                self._require_motion(self._changed.wait)
            self.waited += time.perf_counter() - start
            if self._error is not None:
                raise self._error
            self._parts.append((records, nbytes))
            self._held += nbytes
            self._changed.notify_all()

    def __enter__(self) -> ShardStream:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        start = time.perf_counter()
        with self._changed:
            self._closed, self._aborted = True, kind is not None
            self._changed.notify_all()
        if kind is not None:
            self._thread.join(ABORT_SECONDS)
            return
        while self._thread.is_alive():
            self._require_motion(self._thread.join)
        self.waited += time.perf_counter() - start
        if self._error is not None:
            raise self._error

    def _require_motion(self, wait: Callable[[float], object]) -> None:
        """Wait for the disk; raise OutputError where it takes nothing for ``STALL_SECONDS``."""
        held, start = self._held, time.monotonic()
        wait(STALL_SECONDS)
        is_over = time.monotonic() - start >= STALL_SECONDS
        if is_over and self._held == held and self._thread.is_alive():
            raise OutputError(
                f"the disk has taken nothing for {STALL_SECONDS:.0f} s",
                where=self._writer.directory,
                fix="Check the disk or its server, then rerun the same command: it continues here",
            )

    def _write(self) -> None:
        empty = no_candidates(self._writer.description.logits)
        try:
            with self._writer.shard(self._number) as out:
                for document, record in self._records():
                    out.add(document, record)
                for document in out.missing_documents():
                    out.add(document, empty)
        except _AbortedError:
            pass
        except BaseException as error:
            with self._changed:
                self._error = error
                self._parts.clear()
                self._changed.notify_all()

    def _records(self) -> Records:
        """The records of every part, until the block ends."""
        while True:
            with self._changed:
                while not self._parts and not self._closed:
                    self._changed.wait()
                if self._aborted:
                    raise _AbortedError
                if not self._parts:
                    return
                records, nbytes = self._parts.popleft()
            for record in records:
                if self._aborted:
                    raise _AbortedError
                yield record
            with self._changed:
                self._held -= nbytes
                self._changed.notify_all()
