"""Measures the probability outside the stored candidate sets, and the losses.

The restricted loss pushes nothing down outside S, so a model may leak probability there while its
training loss looks fine. Stage 1's probe reads the same numbers, over the same documents, with the
same function.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from megatron_replay.data.corpus import Corpus, Document, pick_documents
from megatron_replay.errors import DataError, StoreError
from megatron_replay.evaluation.language_model import require_fitting
from megatron_replay.loss.candidate_sets import CandidateSets
from megatron_replay.loss.full import outside_mass
from megatron_replay.progress import Progress
from megatron_replay.store import CandidateReader, DocumentCandidates


@torch.inference_mode()
def candidate_mass(
    model: PreTrainedModel,
    corpus: Corpus,
    reader: CandidateReader,
    *,
    num_documents: int,
    show: str = "",
) -> dict[str, float | int]:
    """Means over the recorded positions of ``num_documents`` documents, evenly spaced.

    Returns:
        ``outside_mass``: ρ = Σ_{j∉S} p(j), good to about 1e-6; ``restricted_loss``:
        −z[x] + log Σ_{j∈S} exp z[j], and ``full_loss``: −z[x] + log Σ_j exp z[j], in nats;
        ``positions`` and ``documents``: how many there are.

    Raises:
        DataError: corpus and store differ in length, or no position is recorded.
    """
    if len(corpus) != len(reader):
        raise DataError(
            "the store was made for another corpus", expected=len(corpus), found=len(reader)
        )
    sample = pick_documents(corpus.lengths, num_documents).tolist()
    totals, positions = torch.zeros(3, dtype=torch.float64), 0
    with Progress(show, len(sample), "documents", enabled=bool(show)) as bar:
        for number in sample:
            candidates = reader[number]
            if len(candidates.positions):
                totals += _sums(model, corpus[number], candidates)
                positions += len(candidates.positions)
            bar.advance()
    if positions == 0:
        raise DataError(f"no position is recorded in {len(sample)} documents of the store")
    outside, restricted, full = (totals / positions).tolist()
    return {
        "outside_mass": outside,
        "restricted_loss": restricted,
        "full_loss": full,
        "positions": positions,
        "documents": len(sample),
    }


def _sums(
    model: PreTrainedModel, document: Document, candidates: DocumentCandidates
) -> torch.Tensor:
    """Sums over the P recorded positions: outside mass, restricted loss, full loss. float64 [3]."""
    require_fitting(model, [document])
    weight_VH = model.get_output_embeddings().weight
    if candidates.ids.max() >= len(weight_VH):
        raise StoreError(
            "the store holds ids that the model lacks",
            expected=f"ids below {len(weight_VH)}",
            found=int(candidates.ids.max()),
        )
    sets = CandidateSets.of(
        candidates.ids,
        candidates.offsets.astype("int64"),
        document.tokens[candidates.positions + 1].astype("int64"),
        vocab_size=len(weight_VH),
    ).moved(lambda tensor: tensor.to(model.device))
    tokens_L = torch.from_numpy(document.tokens[:-1].astype("int64")).to(model.device)
    positions_P = torch.from_numpy(candidates.positions.astype("int64")).to(model.device)
    hidden_LH = model.base_model(tokens_L[None], use_cache=False).last_hidden_state[0]
    outside_P, full_P = outside_mass(hidden_LH[positions_P], weight_VH, sets)
    # Below one: where rounding puts all mass outside, the loss is large, not infinite.
    restricted_P = full_P + torch.log1p(-outside_P.clamp(max=1 - 2**-24))
    return torch.stack([outside_P, restricted_P, full_P]).double().sum(1).cpu()
