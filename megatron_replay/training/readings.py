"""The probes: two fixed samples that a run scores now and then, to see what its loss does not show.

``Probe`` asks whether probability is leaking to tokens that the restricted loss cannot see. Nothing
pushes down tokens outside S. Where the base model knows little of the domain, the trained model's
mass drifts there: the restricted loss still falls while generation breaks. It measures the mass
outside S, and the full-softmax loss beside the restricted one.

``GeneralText`` asks what is being forgotten: the perplexity of text that is not trained on.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_replay.data.corpus import Corpus
from megatron_replay.data.packing import PackedBatch, pack_batch, plan_packs
from megatron_replay.data.replay import full_targets, join_candidates
from megatron_replay.errors import ConfigError, DataError
from megatron_replay.forward import Work, forward_only
from megatron_replay.model import heads
from megatron_replay.parallel import Parallel
from megatron_replay.store import CandidateReader

#: Warn when the outside mass exceeds the base model's by this factor and by this much.
_DRIFT_FACTOR, _DRIFT_MASS = 2.0, 0.02


def pick_documents(lengths: npt.NDArray[np.int32], number: int) -> npt.NDArray[np.int64]:
    """Up to ``number`` documents that have a position, evenly spaced: the same in every run."""
    usable = np.flatnonzero(lengths > 1)
    number = min(number, len(usable))
    picks = np.unique(np.linspace(0, len(usable) - 1, number).round().astype(np.int64))
    return usable[picks]


def pack_documents(
    corpus: Corpus,
    documents: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int32],
    *,
    seq_length: int,
    micro_batch_size: int,
) -> list[PackedBatch]:
    """``documents`` in whole micro-batches; the last is filled up with packs of padding."""
    packs = plan_packs(lengths, documents, seq_length)
    packs += [np.empty(0, np.int64)] * (-len(packs) % micro_batch_size)
    return [
        pack_batch(corpus, packs[start : start + micro_batch_size], seq_length, lengths)
        for start in range(0, len(packs), micro_batch_size)
    ]


@dataclass(frozen=True)
class Reading:
    """Means over the sample's selected positions."""

    outside_mass: float
    restricted_loss: float
    full_loss: float
    base_outside_mass: float

    @property
    def drifts(self) -> bool:
        """Whether mass has left the candidate sets since Stage 0."""
        return self.outside_mass > max(
            _DRIFT_FACTOR * self.base_outside_mass, self.base_outside_mass + _DRIFT_MASS
        )

    def values(self) -> dict[str, float]:
        """The numbers, for the log."""
        return dataclasses.asdict(self)

    def warning(self) -> str:
        """What to tell the user when it drifts."""
        return (
            f"{100 * self.outside_mass:.1f} % of the probability lies outside the candidate sets "
            f"({100 * self.base_outside_mass:.1f} % in the base model): the restricted loss "
            f"{self.restricted_loss:.3f} hides a full-softmax loss of {self.full_loss:.3f}. "
            "Try --candidate-scope document and --tail ghost, or a store with higher --coverage"
        )


class Probe:
    """Watches the mass outside the candidate sets on a sample of the training corpus.

    Args:
        corpus, reader: where the sample comes from.
        lengths: usable tokens per document; documents with none are not sampled.
        num_documents: size of the sample.

    Raises:
        DataError: none of its positions is recorded.
    """

    def __init__(
        self,
        corpus: Corpus,
        reader: CandidateReader,
        lengths: npt.NDArray[np.int32],
        parallel: Parallel,
        *,
        num_documents: int,
        seq_length: int,
        micro_batch_size: int,
    ) -> None:
        sample = pick_documents(lengths, num_documents)
        self._work: list[Work] = []
        tail_mass = []  # of the positions that are read: truncation may have cut others off
        for batch in pack_documents(
            corpus, sample, lengths, seq_length=seq_length, micro_batch_size=micro_batch_size
        ):
            targets = join_candidates(batch, reader, scope="position")
            tail_mass.append((targets.tail_logit_N - targets.lse_N).exp())
            targets = targets.to(parallel.device)
            self._work.append(Work(batch.to(parallel.device), heads.probe(targets, parallel)))
        tail_mass_N = torch.cat(tail_mass) if tail_mass else torch.empty(0)
        if not len(tail_mass_N):
            raise DataError(
                "the store records no position of the probe's sample",
                where=reader.directory,
                found=f"{len(sample)} documents",
                fix="Raise --probe-documents, or give --probe-interval 0",
            )
        self._base_outside_mass = float(tail_mass_N.double().mean())

    def read(self, model: torch.nn.Module) -> Reading | None:
        """Run the sample through ``model``; None on all stages but the last. Collective over PP."""
        outputs = forward_only(model, self._work)
        if not outputs:
            return None
        outside, restricted, full, count = torch.stack(outputs).double().sum(0).tolist()
        return Reading(outside / count, restricted / count, full / count, self._base_outside_mass)


class GeneralText:
    """ΔPPL = exp(CE) - exp(CE_base) of a sample of general text, CE per token over its loss mask.

    The base is the run's own first reading, before its first step. A run that goes on takes it from
    its log (``resume``), so that nothing is measured against anything else.

    Args:
        corpus: text of the training corpus's tokenizer.
        num_documents: size of the sample.
        longest: positions scored of a document, its first ones; at most ``seq_length``.

    Attributes:
        num_truncated: documents of the sample that are longer than that.

    Raises:
        DataError: no token of the sample carries loss.
    """

    def __init__(
        self,
        corpus: Corpus,
        parallel: Parallel,
        *,
        num_documents: int,
        longest: int,
        seq_length: int,
        micro_batch_size: int,
    ) -> None:
        lengths = np.minimum(corpus.lengths, longest + 1)
        sample = pick_documents(lengths, num_documents)
        self.num_truncated = int((corpus.lengths[sample] > lengths[sample]).sum())
        content = f"{corpus.fingerprint} {sample.tolist()} {longest}"
        self._fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
        self._base: float | None = None
        self._num_tokens = 0
        self._work: list[Work] = []
        for batch in pack_documents(
            corpus, sample, lengths, seq_length=seq_length, micro_batch_size=micro_batch_size
        ):
            rows_N, labels_N = full_targets(batch)
            self._num_tokens += len(rows_N)
            head = heads.full_loss(
                rows_N.to(parallel.device), labels_N.to(parallel.device), parallel
            )
            self._work.append(Work(batch.to(parallel.device), head))
        if not self._num_tokens:
            raise DataError("no token of the sample carries loss", where=corpus.prefix)

    def read(self, model: torch.nn.Module) -> dict[str, float | str] | None:
        """Values for the log; None on all stages but the last. Collective over PP."""
        outputs = forward_only(model, self._work)
        if not outputs:
            return None
        total = torch.cat(outputs).cpu().double().sum()
        perplexity = (total / self._num_tokens).exp().item()
        if self._base is None:
            self._base = perplexity
        return {
            "perplexity": perplexity,
            "delta_ppl": perplexity - self._base,
            "sample": self._fingerprint,
        }

    def resume(self, lines: Sequence[Mapping[str, Any]], where: object) -> None:
        """Take the base from the line of iteration 0.

        Raises:
            ConfigError: there is none, or it is of another sample.
        """
        readings = [line["general"] for line in lines if "general" in line]
        if not readings or lines[0]["iteration"] != 0 or readings[0]["perplexity"] is None:
            raise ConfigError(
                "the perplexity of the general text before the first step is not known",
                where=where,
                expected='a line of iteration 0 with "general"',
                found=f"{len(lines)} lines without it",
                fix="Leave out --general-data-path, or start the run anew with it",
            )
        if readings[0]["sample"] != self._fingerprint:
            raise ConfigError(
                "this run was begun with another sample of general text",
                where=where,
                expected=readings[0]["sample"],
                found=self._fingerprint,
                fix="Give the --general-data-path and --probe-documents it was started with",
            )
        self._base = readings[0]["perplexity"]


def require_same_tokenizer(general: Corpus, corpus: Corpus) -> None:
    """Raise ConfigError unless the general text has the training corpus's tokens."""
    ours, theirs = (
        f"{c.vocab_size} tokens, fingerprint {c.tokenizer_fingerprint[:16]}"
        for c in (general, corpus)
    )
    same = general.tokenizer_fingerprint == corpus.tokenizer_fingerprint
    if not same or general.vocab_size != corpus.vocab_size:
        raise ConfigError(
            "the general text was made with another tokenizer than --data-path",
            where="--general-data-path",
            expected=theirs,
            found=ours,
            fix="Run tools/preprocess_data.py with the tokenizer of --load",
        )
