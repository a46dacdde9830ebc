"""Reading a finished store by document: memory-mapped, and nothing in it is trusted.

Opening a store reads its two JSON files. The index of a shard (16 bytes a document) is read and
checked when the shard is first used; a record's crc32 when it is first read, its contents always.
"""

from __future__ import annotations

import functools
import mmap
import os
import resource
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from operator import index as as_int
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt

from megatron_replay.errors import StoreError
from megatron_replay.files import open_regular
from megatron_replay.optional import BUILD, optional_module
from megatron_replay.store.document import (
    CandidateBatch,
    DocumentCandidates,
    decode_logits,
    located,
    require,
    require_numbers,
)
from megatron_replay.store.format import (
    BIN_HEADER,
    BIN_MAGIC,
    ShardIndex,
    decode_record,
    high_bits,
    require_header,
    require_likely,
)
from megatron_replay.store.manifest import (
    StoreDescription,
    bin_path,
    index_path,
    read_description,
    read_index,
    read_manifest,
    refuse_differences,
)

#: A mapping takes a file descriptor: a quarter of the process's limit, which is commonly 1,024.
MAX_MAPPED_SHARDS = max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
#: Documents decoded at a time where all are read: some megabytes.
DOCUMENTS_AT_ONCE = 64


class CandidateReader:
    """The candidate sets of a corpus: ``reader[document_id]``, ``len(reader)``.

    Several threads may share a reader. A pickled reader opens the store again. The files must not
    change while it is open.

    Raises:
        StoreError: no store, an unfinished one, or one that is damaged or of another version.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.description = read_description(self.directory)
        self.rows = read_manifest(self.directory, self.description)
        self._indexes: dict[int, ShardIndex] = {}
        self._checked: dict[int, npt.NDArray[np.bool_]] = {}  # records that passed their crc32
        self._mapped: dict[int, memoryview] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[CandidateReader], tuple[Path]]:
        return CandidateReader, (self.directory.absolute(),)

    def __len__(self) -> int:
        return self.description.num_documents

    def __getitem__(self, document_id: int) -> DocumentCandidates:
        """The candidates of a document, as copies that outlive the reader.

        Raises:
            IndexError: no such document.
            StoreError: the record is damaged.
        """
        [document] = self.read([document_id]).documents()
        return document

    def __iter__(self) -> Iterator[DocumentCandidates]:
        return (self[document_id] for document_id in range(len(self)))

    def read(self, document_ids: Sequence[int], *, logits: bool = True) -> CandidateBatch:
        """The candidates of several documents, end to end, in the order given.

        ``logits=False`` leaves out stored logits, undecoded.

        Raises:
            IndexError: no such document.
            StoreError: a record is damaged; names the first.
        """
        document_ids = [self._require_document(document_id) for document_id in document_ids]
        records = [self._record(document_id) for document_id in document_ids]
        batch = decode_batch(
            records, self.description, lambda i: self._where(document_ids[i]), logits=logits
        )
        for document_id, stop in zip(document_ids, batch.stops.tolist(), strict=True):
            number, row = divmod(document_id, self.description.documents_per_shard)
            expected = int(self.index(number).stops[row])
            if stop != expected:
                raise StoreError(
                    "the index has another last position",
                    where=self._where(document_id),
                    expected=expected - 1,
                    found=stop - 1,
                )
        return batch

    def batches(self, shard: int, *, logits: bool = True) -> Iterator[tuple[range, CandidateBatch]]:
        """All documents of a shard, some at a time, with their candidates, as by ``read``."""
        documents = self.description.documents(shard)
        for first in range(documents.start, documents.stop, DOCUMENTS_AT_ONCE):
            some = range(first, min(first + DOCUMENTS_AT_ONCE, documents.stop))
            yield some, self.read(some, logits=logits)

    def stops(self) -> npt.NDArray[np.int32]:
        """int32 [D]: each document's last recorded position plus one; 0 where none is recorded."""
        shards = range(self.description.num_shards)
        return np.concatenate([self.index(shard).stops for shard in shards])

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard; StoreError where a file is missing, damaged or another store's."""
        with self._lock:
            if shard not in self._indexes:
                index, row = read_index(self.directory, self.description, shard)
                require(
                    row == self.rows[shard],
                    f"shard {shard} is not the one the manifest was written for",
                    self.rows[shard],
                    row,
                    where=index_path(self.directory, shard),
                )
                self._checked[shard] = np.zeros(len(index.stops), np.bool_)
                self._indexes[shard] = index
            return self._indexes[shard]

    def shard_bytes(self, shard: int) -> memoryview:
        """The whole ``.bin`` of a shard, memory-mapped; only its header is checked."""
        with self._lock:
            if shard not in self._mapped:
                if len(self._mapped) >= MAX_MAPPED_SHARDS:  # drop the oldest
                    del self._mapped[next(iter(self._mapped))]
                self._mapped[shard] = self._map(shard)
            return self._mapped[shard]

    def require(
        self,
        *,
        fix: str = "Give the store of this corpus, or rerun Stage 0 on it",
        **expected: object,
    ) -> None:
        """Raise StoreError, naming each difference, unless the description has these fields.

        Args:
            expected: such as ``corpus_fingerprint``, ``tokenizer_fingerprint``, ``vocab_size``.
        """
        found = {name: getattr(self.description, name) for name in expected}
        refuse_differences(expected, found, where=self.directory, fix=fix)

    def _require_document(self, document_id: int) -> int:
        document_id = as_int(document_id)
        if not 0 <= document_id < len(self):
            raise IndexError(f"document {document_id} of a store of {len(self)}")
        return document_id

    def _record(self, document_id: int) -> memoryview:
        """The bytes of a document; the first time, its crc32 is checked."""
        number, row = divmod(document_id, self.description.documents_per_shard)
        index = self.index(number)
        start, stop = index.offsets[row : row + 2].tolist()
        record = self.shard_bytes(number)[start:stop]
        if not self._checked[number][row]:
            with located(self._where(document_id)):
                require_likely(record, len(record))
                is_same = zlib.crc32(record) == int(index.record_crcs[row])
                require(is_same, "damaged: the crc32 differs")
            self._checked[number][row] = True
        return record

    def _where(self, document_id: int) -> str:
        path = bin_path(self.directory, document_id // self.description.documents_per_shard)
        return f"{path}, document {document_id}"

    def _map(self, number: int) -> memoryview:
        path = bin_path(self.directory, number)
        with open_regular(path, StoreError) as handle, located(path):
            size = self.rows[number].bin_bytes
            try:
                content = memoryview(mmap.mmap(handle.fileno(), size, access=mmap.ACCESS_READ))
            except (OSError, ValueError) as error:  # ValueError: it is shorter
                raise StoreError(f"cannot read: {error}") from error
            magic, version = BIN_HEADER.unpack_from(content)
            require_header(magic, BIN_MAGIC, version)
        return content


@functools.cache
def compiled_records() -> ModuleType | None:
    """The module of csrc/store; None if it was not built. Raises ConfigError: it is broken."""
    return optional_module("megatron_replay.store._records", install=BUILD)


def decode_batch(
    records: Sequence[memoryview],
    description: StoreDescription,
    where: Callable[[int], object],
    *,
    logits: bool = True,
) -> CandidateBatch:
    """``records`` end to end, every rule of the format checked.

    The compiled decoder checks what ``decode_record`` checks, but only names the record that breaks
    a rule; ``decode_record`` then says which rule.

    Args:
        where: the place of the i-th record, for an error.
        logits: whether stored logits are decoded.

    Raises:
        StoreError: the first record that breaks a rule.
    """
    kind, vocab_size = description.logits, description.vocab_size

    def one(i: int) -> DocumentCandidates:
        with located(where(i)):
            return decode_record(records[i], vocab_size=vocab_size, logits=kind)

    compiled = compiled_records()
    if compiled is None:
        batch = CandidateBatch.of([one(i) for i in range(len(records))])
        return batch if logits else replace(batch, logits=None)
    found = compiled.decode_records(
        records, vocab_size=vocab_size, high_bits=high_bits(vocab_size), has_logits=kind != "none"
    )
    first_bad = found if isinstance(found, int) else 0
    if not isinstance(found, int):
        document_offsets, positions, offsets, halves, ids, stored_logits = found
        lse, label_logprob, tail_mass = halves.view("<f2").reshape(3, -1).astype(np.float32)
        has_logits = logits and kind != "none"
        batch = CandidateBatch(
            document_offsets=document_offsets,
            positions=positions,
            offsets=offsets,
            ids=ids,
            lse=lse,
            label_logprob=label_logprob,
            tail_mass=tail_mass,
            logits=decode_logits(stored_logits.data, kind) if has_logits else None,
        )
        with suppress(StoreError):  # of some record: ``one`` finds it
            require_numbers(batch, logits=kind)
            return batch
    for i in range(first_bad, len(records)):
        one(i)
    raise AssertionError(f"record {first_bad}: refused by the compiled decoder alone")
