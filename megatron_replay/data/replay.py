"""A packed batch joined with the candidate store: what the restricted loss is computed over.

The store is keyed by (document, position), a batch by rows. Joining is numpy over a whole batch: no
Python runs per token, and under scope "position" none per document. It uses no torch kernel, whose
threads would compete with those of the training step that runs at the same time.

Shape suffixes: T rows of the batch, D its documents, P recorded positions of those documents, N
selected positions of the batch (P without those that truncation cut off), G candidate sets: N under
scope "position", documents with a selected position under "document".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megatron_replay.data.packing import PackedBatch
from megatron_replay.loss.candidate_sets import CandidateSets, unions
from megatron_replay.store import (
    CandidateBatch,
    CandidateReader,
    offsets_of_counts,
    require_labels,
)

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ReplayTargets:
    """The selected positions of a batch and their candidate sets, on the host.

    Attributes:
        rows_N: int64, row of each selected position, ascending.
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


def eligible_rows(batch: PackedBatch) -> torch.Tensor:
    """The rows whose label carries loss: int64 [N], ascending."""
    return torch.from_numpy(np.flatnonzero(batch.loss_mask_T.numpy()))


def full_targets(batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """``(rows_N, labels_N)``, both int64: every eligible position, for the full-softmax loss."""
    rows_N = eligible_rows(batch)
    return rows_N, torch.from_numpy(batch.label_T.numpy()[rows_N.numpy()])


def join_candidates(
    batch: PackedBatch,
    reader: CandidateReader,
    *,
    vocab_size: int,
    scope: str,
    logits: bool = False,
) -> ReplayTargets:
    """Look up the recorded positions of every document of ``batch``.

    This is the definition's S, position by position (``loss.definition``), from the store.

    Args:
        batch: whole or truncated documents; recorded positions that truncation cut off are left
            out.
        reader: the candidate store of the corpus the batch was read from.
        vocab_size: the model's.
        scope: "position": each position has its recorded set. "document": all positions of a
            document share the union of every set recorded for it, cut-off positions included, so
            that the union depends on nothing but the store.
        logits: bring the stored logits along, which the store must have.

    Raises:
        StoreError: a recorded position carries no loss in the corpus, or its label is not in its
            set: the store was made from other data.
    """
    forest = batch.forest
    recorded = reader.read(forest.document_D.tolist(), logits=logits)
    place_P = np.repeat(np.arange(len(forest)), np.diff(recorded.document_offsets))
    is_here_P = recorded.positions < forest.positions_D[place_P]
    selected = recorded if is_here_P.all() else _keep(recorded, is_here_P)
    place_N = place_P[is_here_P]
    rows_N = batch.first_row_D[place_N] + selected.positions
    labels_N = batch.label_T.numpy()[rows_N]
    # A shared position carries no loss, and its row is another document's.
    carries_loss_N = batch.loss_mask_T.numpy()[rows_N]
    carries_loss_N &= selected.positions >= forest.shared_D[place_N]
    require_labels(selected, forest.document_D[place_N], labels_N, carries_loss_N)
    ids, offsets, group_offsets = selected.ids, selected.offsets, None
    if scope == "document":
        ids, offsets, group_offsets = _unions(recorded, selected)
    own_sets = None
    if logits:
        own_sets = CandidateSets.of(
            selected.ids,
            selected.offsets,
            labels_N,
            vocab_size=vocab_size,
            values=selected.logits,
        )
    with np.errstate(divide="ignore"):  # log 0 = -inf is meant: no tail
        tail_logit_N = selected.lse + np.log(selected.tail_mass)
    return ReplayTargets(
        rows_N=torch.from_numpy(rows_N),
        sets=CandidateSets.of(ids, offsets, labels_N, group_offsets, vocab_size=vocab_size),
        lse_N=torch.from_numpy(selected.lse),
        tail_logit_N=torch.from_numpy(tail_logit_N),
        own_sets=own_sets,
    )


def _keep(recorded: CandidateBatch, is_kept_P: npt.NDArray[np.bool_]) -> CandidateBatch:
    """The recorded positions of ``is_kept_P``, of the same documents."""
    sizes_P = np.diff(recorded.offsets)
    is_kept = np.repeat(is_kept_P, sizes_P)
    return CandidateBatch(
        document_offsets=offsets_of_counts(is_kept_P)[recorded.document_offsets],
        positions=recorded.positions[is_kept_P],
        offsets=offsets_of_counts(sizes_P[is_kept_P]),
        ids=recorded.ids[is_kept],
        lse=recorded.lse[is_kept_P],
        label_logprob=recorded.label_logprob[is_kept_P],
        tail_mass=recorded.tail_mass[is_kept_P],
        logits=None if recorded.logits is None else recorded.logits[is_kept],
    )


def _unions(
    recorded: CandidateBatch, selected: CandidateBatch
) -> tuple[npt.NDArray[np.int32], Ints, Ints]:
    """Ids and offsets of one union per document with a selected position; offsets of positions."""
    has_any_D = np.diff(selected.document_offsets) > 0
    bounds = recorded.offsets[recorded.document_offsets]
    spans = zip(bounds[:-1][has_any_D], bounds[1:][has_any_D], strict=True)
    found = list(unions(recorded.ids, spans))
    ids = np.concatenate([np.empty(0, np.int32), *found]).astype(np.int32)
    offsets = offsets_of_counts(np.array([len(union) for union in found], np.int64))
    return ids, offsets, np.append(0, selected.document_offsets[1:][has_any_D])
