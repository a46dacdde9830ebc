"""Writing a store shard by shard, from any number of processes, across any number of deaths.

A shard is published as ``.bin`` (tmp, fsync, rename) and then ``.idx`` (the same): it is there if
and only if its ``.idx`` is, so a kill at any moment loses at most the shards under way. Content is
a pure function of the documents: a store finished after ten kills equals one finished at once.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NoReturn

import numpy as np

from megatron_replay.errors import OutputError, StoreError, few
from megatron_replay.files import atomic_file, make_directory, reported
from megatron_replay.locks import LOCK_FILE, DirectoryLock, is_ours
from megatron_replay.store.document import DocumentCandidates, located, require, require_valid
from megatron_replay.store.format import (
    BIN_HEADER,
    BIN_MAGIC,
    FORMAT_VERSION,
    ShardIndex,
    encode_index,
    encode_record,
)
from megatron_replay.store.manifest import (
    DESCRIPTION_FILE,
    StoreDescription,
    bin_path,
    index_path,
    present_shards,
    read_description,
    refuse_differences,
    write_description,
    write_manifest,
)


class ShardWriter:
    """Takes the documents of one shard in any order; made by ``CandidateWriter.shard``.

    The file has them ascending, so its bytes do not depend on the order of arrival. A document that
    comes early is held, encoded, until all before it are written: memory holds at most the records
    of one shard, which ``documents_per_shard`` bounds.
    """

    def __init__(self, handle: IO[bytes], description: StoreDescription, documents: range) -> None:
        self._handle, self._description, self._documents = handle, description, documents
        header = BIN_HEADER.pack(BIN_MAGIC, FORMAT_VERSION)
        handle.write(header)
        self._crc = zlib.crc32(header)
        self._offsets = [len(header)]
        self._record_crcs: list[int] = []
        self._stops: list[int] = []
        self._early: dict[int, tuple[bytes, int]] = {}

    def add(self, document_id: int, candidates: DocumentCandidates) -> None:
        """Add a document; every document of the shard once, in any order, P = 0 allowed.

        Raises:
            StoreError: a document of another shard, a document that was added before, or not valid
                candidates (a field of another length, ids out of order or vocabulary, a number that
                does not fit fp16, ...).
        """
        first, last = self._documents[0], self._documents[-1]
        with located(f"document {document_id}"):
            what = "a shard takes only its own documents"
            require(document_id in self._documents, what, f"{first} to {last}", document_id)
            is_new = document_id >= self._following and document_id not in self._early
            require(is_new, "a shard takes each document once", "once", "twice")
            vocab_size, logits = self._description.vocab_size, self._description.logits
            require_valid(candidates, vocab_size=vocab_size, logits=logits)
        record = encode_record(candidates, vocab_size=vocab_size, logits=logits)
        self._early[document_id] = record, candidates.stop
        while self._following in self._early:
            self._write(*self._early.pop(self._following))

    def missing_documents(self) -> list[int]:
        """Documents still to be added, ascending."""
        unwritten = self._documents[len(self._stops) :]
        return [document for document in unwritten if document not in self._early]

    def index(self) -> ShardIndex:
        """The index of the shard; StoreError where documents are still to come."""
        missing, expected = len(self.missing_documents()), len(self._documents)
        what = "a shard was closed before all its documents were added"
        require(not missing, what, f"{expected} documents", expected - missing)
        return ShardIndex(
            first_document=self._documents.start,
            offsets=np.array(self._offsets, np.int64),
            record_crcs=np.array(self._record_crcs, np.uint32),
            stops=np.array(self._stops, np.int32),
            bin_crc=self._crc,
        )

    @property
    def _following(self) -> int:
        """The document whose record is the next of the file."""
        return self._documents.start + len(self._stops)

    def _write(self, record: bytes, stop: int) -> None:
        self._handle.write(record)
        self._crc = zlib.crc32(record, self._crc)
        self._record_crcs.append(zlib.crc32(record))
        self._stops.append(stop)
        self._offsets.append(self._offsets[-1] + len(record))


class CandidateWriter:
    """Creates the store in ``directory``, or continues one of the same description.

    Of the processes that write one store together, one passes ``lock=True``: it creates the
    directory before the others open it, keeps other runs out as long as it lives, and removes what
    dead runs left unfinished. Each process then writes shards of its own; one calls ``finish``.

    Raises:
        StoreError: the directory holds a store of another description; names each difference.
        OutputError: the directory holds anything else, cannot be written to, or another run holds
            its lock.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        description: StoreDescription,
        *,
        lock: bool = False,
    ) -> None:
        require_free(Path(directory))
        self.directory, self.description = make_directory(directory), description
        self._lock = DirectoryLock(self.directory, purpose="this store") if lock else None
        if not (self.directory / DESCRIPTION_FILE).exists():
            write_description(self.directory, description)
        refuse_differences(
            description.flat(),
            read_description(self.directory).flat(),
            where=self.directory,
            fix="Use the settings of the store, or give another directory",
        )
        if lock:
            remove_leftovers(self.directory)

    def missing_shards(self) -> list[int]:
        """Numbers of the shards still to be written, ascending."""
        there = present_shards(self.directory)
        return [s for s in range(self.description.num_shards) if s not in there]

    @contextmanager
    def shard(self, number: int) -> Iterator[ShardWriter]:
        """Write shard ``number``; it is published when the block ends without an error.

        Raises:
            StoreError: no such shard, or the block ended before its last document.
            OutputError: no space, no permission; nothing was published.
        """
        most = self.description.num_shards - 1
        if not 0 <= number <= most:
            what = "no such shard"
            raise StoreError(what, where=self.directory, expected=f"0 to {most}", found=number)
        records = bin_path(self.directory, number)
        if not records.parent.is_dir():
            make_directory(records.parent)
        with atomic_file(records) as handle:
            shard = ShardWriter(handle, self.description, self.description.documents(number))
            yield shard
            with located(records):
                index = shard.index()
        with atomic_file(index_path(self.directory, number)) as handle:
            handle.write(encode_index(index))

    def finish(self) -> None:
        """Check that every shard is there in full size, write the manifest, release the lock.

        Raises:
            StoreError: shards are missing or damaged.
        """
        missing, total = self.missing_shards(), self.description.num_shards
        if missing:
            raise StoreError(
                f"unfinished: {total - len(missing)} of {total} shards; the first missing is "
                f"{missing[0]}",
                where=self.directory,
            )
        write_manifest(self.directory, self.description)
        self.close()

    def close(self) -> None:
        """Release the lock, if this writer holds it."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> CandidateWriter:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


#: Names that ``files.make_directory`` and ``files.atomic_file`` leave behind when they are killed:
#: in the first files of a store, and at their paths in a store.
_TRIED = r"\.write-test\.\d+"
_BEGINNING = re.compile(rf"\.store\.json\.tmp\.\d+|{_TRIED}")
_LEFTOVER = re.compile(
    r"\.(store|manifest|report|cost)\.json\.tmp\.\d+"
    rf"|(\d{{4,}}/)?{_TRIED}|\d{{4,}}/\.shard-\d{{7,}}\.(bin|idx)\.tmp\.\d+"
)


def require_free(directory: Path) -> None:
    """Raise unless ``directory`` is missing, empty, a store, or what a killed run left of one."""
    with reported(directory):
        names = sorted(os.listdir(directory)) if directory.exists() else []
    if DESCRIPTION_FILE in names:
        read_description(directory)
        return
    # An empty lock is of a run that was killed before it wrote its name.
    if LOCK_FILE in names and (is_ours(directory) or (directory / LOCK_FILE).lstat().st_size == 0):
        names.remove(LOCK_FILE)
    others = [name for name in names if not _BEGINNING.fullmatch(name)]
    if others:
        raise OutputError(
            "the directory holds files that are not a store's",
            where=directory,
            expected="a new or empty directory, or a store",
            found=few(others),
            fix="Nothing was written: give another directory",
        )


def remove_leftovers(directory: Path) -> None:
    """Remove the temporary files of killed runs from a store whose lock is held."""

    def fail(error: OSError) -> NoReturn:
        raise error

    with reported(directory):
        for folder, _, names in os.walk(directory, onerror=fail):
            for path in (Path(folder, name) for name in names if name.startswith(".")):
                leftover = _LEFTOVER.fullmatch(path.relative_to(directory).as_posix())
                if leftover and path.is_file() and not path.is_symlink():
                    path.unlink(missing_ok=True)
