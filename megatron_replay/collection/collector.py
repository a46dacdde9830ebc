"""Stage 0's work between packs and candidate sets: forward, and select candidates in the head.

Shapes: T positions of a micro-batch, N of them with wanted logits, V vocabulary, H hidden channels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay.checkpoint.load import LoadedModel
from megatron_replay.collection import LOGITS_CHUNK_SIZE
from megatron_replay.collection.records import SelectedBatch, Span, choose, to_host
from megatron_replay.config import CandidatesConfig, DataConfig
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.packing import (
    Pack,
    PackedBatch,
    pack_batch,
    plan_packs,
)
from megatron_replay.data.replay import eligible_rows
from megatron_replay.forward import MicroBatch, forward_only
from megatron_replay.model.rows import HiddenStates, SelectedRows
from megatron_replay.parallel import Parallel
from megatron_replay.selection.candidates import SelectedCandidates, select_candidates
from megatron_replay.selection.shard_selection import SelectionKernel

#: Micro-batches handed to the pipeline at a time, for each stage: its bubble is then a 17th or less
#: of the time, and a few MB of candidate sets a micro-batch are all that is held meanwhile.
_MICRO_BATCHES_PER_STAGE = 16


@dataclass(frozen=True, eq=False)
class _Selection:
    """Candidate sets of a micro-batch's wanted rows, chunk after chunk; logits if stored."""

    sets: list[SelectedCandidates]
    logits: list[Tensor]


class Collector:
    """Turns document numbers into candidate sets; every rank of one model copy calls it alike.

    Args:
        lengths: int32 [D], tokens used of each document (``fit_documents``).

    Attributes:
        positions: how many went through the model so far, padding left out.
        writes: whether this rank writes what its model copy collects.
    """

    def __init__(
        self,
        settings: CandidatesConfig,
        data: DataConfig,
        corpus: Corpus,
        lengths: npt.NDArray[np.int32],
        model: LoadedModel,
        groups: Parallel,
        kernel: SelectionKernel,
    ) -> None:
        self._settings, self._data = settings, data
        self._corpus, self._lengths = corpus, lengths
        self._model, self._groups = model, groups
        self._kernel = kernel
        self.positions = 0
        self.writes = groups.last_stage and groups.tp_rank == 0

    def collect(self, documents: np.ndarray) -> Iterator[SelectedBatch]:
        """Micro-batches with candidates, their documents in the order of ``documents``.

        The work is done as the iterator is; it yields on the rank that writes, and nothing on the
        others of a model copy.
        """
        stages = self._groups.pp_size
        packs = plan_packs(
            self._lengths,
            documents,
            self._data.seq_length,
            together=self._data.pack_documents,
        )
        per_call = _MICRO_BATCHES_PER_STAGE * stages if stages > 1 else 1
        per_call *= self._data.micro_batch_size
        for first in range(0, len(packs), per_call):
            batches = list(self._micro_batches(packs[first : first + per_call]))
            spans = [list(self._spans(batch)) for batch in batches]
            work = [self._work(batch, span) for batch, span in zip(batches, spans, strict=True)]
            outputs = forward_only(self._model.module, work)
            self.positions += sum(int((batch.document_BS >= 0).sum()) for batch in batches)
            if not self.writes:
                continue
            for span, selection in zip(spans, outputs, strict=True):
                if span:
                    sets = to_host(selection.sets, selection.logits)
                    yield SelectedBatch(span, sets, self._settings)

    def _micro_batches(self, packs: list[Pack]) -> Iterator[PackedBatch]:
        size = self._data.micro_batch_size
        for first in range(0, len(packs), size):
            group = packs[first : first + size]
            group += [np.empty(0, np.int64)] * (size - len(group))
            yield pack_batch(self._corpus, group, self._data.seq_length, self._lengths)

    def _spans(self, batch: PackedBatch) -> Iterator[Span]:
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
            eligible, lying = positions[start:stop], rows[start:stop]
            if self._settings.position_strategy == "bucket":
                yield Span(document, eligible, lying)
            else:
                wanted = choose(self._settings, document, eligible)
                yield Span(document, wanted, lying[np.searchsorted(eligible, wanted)])

    def _work(self, batch: PackedBatch, spans: list[Span]) -> MicroBatch:
        """A micro-batch on the device, its head, and the only rows that the head asks for."""
        device = self._groups.device
        rows_N = torch.from_numpy(np.concatenate([s.rows for s in spans] or [np.empty(0, int)]))
        rows = SelectedRows.of(
            rows_N,
            batch.segments,
            self._data.seq_length,
            self._groups.tp_group,
            sequence_parallel=self._model.config.sequence_parallel,
        ).to(device)
        labels_N = batch.labels_BS.flatten()[rows_N].to(device)
        head = functools.partial(self._select, rows.rows_N, labels_N)
        return MicroBatch(batch.to(device), head, rows)

    def _select(
        self, rows_N: Tensor, labels_N: Tensor, hidden: HiddenStates, weight_VH: Tensor
    ) -> _Selection:
        """The head. Logits exist for ``LOGITS_CHUNK_SIZE`` positions at a time, never for all."""
        vocab_start = self._groups.tp_rank * weight_VH.shape[0]
        selection = _Selection([], [])
        chunks = zip(
            rows_N.split(LOGITS_CHUNK_SIZE), labels_N.split(LOGITS_CHUNK_SIZE), strict=True
        )
        for rows, labels in chunks:
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
            if self._settings.store_logits != "none":
                selection.logits.append(self._candidate_logits(logits_NV, sets, vocab_start))
        return selection

    def _candidate_logits(self, logits_NV: Tensor, sets: SelectedCandidates, start: int) -> Tensor:
        """Logits of the candidates, fp32 [nnz]: each from its owner. One all-reduce over TP."""
        local = sets.ids.long() - start
        inside = (local >= 0) & (local < logits_NV.shape[1])
        row = torch.repeat_interleave(
            torch.arange(len(logits_NV), device=local.device), sets.offsets.diff()
        )
        values = logits_NV[row, local.clamp(0, logits_NV.shape[1] - 1)].float() * inside
        dist.all_reduce(values, group=self._groups.tp_group)
        return values
