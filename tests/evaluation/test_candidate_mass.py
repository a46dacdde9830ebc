from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_replay.data.corpus import Document
from megatron_replay.errors import DataError, StoreError
from megatron_replay.evaluation.language_model import load_model
from megatron_replay.evaluation.measurements import candidate_mass
from megatron_replay.store import DocumentCandidates
from tests.evaluation.models import VOCAB_SIZE, random_documents


def candidates_of(positions: list[int], sets: list[list[int]]) -> DocumentCandidates:
    zeros = np.zeros(len(positions), dtype=np.float32)
    return DocumentCandidates(
        positions=np.array(positions, dtype=np.int32),
        offsets=np.cumsum([0, *map(len, sets)]).astype(np.int64),
        ids=np.array([i for ids in sets for i in ids], dtype=np.int32),
        lse=zeros,
        label_logprob=zeros,
        tail_mass=zeros,
        logits=None,
    )


def random_candidates(document: Document, rng: np.random.Generator) -> DocumentCandidates:
    positions = document.eligible_positions().tolist()
    sets = [
        sorted({int(document.tokens[t + 1]), *rng.integers(0, VOCAB_SIZE, 30).tolist()})
        for t in positions
    ]
    return candidates_of(positions, sets)


class Documents(list[Document]):
    """Stands in for a corpus."""

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(document) for document in self], dtype=np.int32)


def test_equals_a_float64_loop(model_directory: Path) -> None:
    documents = Documents([*random_documents(4), random_documents(1, seed=9)[0]])
    rng = np.random.default_rng(1)
    store = [random_candidates(d, rng) for d in documents]
    store[4] = candidates_of([], [])
    model = AutoModelForCausalLM.from_pretrained(model_directory).double().eval()
    outside, restricted, full = [], [], []
    for number in (0, 2, 4):  # three of five, evenly spaced
        document, candidates = documents[number], store[number]
        ids = torch.tensor(document.tokens.tolist())
        with torch.no_grad():
            probabilities = model(ids[None]).logits[0].softmax(-1).numpy()
        for i, t in enumerate(candidates.positions):
            inside = candidates.ids[candidates.offsets[i] : candidates.offsets[i + 1]]
            label, mass = probabilities[t, ids[t + 1]], probabilities[t, inside].sum()
            outside.append(1 - mass)
            restricted.append(-np.log(label / mass))
            full.append(-np.log(label))
    result = candidate_mass(load_model(model_directory), documents, store, num_documents=3)
    assert (result["positions"], result["documents"]) == (len(full), 3)
    assert result["outside_mass"] == pytest.approx(np.mean(outside), rel=1e-5)
    assert result["restricted_loss"] == pytest.approx(np.mean(restricted), rel=1e-5)
    assert result["full_loss"] == pytest.approx(np.mean(full), rel=1e-5)


def test_nothing_is_outside_the_whole_vocabulary(model_directory: Path) -> None:
    documents = Documents(random_documents(1))
    positions = documents[0].eligible_positions().tolist()
    everything = candidates_of(positions, [list(range(VOCAB_SIZE))] * len(positions))
    result = candidate_mass(load_model(model_directory), documents, [everything], num_documents=9)
    assert result["outside_mass"] == pytest.approx(0.0, abs=1e-6)
    assert result["restricted_loss"] == pytest.approx(result["full_loss"])


def test_refuses_what_does_not_belong_together(model_directory: Path) -> None:
    model, documents = load_model(model_directory), Documents(random_documents(2))
    nothing = candidates_of([], [])
    with pytest.raises(DataError, match=r"another corpus \(expected 2; found 1\)"):
        candidate_mass(model, documents, [nothing], num_documents=2)
    with pytest.raises(DataError, match="no position is recorded in 2 documents"):
        candidate_mass(model, documents, [nothing, nothing], num_documents=2)
    foreign = candidates_of([0], [[0, VOCAB_SIZE]])
    with pytest.raises(StoreError, match=f"expected ids below {VOCAB_SIZE}; found {VOCAB_SIZE}"):
        candidate_mass(model, documents, [foreign, foreign], num_documents=2)
