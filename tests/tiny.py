"""Models small enough to differentiate in float64, made by transformers, and a corpus for them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_replay.data.corpus import Corpus, Document, checksum, corpus_file
from megatron_replay.data.corpus_writer import CorpusWriter

VOCAB_SIZE = 512
_SETTINGS: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.08,
}


def save_qwen3(directory: Path, *, tied: bool, seed: int = 0, **changes: Any) -> Path:
    """Save a randomly initialised Qwen3; heads x kv_channels differs from the hidden size."""
    settings: dict[str, Any] = {
        **_SETTINGS,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "tie_word_embeddings": tied,
        **changes,
    }
    return _save(directory, Qwen3ForCausalLM, Qwen3Config(**settings), seed)


def save_llama(directory: Path, *, tied: bool, seed: int = 0, **changes: Any) -> Path:
    """Save a randomly initialised Llama; heads x kv_channels is the hidden size, as is usual."""
    settings: dict[str, Any] = {
        **_SETTINGS,
        "num_key_value_heads": 2,
        "tie_word_embeddings": tied,
        **changes,
    }
    return _save(directory, LlamaForCausalLM, LlamaConfig(**settings), seed)


def save_qwen2(directory: Path, *, tied: bool, seed: int = 0, **changes: Any) -> Path:
    """Save a randomly initialised Qwen2: queries, keys and values have biases, which are not 0."""
    settings: dict[str, Any] = {
        **_SETTINGS,
        "num_key_value_heads": 4,
        "tie_word_embeddings": tied,
        **changes,
    }
    return _save(directory, Qwen2ForCausalLM, Qwen2Config(**settings), seed)


def save_mistral(directory: Path, *, tied: bool, seed: int = 0, **changes: Any) -> Path:
    """Save a randomly initialised Mistral without a sliding window."""
    settings: dict[str, Any] = {
        **_SETTINGS,
        "num_key_value_heads": 2,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        **changes,
    }
    return _save(directory, MistralForCausalLM, MistralConfig(**settings), seed)


def _save(
    directory: Path, model_class: type[PreTrainedModel], config: PretrainedConfig, seed: int
) -> Path:
    torch.manual_seed(seed)
    model = model_class(config).float()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # at ones and zeros, a missing norm or bias would go unseen
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return directory


def load_reference(directory: Path) -> PreTrainedModel:
    """transformers' own model in float32, plain attention: the independent reference."""
    return AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    ).eval()


def save_corpus(
    prefix: Path,
    *,
    num_documents: int,
    seed: int = 0,
    longest: int = 24,
    stems: int = 0,
    longest_schema: int = 9,
) -> Corpus:
    """Random documents of 6 to ``longest`` tokens; the last 3 to half of each carry loss.

    With ``stems``, each follows one of so many schemas of 3 to ``longest_schema`` tokens, which all
    follow the same 4 tokens; and the last document is equal to the first.
    """
    tokenizer = SimpleNamespace(
        vocab_size=VOCAB_SIZE, eos_id=0, pad_id=0, path="random", fingerprint="random", files={}
    )
    rng, branch = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    system = branch.integers(0, VOCAB_SIZE, 4)
    schemas = [
        np.append(system, branch.integers(0, VOCAB_SIZE, branch.integers(3, longest_schema + 1)))
        for _ in range(stems)
    ]
    first = None
    with CorpusWriter(prefix, tokenizer, row_format="random", source={"seed": seed}) as writer:
        for number in range(num_documents):
            length = int(rng.integers(6, longest + 1))
            loss_mask = np.zeros(length, np.bool_)
            loss_mask[-int(rng.integers(3, max(4, length // 2))) :] = True
            tokens = rng.integers(0, VOCAB_SIZE, length)
            if schemas:
                schema = schemas[number % stems]
                tokens = np.append(schema, tokens)
                loss_mask = np.append(np.zeros(len(schema), np.bool_), loss_mask)
            document = Document(tokens.astype(np.int32), loss_mask)
            first = first or document
            writer.add(first if schemas and number == num_documents - 1 else document)
    return Corpus(prefix)


def change_description(prefix: Path, **changes: Any) -> None:
    """Write PREFIX.json with ``changes``, under a checksum that fits: as if made so."""
    path = corpus_file(prefix, "json")
    description = {**json.loads(path.read_text("utf-8")), **changes}
    path.write_text(json.dumps({**description, "checksum": checksum(description)}), "utf-8")
