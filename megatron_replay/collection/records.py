"""From a micro-batch's candidate sets on the host to one record per document.

Shapes: N rows with candidate sets, C candidates of all of them, P positions of a document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_replay.config import CandidatesConfig
from megatron_replay.selection.candidates import SelectedCandidates
from megatron_replay.selection.positions import select_positions
from megatron_replay.store import DocumentCandidates, offsets_of_counts

#: Confidence buckets of the bucket strategy.
NUM_BUCKETS = 5
#: The record of a document that was dropped for its length, or of which nothing carries loss.
NO_CANDIDATES = DocumentCandidates(
    positions=np.empty(0, np.int32),
    offsets=np.zeros(1, np.int64),
    ids=np.empty(0, np.int32),
    lse=np.empty(0, np.float32),
    gold_logprob=np.empty(0, np.float32),
    tail_mass=np.empty(0, np.float32),
    logits=None,
)


@dataclass(frozen=True, eq=False)
class Span:
    """One document's positions in a micro-batch whose logits are wanted."""

    document: int
    positions: npt.NDArray[np.int32]
    """int32 [P], ascending."""
    rows: npt.NDArray[np.int64]
    """int64 [P]: the rows ``b * S + s`` at which they lie."""


@dataclass(frozen=True, eq=False)
class HostSets:
    """The candidate sets of N rows as flat arrays, logits beside the ids if they are stored."""

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    lse: npt.NDArray[np.float32]
    gold_logprob: npt.NDArray[np.float32]
    max_logprob: npt.NDArray[np.float32]
    tail_mass: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32] | None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for array in vars(self).values() if array is not None)

    def take(self, rows: npt.NDArray[np.int64]) -> HostSets:
        """The sets of the given rows."""
        starts, sizes = self.offsets[rows], np.diff(self.offsets)[rows]
        offsets = offsets_of_counts(sizes)
        flat = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], sizes)
        return HostSets(
            ids=self.ids[flat],
            offsets=offsets,
            lse=self.lse[rows],
            gold_logprob=self.gold_logprob[rows],
            max_logprob=self.max_logprob[rows],
            tail_mass=self.tail_mass[rows],
            logits=None if self.logits is None else self.logits[flat],
        )

    def record(self, positions: npt.NDArray[np.int32], start: int, stop: int) -> DocumentCandidates:
        """Rows ``start`` to ``stop`` as the record of a document, without a copy."""
        first, last = self.offsets[start], self.offsets[stop]
        return DocumentCandidates(
            positions=positions,
            offsets=self.offsets[start : stop + 1] - first,
            ids=self.ids[first:last],
            lse=self.lse[start:stop],
            gold_logprob=self.gold_logprob[start:stop],
            tail_mass=self.tail_mass[start:stop],
            logits=None if self.logits is None else self.logits[first:last],
        )


def to_host(sets: Sequence[SelectedCandidates], logits: Sequence[Tensor]) -> HostSets:
    """Candidate sets of one or more chunks, end to end, off the device."""

    def joined(name: str) -> npt.NDArray[Any]:
        return _host([getattr(chunk, name) for chunk in sets])

    return HostSets(
        ids=_host([chunk.ids for chunk in sets]),
        offsets=offsets_of_counts(_host([chunk.offsets.diff() for chunk in sets])),
        lse=joined("lse_T"),
        gold_logprob=joined("gold_logprob_T"),
        max_logprob=joined("max_logprob_T"),
        tail_mass=joined("tail_mass_T"),
        logits=_host(logits) if logits else None,
    )


def _host(chunks: Sequence[Tensor]) -> npt.NDArray[Any]:
    joined = chunks[0] if len(chunks) == 1 else torch.cat(list(chunks))
    return joined.cpu().numpy()


@dataclass(frozen=True, eq=False)
class SelectedBatch:
    """A micro-batch after selection: documents in order, not yet cut into records.

    Cutting is host work, and under the bucket strategy it draws the positions too: it is done where
    the records are written, while the device goes on.
    """

    spans: Sequence[Span]
    sets: HostSets
    settings: CandidatesConfig

    @property
    def nbytes(self) -> int:
        """Bytes held, but for a few a document."""
        return self.sets.nbytes + sum(s.positions.nbytes + s.rows.nbytes for s in self.spans)

    def records(self) -> Iterator[tuple[int, DocumentCandidates]]:
        """Each document of the micro-batch and its record; positions are drawn under bucket."""
        sets, positions = self.sets, [span.positions for span in self.spans]
        if self.settings.position_strategy == "bucket":
            positions, rows = self._drawn()
            sets = sets.take(rows)
        stop = 0
        for span, chosen in zip(self.spans, positions, strict=True):
            start, stop = stop, stop + len(chosen)
            yield span.document, sets.record(chosen, start, stop)

    def _drawn(self) -> tuple[list[npt.NDArray[np.int32]], npt.NDArray[np.int64]]:
        confidence = self.sets.max_logprob
        positions, rows, stop = [], [np.empty(0, np.int64)], 0
        for span in self.spans:
            start, stop = stop, stop + len(span.positions)
            eligible = span.positions
            chosen = choose(self.settings, span.document, eligible, confidence[start:stop])
            positions.append(chosen)
            rows.append(start + np.searchsorted(eligible, chosen))
        return positions, np.concatenate(rows)


def choose(
    settings: CandidatesConfig,
    document: int,
    eligible: npt.NDArray[np.int32],
    confidence: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.int32]:
    """The positions of ``document`` that the settings' strategy records."""
    return select_positions(
        settings.position_strategy,
        eligible=eligible,
        confidence=confidence,
        fraction=settings.position_fraction,
        num_buckets=NUM_BUCKETS,
        last_n=settings.last_n,
        seed=settings.seed,
        document_id=document,
    )


def every_document(
    documents: range, records: Iterator[tuple[int, DocumentCandidates]]
) -> Iterator[tuple[int, DocumentCandidates]]:
    """``records`` and, in their places, the documents of the shard that have none."""
    expected = iter(documents)
    for document, record in records:
        for passed in expected:
            if passed == document:
                break
            yield passed, NO_CANDIDATES
        yield document, record
    for passed in expected:
        yield passed, NO_CANDIDATES
