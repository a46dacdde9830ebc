"""A directory with a very small Qwen3 and a tokenizer, and documents for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_replay.data.corpus import Document
from tests.tiny import save_qwen3

VOCAB_SIZE = 257
EOS = 256


def save_model(
    directory: Path, *, tied: bool = True, seed: int = 0, vocab_size: int = VOCAB_SIZE
) -> Path:
    """Bytes are the tokens, so that any text can be read and, with all of them, written."""
    save_qwen3(
        directory,
        tied=tied,
        seed=seed,
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(directory)
    return directory


def random_documents(count: int, *, seed: int = 0, longest: int = 20) -> list[Document]:
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        n = int(rng.integers(2, longest + 1))
        loss_mask = rng.random(n) < 0.6
        loss_mask[-1] = True
        documents.append(Document(rng.integers(0, VOCAB_SIZE, n).astype(np.int32), loss_mask))
    return documents
