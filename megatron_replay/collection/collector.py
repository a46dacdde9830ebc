"""Stage 0's work between packs and records: forward, select candidates, cut by document.

Shapes: T positions of a micro-batch, N of them with wanted logits, V vocabulary, H hidden channels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay.checkpoint.load import LoadedModel
from megatron_replay.config import CandidatesConfig, DataConfig
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.packing import (
    Pack,
    PackedBatch,
    fit_documents,
    pack_batch,
    plan_packs,
)
from megatron_replay.data.replay import eligible_rows
from megatron_replay.forward import forward_only
from megatron_replay.functional import CandidateSets, select_candidates, select_positions
from megatron_replay.functional.shard_selection import SelectionKernel
from megatron_replay.model.rows import HiddenStates
from megatron_replay.parallel import Parallel
from megatron_replay.store import DocumentCandidates

#: Micro-batches handed to the pipeline at a time: enough to fill it, few enough to hold.
_MICRO_BATCHES_PER_CALL = 8

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
class _Span:
    """One document's wanted positions in a micro-batch, and the rows at which they lie."""

    document: int
    positions: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True, eq=False)
class _Selection:
    """Candidate sets of a micro-batch's wanted rows, chunk after chunk; logits if stored."""

    sets: list[CandidateSets]
    logits: list[Tensor]


class Collector:
    """Turns document numbers into records; every rank of one model copy calls it alike."""

    def __init__(
        self,
        settings: CandidatesConfig,
        data: DataConfig,
        corpus: Corpus,
        model: LoadedModel,
        groups: Parallel,
        kernel: SelectionKernel,
    ) -> None:
        self._settings, self._data = settings, data
        self._corpus, self._model, self._groups = corpus, model, groups
        self._kernel = kernel
        self.fitted = fit_documents(corpus.lengths, data.seq_length, data.long_documents)

    def collect(self, documents: np.ndarray) -> dict[int, DocumentCandidates]:
        """Records of ``documents`` that have any; {} on all pipeline stages but the last."""
        records: dict[int, DocumentCandidates] = {}
        packs = plan_packs(self.fitted.lengths, documents, self._data.seq_length)
        per_call = self._data.micro_batch_size * _MICRO_BATCHES_PER_CALL
        for first in range(0, len(packs), per_call):
            batches = list(self._micro_batches(packs[first : first + per_call]))
            spans = [list(self._spans(batch)) for batch in batches]
            heads = [
                functools.partial(self._select, batch, span)
                for batch, span in zip(batches, spans, strict=True)
            ]
            outputs = forward_only(self._model.module, list(zip(batches, heads, strict=True)))
            if self._groups.last_stage and self._groups.tp_rank == 0:
                for span, output in zip(spans, outputs, strict=True):
                    records.update(self._records(span, output))
        return records

    def _micro_batches(self, packs: list[Pack]) -> Iterator[PackedBatch]:
        size = self._data.micro_batch_size
        for first in range(0, len(packs), size):
            group = packs[first : first + size]
            group += [np.empty(0, np.int64)] * (size - len(group))
            yield pack_batch(self._corpus, group, self._data.seq_length, self.fitted.lengths)

    def _spans(self, batch: PackedBatch) -> Iterator[_Span]:
        """Rows whose logits are wanted, by document.

        The bucket strategy sorts by confidence, so it needs logits at every eligible position; the
        others choose before the forward pass and skip the output layer elsewhere.
        """
        rows = eligible_rows(batch).numpy()
        if not len(rows):
            return
        owners = batch.document_BS.flatten().numpy()[rows]
        positions = batch.position_BS.flatten().numpy()[rows]
        starts = np.flatnonzero(np.diff(owners, prepend=-1))
        for start, stop in zip(starts, np.append(starts[1:], len(rows)), strict=True):
            document = int(owners[start])
            eligible = positions[start:stop]
            if self._settings.position_strategy == "bucket":
                wanted = np.arange(stop - start)
            else:
                wanted = np.searchsorted(eligible, self._choose(document, eligible, None))
            yield _Span(document, eligible[wanted], rows[start:stop][wanted])

    def _choose(
        self, document: int, eligible: np.ndarray, confidence: np.ndarray | None
    ) -> np.ndarray:
        return select_positions(
            self._settings.position_strategy,
            eligible=eligible,
            confidence=confidence,
            fraction=self._settings.position_fraction,
            num_buckets=self._settings.num_buckets,
            last_n=self._settings.last_n,
            seed=self._settings.position_seed,
            document_id=document,
        )

    def _select(
        self, batch: PackedBatch, spans: list[_Span], hidden: HiddenStates, weight_VH: Tensor
    ) -> _Selection:
        """The head. Logits exist for ``logits_chunk_size`` positions at a time, never for all."""
        device = weight_VH.device
        rows_N = torch.from_numpy(np.concatenate([s.rows for s in spans] or [np.empty(0, int)]))
        labels_N = batch.labels_BS.flatten()[rows_N].to(device)
        vocab_start = self._groups.tp_rank * weight_VH.shape[0]
        selection = _Selection([], [])
        size = self._settings.logits_chunk_size
        for rows, labels in zip(rows_N.to(device).split(size), labels_N.split(size), strict=True):
            logits_NV = hidden[rows] @ weight_VH.T
            sets = select_candidates(
                logits_NV,
                labels,
                coverage=self._settings.coverage,
                max_candidates=self._settings.max_candidates,
                vocab_start=vocab_start,
                tp_group=self._groups.tp_group,
                kernel=self._kernel,
            )
            selection.sets.append(sets)
            if self._settings.store_logits:
                selection.logits.append(self._candidate_logits(logits_NV, sets, vocab_start))
        return selection

    def _candidate_logits(self, logits_NV: Tensor, sets: CandidateSets, start: int) -> Tensor:
        """Logits of the candidates, fp32 [nnz]: each from its owner. One all-reduce over TP."""
        local = sets.ids.long() - start
        inside = (local >= 0) & (local < logits_NV.shape[1])
        row = torch.repeat_interleave(
            torch.arange(len(logits_NV), device=local.device), sets.offsets.diff()
        )
        values = logits_NV[row, local.clamp(0, logits_NV.shape[1] - 1)].float() * inside
        dist.all_reduce(values, group=self._groups.tp_group)
        return values

    def _records(
        self, spans: list[_Span], selection: _Selection
    ) -> Iterator[tuple[int, DocumentCandidates]]:
        """Cut the micro-batch's sets by document; under bucket, keep the positions drawn."""
        if not spans:
            return
        sets = _Flat(selection)
        stop = 0
        for span in spans:
            start, stop = stop, stop + len(span.rows)
            keep = np.arange(start, stop)
            positions = span.positions
            if self._settings.position_strategy == "bucket":
                confidence = (
                    sets.max_logprob
                    if self._settings.confidence == "max-prob"
                    else sets.gold_logprob
                )
                positions = self._choose(span.document, span.positions, confidence[start:stop])
                keep = start + np.searchsorted(span.positions, positions)
            yield span.document, sets.take(positions, keep)


class _Flat:
    """A micro-batch's selection on the host, as flat arrays that can be cut by position."""

    def __init__(self, selection: _Selection) -> None:
        def joined(name: str) -> np.ndarray:
            return torch.cat([getattr(sets, name) for sets in selection.sets]).cpu().numpy()

        self.ids = joined("ids")
        self.sizes = np.concatenate([sets.offsets.diff().cpu() for sets in selection.sets])
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.lse, self.tail_mass = joined("lse_T"), joined("tail_mass_T")
        self.gold_logprob, self.max_logprob = joined("gold_logprob_T"), joined("max_logprob_T")
        self.logits = torch.cat(selection.logits).cpu().numpy() if selection.logits else None

    def take(self, positions: np.ndarray, rows: np.ndarray) -> DocumentCandidates:
        """The record of the given rows, which lie at ``positions`` of their document."""
        sizes = self.sizes[rows]
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        flat = np.arange(offsets[-1]) + np.repeat(self.starts[rows] - offsets[:-1], sizes)
        return DocumentCandidates(
            positions=positions.astype(np.int32),
            offsets=offsets,
            ids=self.ids[flat],
            lse=self.lse[rows],
            gold_logprob=self.gold_logprob[rows],
            tail_mass=self.tail_mass[rows],
            logits=None if self.logits is None else self.logits[flat].astype(np.float16),
        )
