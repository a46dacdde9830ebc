"""Probability that a model puts outside the stored candidate sets, and the losses beside it.

The restricted loss pushes nothing down outside S, so a model may leak probability there while its
training loss looks fine: ρ(θ) is how a user sees it.

Shapes: P selected positions of a document, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from megatron_replay.data.corpus import Document
from megatron_replay.errors import DataError, StoreError
from megatron_replay.evaluation.language_model import require_fitting
from megatron_replay.progress import Progress
from megatron_replay.store import DocumentCandidates


class Documents(Protocol):
    """What is needed of a corpus."""

    def __len__(self) -> int: ...

    def __getitem__(self, document: int, /) -> Document: ...


class Candidates(Protocol):
    """What is needed of a candidate reader."""

    def __len__(self) -> int: ...

    def __getitem__(self, document_id: int, /) -> DocumentCandidates: ...


@dataclass(frozen=True, kw_only=True)
class CandidateMass:
    """Means over the selected positions of the first documents.

    Attributes:
        outside_mass: ρ(θ) = Σ_{j∉S} p_θ(j), a probability.
        restricted_loss: −z[x] + log Σ_{j∈S} exp z[j], nats.
        full_loss: −z[x] + log Σ_j exp z[j], nats; full = restricted − log(1 − ρ) per position.
        positions: positions in the means.
        documents: documents looked at.
    """

    outside_mass: float
    restricted_loss: float
    full_loss: float
    positions: int
    documents: int


@torch.inference_mode()
def candidate_mass(
    model: PreTrainedModel,
    corpus: Documents,
    reader: Candidates,
    *,
    max_documents: int,
    progress: bool = False,
) -> CandidateMass:
    """Compare a model with the stored sets on the first ``max_documents`` documents.

    Memory: the logits of one document's selected positions, ``P·V`` numbers.

    Raises:
        DataError: corpus and store differ in length, or no position is selected.
    """
    if len(corpus) != len(reader):
        raise DataError(
            "the store was made for another corpus", expected=len(corpus), found=len(reader)
        )
    count = min(max_documents, len(corpus))
    sums, positions = np.zeros(3), 0
    with Progress("outside mass", count, "documents", enabled=progress) as bar:
        for number in range(count):
            document, candidates = corpus[number], reader[number]
            bar.advance()
            if len(candidates.positions):
                require_fitting(model, [document])
                sums += _document_sums(model, document, candidates)
                positions += len(candidates.positions)
    if positions == 0:
        raise DataError(f"no position is selected in the first {count} documents")
    outside, restricted, full = (sums / positions).tolist()
    return CandidateMass(
        outside_mass=outside,
        restricted_loss=restricted,
        full_loss=full,
        positions=positions,
        documents=count,
    )


def _document_sums(
    model: PreTrainedModel, document: Document, candidates: DocumentCandidates
) -> np.ndarray:
    """Sums over the document's positions: outside mass, restricted loss, full loss."""
    device = model.device
    tokens = torch.as_tensor(document.tokens.astype(np.int64), device=device)
    rows_P = torch.as_tensor(candidates.positions.astype(np.int64), device=device)
    logits_PV = model(tokens[None, :-1], use_cache=False, logits_to_keep=rows_P).logits[0].float()
    if candidates.ids.max() >= logits_PV.shape[-1]:
        raise StoreError(
            "the store holds ids that the model lacks",
            expected=f"ids below {logits_PV.shape[-1]}",
            found=int(candidates.ids.max()),
        )
    inside_PV = torch.zeros_like(logits_PV, dtype=torch.bool)
    sizes_P = np.diff(candidates.offsets)
    set_rows = np.repeat(np.arange(len(sizes_P)), sizes_P)
    inside_PV[
        torch.as_tensor(set_rows, device=device),
        torch.as_tensor(candidates.ids.astype(np.int64), device=device),
    ] = True
    lse_P = logits_PV.logsumexp(-1)
    # Summed over the complement itself: 1 − Σ_{j∈S} p_j would lose a small ρ to cancellation.
    outside_P = (logits_PV.masked_fill(inside_PV, -torch.inf).logsumexp(-1) - lse_P).exp()
    restricted_lse_P = logits_PV.masked_fill(~inside_PV, -torch.inf).logsumexp(-1)
    gold_P = logits_PV.gather(-1, tokens[rows_P + 1][:, None])[:, 0]
    sums = torch.stack([outside_P, restricted_lse_P - gold_P, lse_P - gold_P]).double().sum(-1)
    return sums.cpu().numpy()
