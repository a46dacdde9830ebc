"""What the stages' benchmarks work on, Stage 0's own work, and a peer: transformers and torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from megatron_replay.checkpoint.load import LoadedModel
from megatron_replay.collection.collector import Collector
from megatron_replay.collection.stream import ShardStream
from megatron_replay.config import CandidatesConfig, DataConfig
from megatron_replay.data.corpus import Corpus, Document
from megatron_replay.data.corpus_writer import CorpusWriter
from megatron_replay.parallel import Parallel
from megatron_replay.store import CandidateWriter, StoreDescription

VOCAB_SIZE, HIDDEN, SEQ_LENGTH = 151_936, 256, 1024
#: Tokens of prompt and of answer. Packed next to each other they fill nine tenths of two packs, as
#: documents of this length fill packs of 4,096; padded to --seq-length they fill less than half.
DOCUMENTS = ((110, 290), (190, 410), (130, 240), (150, 380))
#: Standard deviation of the logits: sets of about 100 candidates.
DEVIATION = 5.6
ADAMW: dict[str, Any] = {"lr": 1e-7, "weight_decay": 0.1, "betas": (0.9, 0.95)}


class Peer:
    """transformers and torch alone, a document a forward pass."""

    def __init__(self, folder: Path, corpus: Corpus) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **ADAMW)
        self.documents = [corpus[number] for number in range(len(corpus))]
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()  # makes its moments

    def step(self, *, padded: bool) -> float:
        """One step on all documents, padded to SEQ_LENGTH or not at all; returns the loss."""
        total = sum(int(document.loss_mask[1:].sum()) for document in self.documents)
        loss = 0.0
        for document in self.documents:
            behind = SEQ_LENGTH - len(document.tokens) if padded else 0
            tokens = torch.tensor(document.tokens).long()
            labels = tokens.where(torch.tensor(document.loss_mask), -100)
            out = self.model(
                input_ids=torch.nn.functional.pad(tokens, (0, behind))[None],
                attention_mask=torch.nn.functional.pad(torch.ones_like(tokens), (0, behind))[None],
                labels=torch.nn.functional.pad(labels, (0, behind), value=-100)[None],
                num_items_in_batch=total,
                use_cache=False,
            )
            out.loss.backward()
            loss += out.loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return loss


def save_model(folder: Path, layers: int) -> int:
    """Random weights; returns the number of parameters."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=HIDDEN // 64,
        num_key_value_heads=HIDDEN // 128,
        head_dim=128,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:  # so that layers, not the tied embedding, make the hidden states
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    # The last norm gives hidden states of length sqrt(H), so logits of this deviation.
    torch.nn.init.normal_(model.lm_head.weight, std=DEVIATION / HIDDEN**0.5)
    model.save_pretrained(folder / "model")
    return sum(parameter.numel() for parameter in model.parameters())


def save_corpus(folder: Path, vocab_size: int, documents: Iterable[tuple[int, int]]) -> Corpus:
    """Documents of random tokens, so many of a prompt and of an answer, which carries loss."""
    tokenizer = SimpleNamespace(
        vocab_size=vocab_size, eos_id=0, pad_id=0, path="random", fingerprint="random", files={}
    )
    rng = np.random.default_rng(0)
    with CorpusWriter(folder / "corpus", tokenizer, row_format="random", source={}) as writer:
        for prompt, answer in documents:
            tokens = rng.integers(0, vocab_size, prompt + answer).astype(np.int32)
            writer.add(Document(tokens, np.arange(prompt + answer) >= prompt))
    return Corpus(folder / "corpus")


def write_store(
    settings: CandidatesConfig, corpus: Corpus, model: LoadedModel, groups: Parallel
) -> Path:
    """Stage 0's own work on the corpus, one shard, to the disk. Returns the store's directory."""
    description = StoreDescription(
        vocab_size=model.shape.vocab_size,
        num_documents=len(corpus),
        documents_per_shard=len(corpus),
        codec="planar",
        logits="none",
        corpus_fingerprint=corpus.fingerprint,
        tokenizer_fingerprint="",
        checkpoint_fingerprint="",
        selection={"coverage": 0.95, "max_candidates": 200},
    )
    data = DataConfig(data_path="unused", seq_length=SEQ_LENGTH)
    collector = Collector(settings, data, corpus, corpus.lengths, model, groups)
    with CandidateWriter(settings.store, description, lock=True) as writer:
        with ShardStream(writer, 0) as stream:
            for records, nbytes in collector.collect(np.arange(len(corpus))):
                stream.put(records, nbytes)
        writer.finish()
    return writer.directory
