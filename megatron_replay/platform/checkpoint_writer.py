"""Writes a checkpoint's files in threads of this process, with a crc32 of each file.

megatron-core writes them in processes that it forks (``write_preloaded_data_multiproc``), also when
it saves synchronously. A fork copies the locks of all threads in their state (gloo's, OpenMP's,
TensorBoard's, the loader's): a child that needs one which was held waits forever, its parent waits
for the child, and every rank for the parent.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import queue
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

#: Bytes between two syncs, which show a slow disk's progress and keep the page cache small.
_SYNC_BYTES = 256 << 20

#: {file name: (bytes, crc32)} of the files that this process wrote.
Written = dict[str, tuple[int, int]]


@contextlib.contextmanager
def checkpointing(*, stall_seconds: float = 600.0) -> Iterator[Written]:
    """Surround every call of dist_checkpointing with this; yields the files written inside.

    Patches of ``strategies.filesystem_async``:

    - ``FileSystemWriterAsync.write_preloaded_data_multiproc``: see above. The files are the same.
      A thread that fails, or writes nothing for ``stall_seconds``, is an error.
    - ``_results_queue``, which holds the writers' results: megatron-core's is in a manager process,
      which imports torch again (4 to 18 seconds on every rank) and outlives a rank that is killed.
      Our writers are threads, so a plain queue is enough.

    An error in the files that only rank 0 writes (``save_common``, ``finish``, ``save_config``) is
    raised at the end: raised at once, it would leave the other ranks waiting for rank 0.

    Silences torch's notices that its ShardedTensor API is deprecated: a user of the pinned release
    can do nothing about them.

    Raises:
        Exception: the first error of a writer or of rank 0's own files.
    """
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import common, filesystem_async

    writer, written, failures = filesystem_async.FileSystemWriterAsync, Written(), list[Exception]()

    def write(transforms: list[Any], _: bool, __: int, buckets: list[Any], results: Any) -> None:
        try:
            results.put(_write_buckets(transforms, buckets, written, stall_seconds))
        except Exception as error:  # megatron-core raises it on every rank, after a collective
            results.put(error)

    filesystem_async._results_queue = queue.Queue()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", FutureWarning)
        for owner, name in (
            (common.TorchCommonSaveStrategy, "save_common"),
            (writer, "finish"),
            (serialization, "save_config"),
        ):
            postponed = _postponed(getattr(owner, name), failures)
            stack.enter_context(_replaced(owner, name, postponed))
        method = "write_preloaded_data_multiproc"
        stack.enter_context(_replaced(writer, method, staticmethod(write)))
        yield written
    if failures:
        raise failures[0]


def _postponed(function: Callable[..., None], failures: list[Exception]) -> Callable[..., None]:
    @functools.wraps(function)
    def keeping(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except Exception as error:
            failures.append(error)

    return keeping


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner).get(name)  # getattr would unwrap a static method
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:  # inherited
            delattr(owner, name)
        else:
            setattr(owner, name, before)


class CountingFile(io.FileIO):
    """A file that counts, syncs and checksums the bytes written to it."""

    def __init__(self, path: str) -> None:
        super().__init__(path, "w")
        self.crc = self.count = self._synced = 0

    def write(self, data: Any, /) -> int:
        """Write as much of ``data`` as the disk accepts; return the number of bytes."""
        count = super().write(data)
        self.crc = zlib.crc32(memoryview(data).cast("B")[:count], self.crc)
        self.count += count
        if self.count - self._synced >= _SYNC_BYTES:
            os.fdatasync(self.fileno())
            self._synced = self.count
        return count


class _Writer(threading.Thread):
    """Writes one file; then ``results`` or ``error`` is set."""

    def __init__(self, transforms: list[Any], bucket: Any) -> None:
        # A daemon, because a disk that hangs must not prevent the process from ending.
        super().__init__(name="checkpoint writer", daemon=True)
        self._transforms = transforms
        self._path, self.name_in_checkpoint, (self._bytes, self._tensors) = bucket
        self.file: CountingFile | None = None
        self.results: list[Any] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._write()
        except BaseException as error:
            self.error = error

    def _write(self) -> None:
        from torch.distributed.checkpoint import filesystem

        # torch 2.6 has no choice of formats; later releases require one.
        formats = getattr(filesystem, "SerializationFormat", None)
        options: Any = {} if formats is None else {"serialization_format": formats.TORCH_SAVE}
        with CountingFile(self._path) as self.file, io.BufferedWriter(self.file) as stream:
            for item, data in [*self._bytes, *self._tensors]:
                where = self.name_in_checkpoint
                write: Any = filesystem._write_item
                result = write(*self._transforms, stream, data, item, where, **options)
                self.results.append(result)
            stream.flush()
            os.fsync(self.file.fileno())


def _write_buckets(
    transforms: list[Any], buckets: list[Any], written: Written, stall_seconds: float
) -> dict[int, list[Any]]:
    """Write each bucket into its file; return the results as megatron-core's function does."""
    writers = [_Writer(transforms, bucket) for bucket in buckets]
    for writer in writers:
        writer.start()
    count, since = -1, time.monotonic()
    while alive := [writer for writer in writers if writer.is_alive()]:
        alive[0].join(0.2)
        found = sum(writer.file.count for writer in writers if writer.file is not None)
        if found != count:
            count, since = found, time.monotonic()
        elif time.monotonic() - since > stall_seconds:
            raise TimeoutError(
                f"[Errno 110] the disk accepted nothing for {stall_seconds / 60:.0f} minutes"
            )
    for writer in writers:
        if isinstance(writer.error, Exception):
            raise writer.error
        if writer.error is not None:  # SystemExit and its like end a thread, not this process
            raise RuntimeError(f"a writer thread ended: {writer.error!r}") from writer.error
        assert writer.file is not None
        written[writer.name_in_checkpoint] = (writer.file.count, writer.file.crc)
    return {number: writer.results for number, writer in enumerate(writers)}
