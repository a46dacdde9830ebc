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
from megatron_replay.store.document import CandidateBatch, located, missing_label, require
from megatron_replay.store.format import BIN_HEADER
from megatron_replay.store.manifest import bin_path
from megatron_replay.store.reader import CandidateReader, compiled_records

_FIX = "Use the corpus that the store was made from"


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
                require_labels(documents, batch, corpus)
    compiled = compiled_records()
    if compiled is None:
        crc = zlib.crc32(content)
    else:  # of the checked crc32s of the records: no byte is read twice
        header = zlib.crc32(content[: BIN_HEADER.size])
        crc = compiled.joined_crc(header, index.record_crcs, np.diff(index.offsets))
    require(crc == index.bin_crc, "damaged: crc32 differs", where=path)


def require_labels(documents: Sequence[int], batch: CandidateBatch, corpus: Labels) -> None:
    """Raise StoreError unless every position carries loss in ``corpus``, its label in its set."""
    documents_D, counts_D = np.array(documents), np.diff(batch.document_offsets)

    def place(p: np.integer[Any] | int) -> str:
        d = np.searchsorted(batch.document_offsets, p, side="right") - 1
        return f"document {documents_D[d]}, position {batch.positions[p]}"

    beyond_P = batch.positions >= np.repeat(corpus.lengths[documents_D] - 1, counts_D)
    if beyond_P.any():
        where = place(np.argmax(beyond_P))
        raise StoreError(f"{where} is recorded, but is beyond the document's end", fix=_FIX)
    labels_P, carries_loss_P = corpus.labels(documents_D, counts_D, batch.positions)
    if not carries_loss_P.all():
        where = place(np.argmin(carries_loss_P))
        raise StoreError(f"{where} is recorded, but its label carries no loss", fix=_FIX)
    first = missing_label(batch.ids, batch.offsets, labels_P)
    if first >= 0:
        raise StoreError(
            f"{place(first)}: the label {labels_P[first]} is not in its candidate set",
            fix=f"{_FIX}, or run Stage 0 again",
        )
