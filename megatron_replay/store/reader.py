"""Reading a finished store by document, memory-mapped and trusting nothing.

Opening reads both JSON files: a row a shard. A shard's index (16 bytes a document) is read and
checked against its row when the shard is first touched; a record's crc32 when it is first read,
its contents always.
"""

from __future__ import annotations

import mmap
import os
import resource
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import index as as_int
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_replay.errors import StoreError
from megatron_replay.files import open_regular
from megatron_replay.store.batch import decode_batch
from megatron_replay.store.document import (
    CandidateBatch,
    DocumentCandidates,
    located,
    require,
    require_valid,
)
from megatron_replay.store.format import (
    BIN_HEADER,
    BIN_MAGIC,
    ShardIndex,
    decode_record,
    require_header,
    require_likely,
)
from megatron_replay.store.manifest import (
    bin_path,
    read_description,
    read_index,
    read_manifest,
    refuse_differences,
)

#: A mapping costs a file descriptor: a quarter of what the process may have, commonly 1,024.
MAX_MAPPED_SHARDS = max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
#: Documents decoded at a time when all are read: some megabytes.
DOCUMENTS_AT_ONCE = 64


@dataclass(eq=False)
class _Shard:
    """A shard that was touched: its index, and which of its records were found undamaged."""

    index: ShardIndex
    checked: npt.NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.checked = np.zeros(self.index.num_documents, np.bool_)


class CandidateReader:
    """The candidate sets of a corpus: ``reader[document_id]``, ``len(reader)``.

    May be used by several threads, and pickled, to be opened again. The files of a store must not
    change while it is open.

    Raises:
        StoreError: no store, an unfinished one, or one that is damaged or of another version.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.description = read_description(self.directory)
        self.rows = read_manifest(self.directory, self.description)
        self._shards: dict[int, _Shard] = {}
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
        document_id = self._require_document(document_id)
        return self._decode(document_id, self._record(document_id))

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
            records,
            vocab_size=self.description.vocab_size,
            logits=self.description.logits,
            one=lambda i: self._decode(document_ids[i], records[i]),
            keep_logits=logits,
        )
        for document_id, stop in zip(document_ids, batch.stops.tolist(), strict=True):
            self._require_stop(document_id, stop)
        return batch

    def stops(self) -> npt.NDArray[np.int32]:
        """int32 [D]: last recorded position of each document, plus one; 0 where none is recorded.

        Reads every index, and no record.
        """
        shards = range(self.description.num_shards)
        return np.concatenate([self._shard(shard).index.stops for shard in shards])

    def require(
        self,
        *,
        corpus_fingerprint: str | None = None,
        tokenizer_fingerprint: str | None = None,
        vocab_size: int | None = None,
        fix: str = "Give the store of this corpus, or rerun Stage 0 on it",
    ) -> None:
        """Raise StoreError, naming each difference, unless the store was made for what is given."""
        given = {
            "corpus_fingerprint": corpus_fingerprint,
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "vocab_size": vocab_size,
        }
        expected = {name: value for name, value in given.items() if value is not None}
        refuse_differences(
            expected,
            {name: getattr(self.description, name) for name in expected},
            where=self.directory,
            fix=fix,
        )

    def _require_document(self, document_id: int) -> int:
        document_id = as_int(document_id)
        if not 0 <= document_id < len(self):
            raise IndexError(f"document {document_id} of a store of {len(self)}")
        return document_id

    def _record(self, document_id: int) -> memoryview:
        """The bytes of a document; the first time, its crc32 is checked."""
        number, row = divmod(document_id, self.description.documents_per_shard)
        shard = self._shard(number)
        start, stop = shard.index.offsets[row : row + 2].tolist()
        record = self._records(number)[start:stop]
        if not shard.checked[row]:
            with located(self._where(document_id)):
                require_likely(record, len(record))
                crc = int(shard.index.record_crcs[row])
                require(zlib.crc32(record) == crc, "damaged: the crc32 differs")
            shard.checked[row] = True
        return record

    def _decode(self, document_id: int, record: memoryview) -> DocumentCandidates:
        about = self.description
        with located(self._where(document_id)):
            document = decode_record(record, vocab_size=about.vocab_size, logits=about.logits)
            require_valid(document, vocab_size=about.vocab_size, logits=about.logits)
        self._require_stop(document_id, document.stop)
        return document

    def _require_stop(self, document_id: int, found: int) -> None:
        number, row = divmod(document_id, self.description.documents_per_shard)
        stop = int(self._shard(number).index.stops[row])
        if stop != found:
            with located(self._where(document_id)):
                require(False, "the index tells another last position", stop - 1, found - 1)

    def _where(self, document_id: int) -> str:
        path = bin_path(self.directory, document_id // self.description.documents_per_shard)
        return f"{path}, document {document_id}"

    def _shard(self, number: int) -> _Shard:
        """What is known of shard ``number``; the first time, its index is read and checked."""
        shard = self._shards.get(number)
        if shard is None:
            row = self.rows[number]
            shard = _Shard(read_index(self.directory, self.description, number, row))
            self._shards[number] = shard
        return shard

    def _records(self, number: int) -> memoryview:
        """The mapped ``.bin`` of a shard; beyond the limit the oldest mapping is dropped."""
        with self._lock:
            if number not in self._mapped:
                if len(self._mapped) >= MAX_MAPPED_SHARDS:
                    del self._mapped[next(iter(self._mapped))]
                self._mapped[number] = self._map(number)
            return self._mapped[number]

    def _map(self, number: int) -> memoryview:
        path = bin_path(self.directory, number)
        with open_regular(path, StoreError) as handle, located(path):
            expected_bytes, size = self.rows[number].bin_bytes, os.fstat(handle.fileno()).st_size
            require(size == expected_bytes, "damaged: another size", expected_bytes, size)
            try:
                content = memoryview(mmap.mmap(handle.fileno(), size, access=mmap.ACCESS_READ))
            except (OSError, ValueError) as error:  # ValueError: it has become shorter meanwhile
                raise StoreError(f"cannot read: {error}") from error
            magic, version = BIN_HEADER.unpack_from(content)
            require_header(magic, BIN_MAGIC, version)
        return content
