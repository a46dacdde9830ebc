"""Scores against a float64 loop over single documents; answers against transformers' generate."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_replay.data.corpus import Document
from megatron_replay.errors import CheckpointError, DataError
from megatron_replay.evaluation.language_model import greedy_answers, load_model, score
from tests.evaluation.models import EOS, VOCAB_SIZE, random_documents


def reference(directory: Path, documents: list[Document]) -> tuple[float, int, int]:
    model = AutoModelForCausalLM.from_pretrained(directory).double().eval()
    loss, tokens, correct = 0.0, 0, 0
    for document in documents:
        ids = torch.tensor(document.tokens.tolist())
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0].log_softmax(-1)
        for t in range(len(document) - 1):
            if document.loss_mask[t + 1]:
                loss -= logprobs[t, ids[t + 1]].item()
                tokens += 1
                correct += int(logprobs[t].argmax() == ids[t + 1])
    return loss, tokens, correct


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_score_equals_a_plain_loop(model_directory: Path, batch_size: int) -> None:
    documents = random_documents(10)
    loss, tokens, correct = reference(model_directory, documents)
    result = score(load_model(model_directory), documents, batch_size=batch_size)
    assert result["loss"] == pytest.approx(loss / tokens, rel=1e-6)
    assert (result["tokens"], result["accuracy"]) == (tokens, correct / tokens)
    assert result["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-5)


def test_pieces_of_a_document_keep_every_label(model_directory: Path) -> None:
    tokens = np.arange(50, dtype=np.int32)
    document = Document(tokens, np.ones(50, dtype=np.bool_))
    pieces = document.split(8)
    result = score(load_model(model_directory), pieces)
    assert result["tokens"] == 49
    assert result["loss"] == pytest.approx(reference(model_directory, pieces)[0] / 49, rel=1e-6)


def test_greedy_equals_a_plain_loop(model_directory: Path) -> None:
    """Whatever generation_config.json says, and whatever else is in the batch."""
    model = load_model(model_directory)
    model.generation_config.do_sample = True
    model.generation_config.repetition_penalty = 5.0
    prompts = [d.tokens.tolist() for d in random_documents(9, seed=3, longest=6)]
    # An EOS that some answers reach: the token that the model likes best after one prompt.
    likely = greedy_answers(model, prompts[:1], eos_id=EOS, max_new_tokens=4)[0].tokens[-1]
    answers = greedy_answers(model, prompts, eos_id=likely, max_new_tokens=12, batch_size=4)
    assert {answer.finished for answer in answers} == {True, False}
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 12 and likely not in tokens[len(prompt) :]:
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        assert answer.tokens + [likely] * answer.finished == tokens[len(prompt) :]
    assert model.generation_config.do_sample


def test_refuses_what_does_not_fit(model_directory: Path) -> None:
    model = load_model(model_directory)
    long = Document(np.zeros(514, np.int32), np.ones(514, np.bool_))
    with pytest.raises(DataError, match=r"longer than the model's context .*512.*513"):
        score(model, [long])
    strange = Document(np.array([0, VOCAB_SIZE], np.int32), np.ones(2, np.bool_))
    with pytest.raises(DataError, match=f"ids below {VOCAB_SIZE}; found {VOCAB_SIZE}"):
        score(model, [strange])
    silent = Document(np.zeros(3, np.int32), np.zeros(3, np.bool_))
    with pytest.raises(DataError, match="no token carries loss"):
        score(model, [silent])


def test_refuses_a_model_with_a_tensor_missing(model_directory: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model_directory, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"tensors missing.*layers\.1\.mlp\.up_proj"):
        load_model(broken)
    with pytest.raises(CheckpointError, match="no Hugging Face model here"):
        load_model(tmp_path)
