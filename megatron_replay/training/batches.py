"""Builds a step's batch: this rank's micro-batches of a global batch, each with its head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from megatron_replay.config import Stage1Config
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.forest import Forest
from megatron_replay.data.loader import GlobalBatches
from megatron_replay.data.packing import PackedBatch, micro_batches_of, pack_batch, to_device
from megatron_replay.data.replay import ReplayTargets, full_targets, join_candidates
from megatron_replay.forward import MicroBatch
from megatron_replay.loss.backends import HeadBackend
from megatron_replay.loss.candidate_sets import CandidateSets
from megatron_replay.loss.divergence import Divergence, SoftTargets
from megatron_replay.model import heads
from megatron_replay.model.gpt import Head
from megatron_replay.model.selected_rows import SelectedRows
from megatron_replay.parallel import Parallel
from megatron_replay.store import CandidateReader


class StepBatch(NamedTuple):
    """This rank's share of a global batch, on its device.

    Attributes:
        parts: the documents of each micro-batch of the whole global batch; rank r of DP computes
            r, r + DP, ...
    """

    micro_batches: list[MicroBatch]
    parts: list[Forest]

    @property
    def tokens(self) -> int:
        """Of the global batch."""
        return sum(part.positions for part in self.parts)

    @property
    def computed_tokens(self) -> int:
        """Of the global batch: fewer than ``tokens`` where documents share prefixes."""
        return sum(part.computed for part in self.parts)


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingData:
    """The inputs of a run.

    Attributes:
        reader: the candidate store; None: the run has none.
        lengths: usable tokens of each document of the corpus.
        batches: the documents of each step.
        train_iters: steps of the whole run.
    """

    corpus: Corpus
    reader: CandidateReader | None
    lengths: npt.NDArray[np.int32]
    batches: GlobalBatches
    train_iters: int


@dataclass(frozen=True, eq=False)
class BatchBuilder:
    """``make_batch(iteration)``, called by the loader's thread, which alone uses ``batches``.

    ``vocab_size``: the model's.
    """

    config: Stage1Config
    groups: Parallel
    data: TrainingData
    backend: HeadBackend
    vocab_size: int

    def __call__(self, iteration: int) -> StepBatch:
        """The batch of the step after ``iteration`` steps.

        Raises:
            StoreError: a record is damaged, or belongs to another corpus.
        """
        data, dp_rank, dp_size = self.data, self.groups.dp_rank, self.groups.dp_size
        parts = micro_batches_of(
            data.corpus,
            data.batches.documents(iteration),
            data.lengths,
            self.config.data,
            multiple=dp_size,
        )
        return StepBatch([self._micro_batch(part) for part in parts[dp_rank::dp_size]], parts)

    def _micro_batch(self, documents: Forest) -> MicroBatch:
        """A micro-batch with the head that computes its loss."""
        data = self.data
        batch = pack_batch(data.corpus, documents, data.lengths, multiple=self.groups.tp_size)
        loss = self.config.loss
        targets = None
        if loss.trains_on_store:
            assert data.reader is not None
            targets = join_candidates(
                batch,
                data.reader,
                vocab_size=self.vocab_size,
                scope=loss.candidate_scope,
                logits=loss.kl_weight > 0,
            )
            rows_N, labels_N = targets.rows_N, targets.sets.labels_N
        else:
            rows_N, labels_N = full_targets(batch)
        rows = self._rows(rows_N, batch)
        divergence = None if targets is None else self._divergence(targets.own_sets)
        if loss.loss == "full":
            labels_N = self._to_device(labels_N)
            head = heads.full_loss(
                rows.rows_N,
                labels_N,
                self.groups,
                vocab_size=self.vocab_size,
                divergence=divergence,
            )
        else:
            assert targets is not None
            head = self._restricted_loss(targets, rows.rows_N, divergence)
        # QK-Clip needs the attention logits of every position.
        is_every = self.config.optimizer.qk_clip_threshold is not None
        return MicroBatch(batch.to(self.groups.device), head, None if is_every else rows)

    def _rows(self, rows_N: torch.Tensor, batch: PackedBatch) -> SelectedRows:
        """The positions with a loss, on the device."""
        rows = SelectedRows.of(
            rows_N,
            batch.documents,
            len(batch.token_T),
            self.groups.tp_group,
            sequence_parallel=self.config.parallel.sequence_parallel,
        )
        return rows.to(self.groups.device)

    def _restricted_loss(
        self, targets: ReplayTargets, rows_N: torch.Tensor, divergence: Divergence | None
    ) -> Head:
        """Cuts the sets to this rank's shard on the host, so a step never waits for the device."""
        groups, loss = self.groups, self.config.loss
        shard = groups.vocabulary_shard(self.vocab_size)
        sets = targets.sets.shard(shard.start, len(shard))
        if groups.last_stage and self.backend.reads_transpose:
            sets = sets.with_transpose()
        is_ghost = loss.tail == "ghost"
        return heads.restricted_loss(
            rows_N,
            sets.moved(self._to_device),
            groups,
            backend=self.backend,
            tail_logit_N=self._to_device(targets.tail_logit_N) if is_ghost else None,
            divergence=divergence,
        )

    def _divergence(self, own_sets: CandidateSets | None) -> Divergence | None:
        """What ``--kl-weight`` adds, cut to this rank's shard; None before the last stage."""
        if own_sets is None or not self.groups.last_stage:
            return None
        shard = self.groups.vocabulary_shard(self.vocab_size)
        targets = SoftTargets.of(own_sets, shard.start, len(shard))
        return Divergence(targets.moved(self._to_device), self.config.loss.kl_weight)

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return to_device(tensor, self.groups.device)
