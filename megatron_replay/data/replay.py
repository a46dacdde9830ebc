"""A packed batch joined with the candidate store: what the restricted loss is computed over.

The store is keyed by (document, position), a batch by rows. Joining is numpy over a whole batch: no
Python runs per token, and under scope "position" none per document. It uses no torch kernel, whose
threads would compete with those of the training step that runs at the same time.

Shape suffixes: B packs, S positions of a pack, D documents of the batch, P recorded positions of
those documents, N selected positions of the batch (P without those that truncation cut off), G
candidate sets: N under scope "position", documents with a selected position under "document".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from megatron_replay.data.packing import PackedBatch
from megatron_replay.errors import StoreError
from megatron_replay.loss.candidate_sets import CandidateSets, unions
from megatron_replay.store import CandidateBatch, missing_label, offsets_of_counts

SCOPES = ("position", "document")


class CandidateSource(Protocol):
    """What a join needs of ``store.CandidateReader``."""

    def read(self, document_ids: Sequence[int], *, logits: bool) -> CandidateBatch:
        """Those documents end to end, in this order, with stored logits or without."""
        ...


@dataclass(frozen=True, eq=False)
class ReplayTargets:
    """The selected positions of a batch and their candidate sets, on the host.

    Attributes:
        rows_N: int64, index ``b * S + s`` of each selected position, ascending.
        sets: over the whole vocabulary; with the label of each position.
        lse_N: float32, the base model's log-sum-exp over the vocabulary.
        tail_logit_N: float32, logit of one pseudo-token with the base model's mass outside the
            position's stored set: lse + log(tail_mass); -inf where that mass is 0.
        own_sets: the recorded set of each position, whatever the scope, with the base model's
            logits as values; None where they were not requested.
    """

    rows_N: torch.Tensor
    sets: CandidateSets
    lse_N: torch.Tensor
    tail_logit_N: torch.Tensor
    own_sets: CandidateSets | None


class _Segments(NamedTuple):
    """The documents of a batch in the order of their rows, int64 [D] each.

    Attributes:
        document_D: their ids.
        first_row_D: the row of position 0.
        num_positions_D: how many positions truncation left of each.
    """

    document_D: npt.NDArray[np.int64]
    first_row_D: npt.NDArray[np.int64]
    num_positions_D: npt.NDArray[np.int64]


class _Selected(NamedTuple):
    """Of the recorded positions, those that the batch has.

    Attributes:
        segment_N: which document of the batch, int64.
        position_N: position in it, int32.
        ids, offsets: their sets, int32 [nnz] and int64 [N + 1].
        lse_N, tail_mass_N: float32.
        logits: float32 [nnz] or None.
    """

    segment_N: npt.NDArray[np.int64]
    position_N: npt.NDArray[np.int32]
    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    lse_N: npt.NDArray[np.float32]
    tail_mass_N: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32] | None


def eligible_rows(batch: PackedBatch) -> torch.Tensor:
    """Index ``b * S + s`` of every position whose label carries loss: int64 [N], ascending."""
    return torch.from_numpy(np.flatnonzero(batch.loss_mask_BS.numpy()))


def full_targets(batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """``(rows_N, labels_N)``, both int64: every eligible position, for the full-softmax loss."""
    rows_N = eligible_rows(batch)
    return rows_N, torch.from_numpy(batch.labels_BS.numpy().reshape(-1)[rows_N.numpy()])


def join_candidates(
    batch: PackedBatch,
    reader: CandidateSource,
    *,
    vocab_size: int,
    scope: str,
    logits: bool = False,
) -> ReplayTargets:
    """Look up the recorded positions of every document of ``batch``.

    This is the definition's S, position by position (``loss.definition``), from the store.

    Args:
        batch: packs of whole or truncated documents; recorded positions that truncation cut off
            are left out.
        reader: the candidate store of the corpus the batch was read from.
        vocab_size: rows of the output layer, over all ranks.
        scope: "position": each position has its recorded set. "document": all positions of a
            document share the union of every set recorded for it, cut-off positions included, so
            that the union depends on nothing but the store.
        logits: bring the stored logits along, which the store must have.

    Raises:
        StoreError: a recorded position carries no loss in the corpus, or its label is not in its
            set: the store was made from other data.
    """
    assert scope in SCOPES, scope
    segments = _segments(batch)
    recorded = reader.read(segments.document_D.tolist(), logits=logits)
    selected = _select(recorded, segments)
    rows_N = segments.first_row_D[selected.segment_N] + selected.position_N
    labels_N = batch.labels_BS.numpy().reshape(-1)[rows_N]
    _require_loss(selected, segments, batch.loss_mask_BS.numpy().reshape(-1)[rows_N])
    _require_label(selected, segments, labels_N)
    ids, offsets, group_offsets = selected.ids, selected.offsets, None
    if scope != "position":
        bounds = recorded.document_offsets
        places = offsets_of_counts(_is_here(recorded, segments))[bounds]
        has_any = places[1:] > places[:-1]
        spans = recorded.offsets[bounds[:-1][has_any]], recorded.offsets[bounds[1:][has_any]]
        found = list(unions(recorded.ids, zip(*spans, strict=True)))
        ids = np.concatenate([np.empty(0, np.int32), *found]).astype(np.int32)
        offsets = offsets_of_counts(np.array([len(union) for union in found], np.int64))
        group_offsets = np.append(0, places[1:][has_any])
    with np.errstate(divide="ignore"):  # log 0 = -inf is meant: no tail
        tail_logit_N = selected.lse_N + np.log(selected.tail_mass_N)
    own_sets = None
    if logits:
        own_sets = CandidateSets.of(
            selected.ids,
            selected.offsets,
            labels_N,
            vocab_size=vocab_size,
            values=selected.logits,
        )
    return ReplayTargets(
        rows_N=torch.from_numpy(rows_N),
        sets=CandidateSets.of(ids, offsets, labels_N, group_offsets, vocab_size=vocab_size),
        lse_N=torch.from_numpy(selected.lse_N),
        tail_logit_N=torch.from_numpy(tail_logit_N),
        own_sets=own_sets,
    )


def _segments(batch: PackedBatch) -> _Segments:
    """A document starts where its position is 0; padding has position 0 too and ends the last."""
    document = batch.document_BS.numpy().reshape(-1)
    boundaries = np.flatnonzero(batch.position_BS.numpy().reshape(-1) == 0)
    sizes = np.diff(boundaries, append=len(document))
    is_document = document[boundaries] >= 0
    starts = boundaries[is_document]
    return _Segments(document[starts].astype(np.int64), starts, sizes[is_document])


def _select(recorded: CandidateBatch, segments: _Segments) -> _Selected:
    """Nothing is copied unless a position is left out."""
    segment_P = _segment_of(recorded)
    every = _Selected(
        segment_P,
        recorded.positions,
        recorded.ids,
        recorded.offsets,
        recorded.lse,
        recorded.tail_mass,
        recorded.logits,
    )
    is_here_P = _is_here(recorded, segments)
    if is_here_P.all():
        return every
    set_sizes_P = np.diff(recorded.offsets)
    is_here = np.repeat(is_here_P, set_sizes_P)
    return _Selected(
        segment_P[is_here_P],
        recorded.positions[is_here_P],
        recorded.ids[is_here],
        offsets_of_counts(set_sizes_P[is_here_P]),
        recorded.lse[is_here_P],
        recorded.tail_mass[is_here_P],
        None if recorded.logits is None else recorded.logits[is_here],
    )


def _require_loss(
    selected: _Selected, segments: _Segments, carries_loss_N: npt.NDArray[np.bool_]
) -> None:
    if not carries_loss_N.all():
        raise StoreError(
            f"{_place(selected, segments, int(np.argmin(carries_loss_N)))} is recorded, but its "
            "label carries no loss in the corpus",
            fix="Use the corpus that the store was made from",
        )


def _require_label(
    selected: _Selected, segments: _Segments, labels_N: npt.NDArray[np.int64]
) -> None:
    first = missing_label(selected.ids, selected.offsets, labels_N)
    if first >= 0:
        raise StoreError(
            f"{_place(selected, segments, first)}: the label {labels_N[first]} is not in its "
            "candidate set",
            fix="Use the corpus that the store was made from, or run Stage 0 again",
        )


def _place(selected: _Selected, segments: _Segments, n: int) -> str:
    document = segments.document_D[selected.segment_N[n]]
    return f"document {document}, position {selected.position_N[n]}"


def _segment_of(recorded: CandidateBatch) -> npt.NDArray[np.int64]:
    """The document of each recorded position, counted in the batch: int64 [P]."""
    recorded_D = np.diff(recorded.document_offsets)
    return np.repeat(np.arange(len(recorded_D)), recorded_D)


def _is_here(recorded: CandidateBatch, segments: _Segments) -> npt.NDArray[np.bool_]:
    """Which of the recorded positions truncation left: [P]."""
    return recorded.positions < segments.num_positions_D[_segment_of(recorded)]
