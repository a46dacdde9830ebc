"""Stage 0's work from documents to records: share prefixes, forward, select in the head.

The device selects candidates at the wanted positions of a micro-batch. The host then cuts them into
one record per document, where the records are written (``collection.stream``).

Shapes: N wanted positions of a micro-batch, D documents that have any, V vocabulary, C candidates.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay import kernels
from megatron_replay.checkpoint.load import LoadedModel
from megatron_replay.collection import LOGITS_CHUNK_SIZE
from megatron_replay.collection.stream import Records
from megatron_replay.config import CandidatesConfig, DataConfig
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.packing import PackedBatch, micro_batches_of, pack_batch
from megatron_replay.data.replay import eligible_rows
from megatron_replay.forward import MicroBatch, forward_only
from megatron_replay.model.selected_rows import HiddenStates, SelectedRows
from megatron_replay.parallel import Parallel
from megatron_replay.selection.candidates import SelectedCandidates, select_candidates
from megatron_replay.selection.positions import select_positions
from megatron_replay.store import CandidateBatch, offsets_of_counts

#: Confidence buckets of the bucket strategy.
NUM_BUCKETS = 5
#: Micro-batches that the pipeline gets at a time, for each stage: its bubble is then at most a 17th
#: of the time, and only a few MB of candidate sets a micro-batch are held meanwhile.
_MICRO_BATCHES_PER_STAGE = 16


class Wanted(NamedTuple):
    """The positions of a micro-batch whose logits are wanted, document after document.

    Attributes:
        documents: int64 [D], numbers in the corpus.
        offsets: int64 [D + 1]; document d has positions ``[offsets[d]:offsets[d + 1]]``.
        positions: int32 [N], ascending inside a document.
        rows: int64 [N], their rows in the micro-batch.
    """

    documents: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int64]


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


class Collector:
    """Turns document numbers into candidate sets; every rank of one model copy calls it alike.

    Args:
        lengths: int32 [D], tokens used of each document (``fit_documents``).

    Attributes:
        positions, computed: positions of the documents so far, and how many of them went through
            the model.
        writes: whether this rank writes what its model copy collects.
        backend: what selects candidates on this device.
    """

    def __init__(
        self,
        settings: CandidatesConfig,
        data: DataConfig,
        corpus: Corpus,
        lengths: npt.NDArray[np.int32],
        model: LoadedModel,
        groups: Parallel,
    ) -> None:
        self._settings, self._data = settings, data
        self._corpus, self._lengths = corpus, lengths
        self._model, self._groups = model, groups
        like = torch.empty(0, dtype=model.config.params_dtype, device=groups.device)
        self._backend = kernels.SELECTION.choose("auto", like)
        self.backend = kernels.SELECTION.describe("auto", like)
        self.positions = self.computed = 0
        self.writes = groups.last_stage and groups.tp_rank == 0

    def collect(self, documents: npt.NDArray[np.int64]) -> Iterator[tuple[Records, int]]:
        """The records of each micro-batch, and their bytes; each document once, in any order.

        The work is done as the iterator advances. It yields on the rank that writes, and nothing on
        the other ranks of a model copy.
        """
        corpus, lengths = self._corpus, self._lengths
        planned = micro_batches_of(corpus, documents, lengths, self._data)
        stages = self._groups.pp_size
        per_call = _MICRO_BATCHES_PER_STAGE * stages if stages > 1 else 1
        for first in range(0, len(planned), per_call):
            batches = [
                pack_batch(corpus, some, lengths, multiple=self._groups.tp_size)
                for some in planned[first : first + per_call]
            ]
            wanted = [self._wanted(batch) for batch in batches]
            work = [self._work(batch, some) for batch, some in zip(batches, wanted, strict=True)]
            outputs = forward_only(self._model.module, work)
            self.positions += sum(batch.forest.positions for batch in batches)
            self.computed += sum(batch.forest.computed for batch in batches)
            if not self.writes:
                continue
            for some, selection in zip(wanted, outputs, strict=True):
                if len(some.documents):
                    yield self._to_host(some, *selection)

    def _wanted(self, batch: PackedBatch) -> Wanted:
        """Every eligible position for the bucket strategy, which draws by confidence afterwards.

        The others choose before the forward pass and skip the output layer elsewhere.
        """
        rows_N = eligible_rows(batch).numpy()
        positions_N = batch.position_T.numpy()[rows_N]
        places_N = np.repeat(np.arange(len(batch.forest)), batch.forest.own_D)[rows_N]
        starts = np.flatnonzero(np.diff(places_N, prepend=-1))
        documents = batch.forest.document_D[places_N[starts]]
        kept = np.split(np.arange(len(rows_N)), starts[1:]) if len(starts) else []
        if self._settings.position_strategy != "bucket":
            for d, number in enumerate(documents.tolist()):
                eligible = positions_N[kept[d]]
                chosen = choose(self._settings, number, eligible)
                kept[d] = kept[d][np.searchsorted(eligible, chosen)]
        offsets = offsets_of_counts(np.array([len(each) for each in kept], np.int64))
        kept_N = np.concatenate([np.empty(0, np.int64), *kept])
        return Wanted(documents, offsets, positions_N[kept_N], rows_N[kept_N])

    def _work(self, batch: PackedBatch, wanted: Wanted) -> MicroBatch:
        """A micro-batch on the device, its head, and the only rows that the head reads."""
        device = self._groups.device
        rows_N = torch.from_numpy(wanted.rows)
        rows = SelectedRows.of(
            rows_N,
            batch.documents,
            len(batch.token_T),
            self._groups.tp_group,
            sequence_parallel=self._model.config.sequence_parallel,
        ).to(device)
        labels_N = batch.label_T[rows_N].to(device)
        head = functools.partial(self._select, rows.rows_N, labels_N)
        return MicroBatch(batch.to(device), head, rows)

    def _select(
        self, rows_N: Tensor, labels_N: Tensor, hidden: HiddenStates, weight_VH: Tensor
    ) -> tuple[list[SelectedCandidates], list[Tensor]]:
        """The head: candidate sets chunk by chunk, and their logits if these are stored.

        Logits exist for ``LOGITS_CHUNK_SIZE`` positions at a time, never for all.
        """
        vocab_start = self._groups.vocabulary_shard(self._model.shape.vocab_size).start
        sets, logits, size = [], [], LOGITS_CHUNK_SIZE
        chunks = zip(hidden[rows_N].split(size), labels_N.split(size), strict=True)
        for hidden_NH, labels in chunks:
            logits_NV = hidden_NH @ weight_VH.T
            selected = select_candidates(
                logits_NV,
                labels,
                coverage=self._settings.coverage,
                max_candidates=self._settings.max_candidates,
                vocab_start=vocab_start,
                tp_group=self._groups.tp_group,
                backend=self._backend,
            )
            sets.append(selected)
            if self._settings.store_logits != "none":
                logits.append(self._candidate_logits(logits_NV, selected, vocab_start))
        return sets, logits

    def _candidate_logits(self, logits_NV: Tensor, sets: SelectedCandidates, start: int) -> Tensor:
        """Logits of the candidates, fp32 [C], each from its owner. One all-reduce over TP."""
        local = sets.ids.long() - start
        inside = (local >= 0) & (local < logits_NV.shape[1])
        row = torch.repeat_interleave(
            torch.arange(len(logits_NV), device=local.device), sets.offsets.diff()
        )
        values = logits_NV[row, local.clamp(0, logits_NV.shape[1] - 1)].float() * inside
        dist.all_reduce(values, group=self._groups.tp_group)
        return values

    def _to_host(
        self, wanted: Wanted, sets: Sequence[SelectedCandidates], logits: Sequence[Tensor]
    ) -> tuple[Records, int]:
        batch = CandidateBatch(
            document_offsets=wanted.offsets,
            positions=wanted.positions,
            offsets=offsets_of_counts(_host(chunk.offsets.diff() for chunk in sets)),
            ids=_host(chunk.ids for chunk in sets),
            lse=_host(chunk.lse_T for chunk in sets),
            label_logprob=_host(chunk.label_logprob_T for chunk in sets),
            tail_mass=_host(chunk.tail_mass_T for chunk in sets),
            logits=_host(logits) if logits else None,
        )
        nbytes = sum(array.nbytes for array in vars(batch).values() if array is not None)
        max_logprob_N = _host(chunk.max_logprob_T for chunk in sets)
        return self._records(wanted.documents.tolist(), batch, max_logprob_N), nbytes

    def _records(
        self, documents: list[int], batch: CandidateBatch, confidence_N: npt.NDArray[np.float32]
    ) -> Records:
        """Each document and its record, cut while the device continues.

        ``batch`` has every eligible position for the bucket strategy, which draws by confidence.
        """
        confidences = np.split(confidence_N, batch.document_offsets[1:-1])
        for number, record, confidence in zip(
            documents, batch.documents(), confidences, strict=True
        ):
            if self._settings.position_strategy == "bucket":
                chosen = choose(self._settings, number, record.positions, confidence)
                yield number, record.take(np.searchsorted(record.positions, chosen))
            else:
                yield number, record


def _host(chunks: Iterable[Tensor]) -> npt.NDArray[Any]:
    return torch.cat(list(chunks)).cpu().numpy()
