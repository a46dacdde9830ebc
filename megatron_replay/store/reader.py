"""Reading a finished store by document, memory-mapped and trusting nothing.

Opening reads both JSON files and every index (12 bytes a document) and checks them against each
other and against the sizes on disk. A record's crc32 and contents are checked when it is first
read; ``verify`` checks all of them.
"""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Iterator
from operator import index as as_int
from pathlib import Path

import numpy as np

from megatron_replay.errors import StoreError
from megatron_replay.store.document import (
    DocumentCandidates,
    located,
    require,
    require_valid,
)
from megatron_replay.store.format import BIN_HEADER, BIN_MAGIC, decode_record, require_header
from megatron_replay.store.manifest import (
    bin_path,
    read_description,
    read_manifest,
    refuse_differences,
)

#: A mapping costs a file descriptor, of which a process commonly has 1024.
MAX_MAPPED_SHARDS = 256


class CandidateReader:
    """The candidate sets of a corpus: ``reader[document_id]``, ``len(reader)``.

    Raises:
        StoreError: no store, an unfinished one, or one that is damaged or of another version.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.description = read_description(self.directory)
        self._indexes = read_manifest(self.directory, self.description)
        self._mapped: dict[int, memoryview] = {}
        self._checked = np.zeros(self.description.num_documents, np.bool_)

    def __len__(self) -> int:
        return self.description.num_documents

    def __getitem__(self, document_id: int) -> DocumentCandidates:
        """The candidates of a document, as copies that outlive the reader.

        Raises:
            IndexError: no such document.
            StoreError: the record is damaged.
        """
        document_id = as_int(document_id)
        if not 0 <= document_id < len(self):
            raise IndexError(f"document {document_id} of a store of {len(self)}")
        check = not self._checked[document_id]
        document = self._read(document_id, check=check)
        self._checked[document_id] = True
        return document

    def __iter__(self) -> Iterator[DocumentCandidates]:
        return (self[document_id] for document_id in range(len(self)))

    def require(
        self,
        *,
        corpus_fingerprint: str | None = None,
        tokenizer_fingerprint: str | None = None,
        vocab_size: int | None = None,
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
            fix="Give the store of this corpus, or rerun Stage 0 on it",
        )

    def verify(self) -> None:
        """Check every byte: each shard's crc32, each record's crc32 and contents.

        Raises:
            StoreError: the first damage found.
        """
        for shard, index in enumerate(self._indexes):
            with located(bin_path(self.directory, shard)):
                require(zlib.crc32(self._records(shard)) == index.bin_crc, "damaged: crc32 differs")
            for document_id in self.description.documents(shard):
                self._read(document_id, check=True)

    def _read(self, document_id: int, *, check: bool) -> DocumentCandidates:
        shard, row = divmod(document_id, self.description.documents_per_shard)
        index, description = self._indexes[shard], self.description
        start, stop = (int(offset) for offset in index.offsets[row : row + 2])
        record = self._records(shard)[start:stop]
        with located(f"{bin_path(self.directory, shard)}, document {document_id}"):
            if check:
                require(zlib.crc32(record) == index.record_crcs[row], "damaged: the crc32 differs")
            document = decode_record(
                record,
                vocab_size=description.vocab_size,
                has_logits=description.has_logits,
                codec=index.codec,
            )
            if check:
                require_valid(
                    document, vocab_size=description.vocab_size, has_logits=description.has_logits
                )
        return document

    def _records(self, shard: int) -> memoryview:
        """The mapped ``.bin`` of ``shard``; beyond the limit the oldest mapping is dropped."""
        if shard not in self._mapped:
            if len(self._mapped) >= MAX_MAPPED_SHARDS:
                del self._mapped[next(iter(self._mapped))]
            self._mapped[shard] = self._map(shard)
        return self._mapped[shard]

    def _map(self, shard: int) -> memoryview:
        path = bin_path(self.directory, shard)
        try:
            with open(path, "rb") as handle:
                content = memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:  # ValueError: emptied since it was opened
            raise StoreError(f"cannot read: {error}", where=path) from error
        with located(path):
            expected_bytes = self._indexes[shard].bin_bytes
            require(
                len(content) == expected_bytes,
                "damaged: another size",
                expected_bytes,
                len(content),
            )
            magic, version = BIN_HEADER.unpack_from(content)
            require_header(magic, BIN_MAGIC, version)
        return content
