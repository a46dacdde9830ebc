"""Checks every crc32, bound and byte of a store, and with its corpus every label.

Shapes: D documents, P positions, C candidates (of all those positions together).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_replay.errors import StoreError
from megatron_replay.progress import Progress
from megatron_replay.store.document import CandidateBatch, located, require, require_labels
from megatron_replay.store.format import BIN_HEADER
from megatron_replay.store.manifest import bin_path
from megatron_replay.store.reader import CandidateReader, compiled_records


class Labels(Protocol):
    """The part of ``data.corpus.Corpus`` that is checked against."""

    lengths: npt.NDArray[np.int32]

    def labels(
        self, documents_D: Any, counts_D: Any, positions_P: Any
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Labels of positions, and which of them carry loss."""


def verify(
    reader: CandidateReader, *, corpus: Labels | None = None, workers: int = 1
) -> list[StoreError]:
    """The first damage of each damaged shard, in the order of shards; empty for a sound store.

    ``workers`` threads share the shards: decoding, crc32 and reading run outside Python's lock.
    """
    shards, found = range(reader.description.num_shards), []
    with (
        Progress("verify", len(reader), "documents") as progress,
        ThreadPoolExecutor(workers) as pool,
    ):
        check = partial(_damage, reader, corpus)
        for shard, error in zip(shards, pool.map(check, shards), strict=True):
            progress.advance(len(reader.description.documents(shard)))
            if error is not None:
                found.append(error)
    return found


def _damage(reader: CandidateReader, corpus: Labels | None, shard: int) -> StoreError | None:
    try:
        verify_shard(reader, shard, corpus)
    except StoreError as error:
        return error
    return None


def verify_shard(reader: CandidateReader, shard: int, corpus: Labels | None = None) -> None:
    """Check every byte of ``shard``, and with a corpus its positions and labels.

    Raises:
        StoreError: the first damage found.
    """
    # The index first: its error is the clearest where the files are another store's.
    index, content = reader.index(shard), reader.shard_bytes(shard)
    path = bin_path(reader.directory, shard)
    for documents, batch in reader.batches(shard):  # checks each record's crc32
        if corpus is not None:
            with located(path):
                _require_corpus(documents, batch, corpus)
    compiled = compiled_records()
    if compiled is None:
        crc = zlib.crc32(content)
    else:  # of the checked crc32s of the records: no byte is read twice
        header = zlib.crc32(content[: BIN_HEADER.size])
        crc = compiled.joined_crc(header, index.record_crcs, np.diff(index.offsets))
    require(crc == index.bin_crc, "damaged: crc32 differs", where=path)


def _require_corpus(documents: Sequence[int], batch: CandidateBatch, corpus: Labels) -> None:
    """Raise StoreError unless ``batch`` was recorded from ``corpus``."""
    counts_D = np.diff(batch.document_offsets)
    documents_D = np.array(documents)
    document_P = np.repeat(documents_D, counts_D)
    beyond_P = batch.positions >= corpus.lengths[document_P] - 1
    if beyond_P.any():
        first = np.argmax(beyond_P)
        raise StoreError(
            f"document {document_P[first]}, position {batch.positions[first]} is recorded, but is "
            "beyond the document's end",
            fix="Use the corpus that the store was made from",
        )
    labels_P, carries_loss_P = corpus.labels(documents_D, counts_D, batch.positions)
    require_labels(batch, document_P, labels_P, carries_loss_P)
