"""A packed batch joined with the candidate store: what the restricted loss is computed over.

The store knows (document, position); a batch knows rows. Joining is numpy over whole documents:
no Python runs per token.

Shape suffixes: B packs, S positions of a pack, N selected positions of the batch, G candidate sets
(N under scope "position", documents under scope "document").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from megatron_replay.data.packing import PackedBatch
from megatron_replay.errors import StoreError
from megatron_replay.store import DocumentCandidates

SCOPES = ("position", "document")


class CandidateSource(Protocol):
    """What a join needs of ``store.CandidateReader``."""

    def __getitem__(self, document_id: int) -> DocumentCandidates: ...


@dataclass(frozen=True, eq=False)
class ReplayTargets:
    """The selected positions of a batch and their candidate sets.

    Attributes:
        rows_N: int64, index ``b * S + s`` of each selected position, ascending.
        labels_N: int64, gold token of each.
        candidate_ids: int32 [nnz], ascending and unique inside each of the G sets.
        candidate_offsets: int64 [G + 1] into ``candidate_ids``.
        group_offsets: None where every position has its own set (G = N); else int64 [G + 1]:
            positions ``rows_N[group_offsets[g]:group_offsets[g + 1]]`` share set g.
        lse_N: float32, the base model's log-sum-exp over the vocabulary.
        tail_logit_N: float32, logit of one pseudo-token with the base model's mass outside the
            position's stored set: lse + log(tail_mass); -inf where that mass is 0.
    """

    rows_N: torch.Tensor
    labels_N: torch.Tensor
    candidate_ids: torch.Tensor
    candidate_offsets: torch.Tensor
    group_offsets: torch.Tensor | None
    lse_N: torch.Tensor
    tail_logit_N: torch.Tensor

    def to(self, device: torch.device) -> ReplayTargets:
        """The same targets on ``device``."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            tensor = getattr(self, field.name)
            moved[field.name] = None if tensor is None else tensor.to(device)
        return ReplayTargets(**moved)


@dataclass(frozen=True, eq=False)
class _Segment:
    """A document in the batch: its first row, and the positions that truncation left of it."""

    document_id: int
    first_row: int
    num_positions: int


@dataclass(frozen=True, eq=False)
class _JoinedDocument:
    """The positions of one document that are both recorded and in the batch."""

    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    set_ids: npt.NDArray[np.int32]
    set_sizes: npt.NDArray[np.int64]
    lse: npt.NDArray[np.float32]
    tail_mass: npt.NDArray[np.float32]


def eligible_rows(batch: PackedBatch) -> torch.Tensor:
    """Index ``b * S + s`` of every position whose label carries loss: int64 [N], ascending."""
    return batch.loss_mask_BS.flatten().nonzero().squeeze(1)


def full_targets(batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """``(rows_N, labels_N)``, both int64: every eligible position, for the full-softmax loss."""
    rows_N = eligible_rows(batch)
    return rows_N, batch.labels_BS.flatten()[rows_N]


def join_candidates(batch: PackedBatch, reader: CandidateSource, *, scope: str) -> ReplayTargets:
    """Look up the recorded positions of every document of ``batch``.

    Args:
        batch: packs of whole or truncated documents; recorded positions that truncation cut off
            are left out.
        reader: the candidate store of the corpus the batch was read from.
        scope: "position": each position has its recorded set. "document": all positions of a
            document share the union of every set recorded for it, cut-off positions included, so
            that the union depends on nothing but the store.

    Raises:
        StoreError: a recorded position carries no loss in the corpus, or its gold token is not in
            its set: the store was made from other data.
    """
    assert scope in SCOPES, scope
    labels = batch.labels_BS.numpy().reshape(-1)
    carries_loss = batch.loss_mask_BS.numpy().reshape(-1)
    joined = [
        _join_document(segment, reader[segment.document_id], labels, carries_loss, scope)
        for segment in _segments(batch)
    ]
    joined = [document for document in joined if len(document.rows)]
    sizes = _concatenate([document.set_sizes for document in joined], np.int64)
    rows_per_document = np.array([len(document.rows) for document in joined], dtype=np.int64)
    lse = _concatenate([document.lse for document in joined], np.float32)
    tail_mass = _concatenate([document.tail_mass for document in joined], np.float32)
    with np.errstate(divide="ignore"):  # log 0 = -inf is meant: no tail
        tail_logit = lse + np.log(tail_mass)
    return ReplayTargets(
        rows_N=torch.from_numpy(_concatenate([d.rows for d in joined], np.int64)),
        labels_N=torch.from_numpy(_concatenate([d.labels for d in joined], np.int64)),
        candidate_ids=torch.from_numpy(_concatenate([d.set_ids for d in joined], np.int32)),
        candidate_offsets=_offsets(sizes),
        group_offsets=_offsets(rows_per_document) if scope == "document" else None,
        lse_N=torch.from_numpy(lse),
        tail_logit_N=torch.from_numpy(tail_logit),
    )


def _segments(batch: PackedBatch) -> Iterator[_Segment]:
    """The documents of the batch in the order of their rows.

    A document starts where its position is 0, and padding has position 0 too, so the next zero is
    where it ends.
    """
    document = batch.document_BS.numpy().reshape(-1)
    boundaries = np.flatnonzero(batch.position_BS.numpy().reshape(-1) == 0)
    stops = np.append(boundaries[1:], len(document))
    is_document = document[boundaries] >= 0
    for start, stop in zip(boundaries[is_document], stops[is_document], strict=True):
        yield _Segment(int(document[start]), int(start), int(stop - start))


def _join_document(
    segment: _Segment,
    candidates: DocumentCandidates,
    labels: npt.NDArray[np.int64],
    carries_loss: npt.NDArray[np.bool_],
    scope: str,
) -> _JoinedDocument:
    count = int(np.searchsorted(candidates.positions, segment.num_positions))
    rows = segment.first_row + candidates.positions[:count].astype(np.int64)
    offsets = candidates.offsets[: count + 1]
    ids = candidates.ids[: offsets[-1]]
    _require_loss(segment, candidates.positions[:count], carries_loss[rows])
    _require_gold(segment, candidates.positions[:count], labels[rows], ids, offsets)
    if scope == "position":
        set_ids, set_sizes = ids, np.diff(offsets)
    else:
        set_ids = _union(candidates.ids)
        set_sizes = np.array([len(set_ids)], dtype=np.int64)
    return _JoinedDocument(
        rows=rows,
        labels=labels[rows],
        set_ids=set_ids,
        set_sizes=set_sizes,
        lse=candidates.lse[:count],
        tail_mass=candidates.tail_mass[:count],
    )


def _require_loss(
    segment: _Segment, positions: npt.NDArray[np.int32], carries_loss: npt.NDArray[np.bool_]
) -> None:
    if not carries_loss.all():
        raise StoreError(
            f"document {segment.document_id}, position {positions[np.argmin(carries_loss)]} is "
            "recorded, but its label carries no loss in the corpus",
            fix="Use the corpus that the store was made from",
        )


def _require_gold(
    segment: _Segment,
    positions: npt.NDArray[np.int32],
    labels: npt.NDArray[np.int64],
    ids: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
) -> None:
    hits = np.concatenate(([0], np.cumsum(ids == np.repeat(labels, np.diff(offsets)))))
    has_gold = hits[offsets[1:]] > hits[offsets[:-1]]
    if not has_gold.all():
        first = int(np.argmin(has_gold))
        raise StoreError(
            f"document {segment.document_id}, position {positions[first]}: the gold token "
            f"{labels[first]} is not in its candidate set",
            fix="Use the corpus that the store was made from, or run Stage 0 again",
        )


def _union(ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Ascending distinct ids: by a flag per token of the vocabulary, far faster than sorting."""
    seen = np.zeros(ids.max(initial=-1) + 1, dtype=np.bool_)
    seen[ids] = True
    return np.flatnonzero(seen).astype(np.int32)


def _concatenate(arrays: list[npt.NDArray[np.generic]], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=dtype), *arrays]).astype(dtype, copy=False)


def _offsets(sizes: npt.NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(([0], np.cumsum(sizes))).astype(np.int64))
