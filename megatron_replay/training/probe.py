"""The outside-mass probe: is probability leaking to tokens that the restricted loss cannot see?

Nothing pushes down tokens outside S. Where the base model knows little of the domain, the trained
model's mass drifts there: the restricted loss still falls while generation breaks. On a small fixed
sample the probe shows the mass outside S and the full-softmax loss beside the restricted one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from megatron_replay.data.corpus import Corpus
from megatron_replay.data.packing import pack_batch, plan_packs
from megatron_replay.data.replay import join_candidates
from megatron_replay.forward import Work, forward_only
from megatron_replay.model import heads
from megatron_replay.parallel import Parallel
from megatron_replay.store import CandidateReader

#: Warn when the outside mass exceeds the base model's by this factor and by this much.
_DRIFT_FACTOR, _DRIFT_MASS = 2.0, 0.02


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
    """A fixed, evenly spaced sample of documents, packed once.

    Args:
        corpus, reader: where the sample comes from.
        lengths: usable tokens per document; documents with none are not sampled.
        num_documents: size of the sample.
    """

    def __init__(
        self,
        corpus: Corpus,
        reader: CandidateReader,
        lengths: np.ndarray,
        parallel: Parallel,
        *,
        num_documents: int,
        seq_length: int,
        micro_batch_size: int,
    ) -> None:
        usable = np.flatnonzero(lengths > 1)
        picks = np.unique(np.linspace(0, len(usable) - 1, num_documents).round().astype(np.int64))
        sample = usable[picks]
        packs = plan_packs(lengths, sample, seq_length)
        self._work: list[Work] = []
        for start in range(0, len(packs), micro_batch_size):
            group = packs[start : start + micro_batch_size]
            group += [np.empty(0, np.int64)] * (micro_batch_size - len(group))
            batch = pack_batch(corpus, group, seq_length, lengths).to(parallel.device)
            targets = join_candidates(batch, reader, scope="position").to(parallel.device)
            self._work.append((batch, heads.probe(targets, parallel)))
        tail = [reader[int(document)].tail_mass for document in sample]
        self._base_outside_mass = float(np.concatenate(tail).mean())

    def read(self, model: torch.nn.Module) -> Reading | None:
        """Run the sample through ``model``; None on all stages but the last. Collective over PP."""
        outputs = forward_only(model, self._work)
        if not outputs:
            return None
        outside, restricted, full, count = torch.stack(outputs).double().sum(0).tolist()
        return Reading(outside / count, restricted / count, full / count, self._base_outside_mass)
