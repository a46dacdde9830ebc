"""What the stages' benchmarks work on, the stages' own work, and a peer: transformers and torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from megatron_replay import kernels
from megatron_replay.checkpoint.load import LoadedModel, load_model
from megatron_replay.collection.collector import Collector
from megatron_replay.collection.stream import ShardStream
from megatron_replay.config import (
    CandidatesConfig,
    DataConfig,
    LossConfig,
    ModelConfigSource,
    OptimizerConfig,
    ParallelConfig,
    ProbeConfig,
    Stage1Config,
    TrainingConfig,
)
from megatron_replay.data.corpus import Corpus, Document
from megatron_replay.data.corpus_writer import CorpusWriter
from megatron_replay.data.loader import GlobalBatches
from megatron_replay.data.packing import without_unread
from megatron_replay.optim.build import build_optimizer
from megatron_replay.parallel import Parallel
from megatron_replay.store import CandidateReader, CandidateWriter, StoreDescription
from megatron_replay.training.batches import BatchBuilder, StepBatch, TrainingData
from megatron_replay.training.step import train_step, wrap_for_training

VOCAB_SIZE, HIDDEN = 151_936, 256
#: Standard deviation of the logits: sets of about 100 candidates.
DEVIATION = 5.6
#: Tokens of a schema, a question and an answer, which alone carries loss: as Spider has them.
SCHEMA, QUESTION, ANSWER = 378, 13, 32
ADAMW: dict[str, Any] = {"lr": 1e-7, "weight_decay": 0.1, "betas": (0.9, 0.95)}


class Ours:
    """This framework's model and AdamW, at work on whole corpora.

    Args:
        folder: of ``save_model``; stores are written there.
    """

    def __init__(
        self, folder: Path, groups: Parallel, *, seq_length: int, bf16: bool = False
    ) -> None:
        self.folder, self.groups, self.seq_length = folder, groups, seq_length
        self.source = ModelConfigSource(load=str(folder / "model"), bf16=bf16)
        self.model = load_model(self.source, ParallelConfig(), groups, recompute=True)
        self.model.config.recompute_granularity = None
        self.wrapped = wrap_for_training(self.model)
        self.settings = OptimizerConfig(optimizer="adamw", lr=ADAMW["lr"])
        self.optimizer = build_optimizer(self.settings, self.model, self.wrapped, groups)
        self._numbers = itertools.count()
        like = torch.empty(0, dtype=self.model.config.params_dtype, device=groups.device)
        self._head = kernels.HEAD.choose("auto", like)

    def stage0(self, corpus: Corpus, **positions: Any) -> Path:
        """Stage 0's own work on the corpus, one shard, to the disk. Returns the store's directory.

        ``positions``: which of them are recorded, as in ``CandidatesConfig``.
        """
        store = str(self.folder / f"store-{next(self._numbers)}")
        settings = CandidatesConfig(store=store, **positions)
        return write_store(settings, corpus, self.model, self.groups, self.seq_length)

    def batch(self, corpus: Corpus, store: Path | None = None, *, share: bool = True) -> StepBatch:
        """All documents as one global batch; restricted to a store's sets, or the full softmax."""
        reader = CandidateReader(store) if store else None
        lengths = without_unread(corpus.lengths, reader.stops()) if reader else corpus.lengths
        batches = GlobalBatches(
            lengths, seq_length=self.seq_length, global_batch_size=len(corpus), seed=0, epochs=1
        )
        config = Stage1Config(
            parallel=ParallelConfig(),
            model=self.source,
            data=DataConfig(data_path="unused", seq_length=self.seq_length, share_prefixes=share),
            loss=LossConfig(
                loss="restricted" if store else "full", store=str(store) if store else None
            ),
            optimizer=self.settings,
            training=TrainingConfig(save="unused", global_batch_size=len(corpus)),
            probe=ProbeConfig(probe_interval=0),
        )
        data = TrainingData(
            corpus=corpus, reader=reader, lengths=lengths, batches=batches, train_iters=1
        )
        builder = BatchBuilder(config, self.groups, data, self._head, self.model.shape.vocab_size)
        return builder(0)

    def step(self, corpus: Corpus, store: Path | None = None, *, share: bool = True) -> float:
        """One step on all documents, joining them with the store included; returns the loss."""
        work = self.batch(corpus, store, share=share).micro_batches
        result = train_step(self.wrapped, self.optimizer, work, self.groups, lr=ADAMW["lr"])
        assert result.loss is not None
        assert not result.skipped
        return result.loss


class Peer:
    """transformers and torch alone, a document a forward pass."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype).to(device)
        self.model.train()
        self.device = device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **ADAMW)
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()  # makes its moments

    def step(self, documents: Sequence[Document], *, padded_to: int = 0) -> float:
        """One step on all documents, padded to so many tokens or not at all; returns the loss."""
        total = sum(int(document.loss_mask[1:].sum()) for document in documents)
        loss = 0.0
        for document in documents:
            behind = max(0, padded_to - len(document.tokens))
            tokens = torch.tensor(document.tokens).long()
            labels = tokens.where(torch.tensor(document.loss_mask), -100)
            inputs = {
                "input_ids": torch.nn.functional.pad(tokens, (0, behind)),
                "attention_mask": torch.nn.functional.pad(torch.ones_like(tokens), (0, behind)),
                "labels": torch.nn.functional.pad(labels, (0, behind), value=-100),
            }
            out = self.model(
                **{name: tensor[None].to(self.device) for name, tensor in inputs.items()},
                num_items_in_batch=total,
                use_cache=False,
            )
            out.loss.backward()
            loss += out.loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return loss


def save_model(
    folder: Path, layers: int, *, hidden: int = HIDDEN, vocab_size: int = VOCAB_SIZE
) -> int:
    """Qwen3-0.6B's shape (hidden 1,024), or narrower; random weights. Returns their number."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=128,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:  # so that layers, not the tied embedding, make the hidden states
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    # The last norm gives hidden states of length sqrt(H), so logits of this deviation.
    torch.nn.init.normal_(model.lm_head.weight, std=DEVIATION / hidden**0.5)
    model.save_pretrained(folder / "model")
    return sum(parameter.numel() for parameter in model.parameters())


def save_corpus(prefix: Path, vocab_size: int, documents: Iterable[Document]) -> Corpus:
    """Documents that no tokenizer of ours made."""
    tokenizer = SimpleNamespace(
        vocab_size=vocab_size, eos_id=0, pad_id=0, path="random", fingerprint="random", files={}
    )
    with CorpusWriter(prefix, tokenizer, row_format="random", source={}) as writer:
        for document in documents:
            writer.add(document)
    return Corpus(prefix)


def random_documents(vocab_size: int, sizes: Iterable[tuple[int, int]]) -> Iterator[Document]:
    """Random tokens, so many of a prompt and of an answer, which carries loss."""
    rng = np.random.default_rng(0)
    for prompt, answer in sizes:
        tokens = rng.integers(0, vocab_size, prompt + answer).astype(np.int32)
        yield Document(tokens, np.arange(prompt + answer) >= prompt)


def schema_documents(vocab_size: int, counts: Iterable[int]) -> Iterator[Document]:
    """So many documents of each schema: the schema, a question of its own and its answer."""
    rng = np.random.default_rng(0)
    loss_mask = np.arange(SCHEMA + QUESTION + ANSWER) >= SCHEMA + QUESTION
    for count in counts:
        schema = rng.integers(0, vocab_size, SCHEMA)
        for _ in range(count):
            own = rng.integers(0, vocab_size, QUESTION + ANSWER)
            yield Document(np.append(schema, own).astype(np.int32), loss_mask)


def write_store(
    settings: CandidatesConfig,
    corpus: Corpus,
    model: LoadedModel,
    groups: Parallel,
    seq_length: int,
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
    data = DataConfig(data_path="unused", seq_length=seq_length)
    collector = Collector(settings, data, corpus, corpus.lengths, model, groups)
    with CandidateWriter(settings.store, description, lock=True) as writer:
        with ShardStream(writer, 0) as stream:
            for records, nbytes in collector.collect(np.arange(len(corpus))):
                stream.put(records, nbytes)
        writer.finish()
    return writer.directory
