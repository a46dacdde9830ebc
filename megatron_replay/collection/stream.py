"""Records to disk on a thread of their own, through a queue bounded in bytes.

The device goes on while records are cut, encoded and written; where the disk is slower than the
device, the device waits, and memory stays within the bound.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol

from megatron_replay.collection.records import every_document
from megatron_replay.errors import OutputError
from megatron_replay.store import CandidateWriter, DocumentCandidates

#: Candidate sets that may wait for the disk: some seconds of a device's work.
QUEUE_BYTES = 64 << 20
#: Seconds that an error waits for a write under way, so that its temporary file is removed.
_ABORT_SECONDS = 5.0
#: Seconds in which a disk must take a part: one that hangs is an error, not a wait.
_STALL_SECONDS = 600.0


class Part(Protocol):
    """Some documents of a shard, in order."""

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps in memory."""

    def records(self) -> Iterator[tuple[int, DocumentCandidates]]:
        """Its documents and their records."""


class _AbortedError(Exception):
    """The producer failed: the shard must not be published."""


class ShardStream:
    """Write one shard: ``with ShardStream(...) as stream: stream.put(part)``, parts in order.

    Parts that wait, and the one being written, hold at most ``max_bytes``; a part larger than that
    is let in alone. Beside them live the part that asks to be let in, the copy that cutting makes
    of one, and the last record of the one before. Documents in no part are written without
    candidates. The shard is published when the block has ended without an error, and the block has
    ended only then: a process that is killed loses one shard, never two.

    Raises:
        ReplayError, or whatever else the writing met: from the next ``put``, or the block's end;
            nothing is published.

    Attributes:
        waited: seconds for which ``put`` and the block's end waited for the disk.
    """

    def __init__(
        self, writer: CandidateWriter, number: int, *, max_bytes: int = QUEUE_BYTES
    ) -> None:
        self._writer, self._number, self._max_bytes = writer, number, max_bytes
        self._parts: deque[Part] = deque()
        self._held = 0
        self._closed = self._aborted = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write, name=f"shard {number}", daemon=True)
        self.waited = 0.0

    def put(self, part: Part) -> None:
        """Take over ``part``, once there is room for it."""
        start = time.perf_counter()
        with self._changed:
            while self._held and self._held + part.nbytes > self._max_bytes and not self._error:
                self._require_motion(self._changed.wait)
            self.waited += time.perf_counter() - start
            if self._error is not None:
                raise self._error
            self._parts.append(part)
            self._held += part.nbytes
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
            self._thread.join(_ABORT_SECONDS)
            return
        while self._thread.is_alive():
            self._require_motion(self._thread.join)
        self.waited += time.perf_counter() - start
        if self._error is not None:
            raise self._error

    def _require_motion(self, wait: Callable[[float], object]) -> None:
        """Wait for the disk; raise OutputError where it takes nothing for ``_STALL_SECONDS``."""
        held, start = self._held, time.monotonic()
        wait(_STALL_SECONDS)
        is_over = time.monotonic() - start >= _STALL_SECONDS
        if is_over and self._held == held and self._thread.is_alive():
            raise OutputError(
                f"the disk has taken nothing for {_STALL_SECONDS:.0f} s",
                where=self._writer.directory,
                fix="Look at the disk or its server; the same command goes on from here",
            )

    def _write(self) -> None:
        try:
            documents = self._writer.description.documents(self._number)
            with self._writer.shard(self._number) as out:
                for document, record in every_document(documents, self._records()):
                    out.add(document, record)
        except _AbortedError:
            pass
        except BaseException as error:
            with self._changed:
                self._error = error
                self._parts.clear()
                self._changed.notify_all()

    def _records(self) -> Iterator[tuple[int, DocumentCandidates]]:
        while (part := self._next()) is not None:
            for record in part.records():
                if self._aborted:
                    raise _AbortedError
                yield record
            with self._changed:
                self._held -= part.nbytes
                self._changed.notify_all()

    def _next(self) -> Part | None:
        with self._changed:
            while not self._parts and not self._closed:
                self._changed.wait()
            if self._aborted:
                raise _AbortedError
            return self._parts.popleft() if self._parts else None
