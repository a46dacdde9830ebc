"""``--dry-run``: checks that the layout fits the model, and predicts length and memory.

It needs no device and no other process. Documents and iterations are computed as in the run,
parameters, gradients and optimizer state are counted; activations come from ``layer_activations``.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_replay.collection import LOGITS_CHUNK_SIZE
from megatron_replay.config import DataConfig, ParallelConfig, Settings, Stage0Config, Stage1Config
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.loader import global_batches, require_iterations
from megatron_replay.data.packing import FittedDocuments, fit_documents, usable_documents
from megatron_replay.model.compatibility import require_context, require_store
from megatron_replay.model.config import ModelConfig
from megatron_replay.parallel import data_parallel_size
from megatron_replay.store import CandidateReader

Rows = list[tuple[str, str]]


def stage0(config: Stage0Config) -> str:
    """The estimate for Stage 0, as text."""
    shape, local, _, rows = _layout(config)
    corpus, data = Corpus(config.data.data_path), config.data
    fitted = fit_documents(corpus, data)
    require_context(fitted.lengths, shape)
    width = 2 if config.model.bf16 else 4
    # A chunk of logits exists as computed, in fp32, and as int64 masses.
    logits = LOGITS_CHUNK_SIZE * shape.vocab_size * (width + 4 + 8)
    memory = {
        "weights": local * width,
        "activations of one layer": layer_activations(shape, config.parallel, data, width),
        "one chunk of logits": logits // config.parallel.tensor_model_parallel_size,
    }
    return _text("Stage 0", rows + _document_rows(fitted, fitted.lengths), memory)


def stage1(config: Stage1Config) -> str:
    """The estimate for Stage 1, as text."""
    shape, local, dp, rows = _layout(config)
    store, reader = config.loss.store, None
    if store is not None and Path(store).exists():
        reader = CandidateReader(store)
    elif store is not None:
        rows.append(("store", "not there yet: the run may compute fewer tokens than this"))
    corpus = Corpus(config.data.data_path)
    if reader is not None:
        require_store(reader, corpus, shape, logits=config.loss.kl_weight > 0)
    fitted, lengths = usable_documents(config, corpus, reader)
    require_context(lengths, shape)
    batches = global_batches(config, corpus, lengths)
    train_iters = config.training.train_iters or batches.num_batches
    require_iterations(config, train_iters)

    width, masters = (2, 4) if config.model.bf16 else (4, 0)
    # fp32 masters, exp_avg and exp_avg_sq; ZeRO-1 shards them, not the main gradient.
    copies = dp if config.optimizer.use_distributed_optimizer else 1
    layer = layer_activations(shape, config.parallel, config.data, width)
    if config.training.recompute_granularity == "full":
        tokens = config.data.seq_length * config.data.micro_batch_size
        activations = layer + shape.num_layers * tokens * shape.hidden_size * width
    else:  # the first of pp stages holds layers / pp of each of up to pp micro-batches in flight
        pp = config.parallel.pipeline_model_parallel_size
        activations = layer * shape.num_layers // pp * pp
    memory = {
        "weights": local * width,
        "gradients, masters, optimizer": local * 4 + local * (masters + 8) // copies,
        "activations, about": activations,
    }
    checkpoint = shape.num_parameters() * (width + masters + 8)
    rows += [
        *_document_rows(fitted, lengths),
        ("iterations", f"{train_iters:,}"),
        ("disk per checkpoint", _gib(checkpoint)),
    ]
    return _text("Stage 1", rows, memory)


def layer_activations(
    shape: ModelConfig, parallel: ParallelConfig, data: DataConfig, width: int
) -> int:
    """Bytes that a layer keeps for the backward pass.

    The factors were counted, not derived: how many hidden states, query heads and ffn channels per
    token autograd saves on a CPU (tests/test_estimate.py). In bf16, parts of the norms and of the
    rotary embedding are kept in fp32.
    """
    tp = parallel.tensor_model_parallel_size
    hidden, heads = (7, 10) if width == 4 else (8, 15)
    whole = hidden * shape.hidden_size
    if parallel.sequence_parallel:
        whole //= tp
    attention = heads * shape.num_attention_heads * shape.kv_channels
    sharded = (attention + 4 * shape.ffn_hidden_size) // tp  # gate, up, silu, their product
    return data.seq_length * data.micro_batch_size * (whole + sharded) * width


def _layout(config: Settings) -> tuple[ModelConfig, int, int, Rows]:
    """The model's shape, parameters per device, number of replicas, and rows about them."""
    parallel, load = config.parallel, Path(config.model.load)
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    exported = load / "hf"  # of a training checkpoint
    shape = ModelConfig.from_hf(exported if exported.exists() else load)
    shape.check_layout(tp, pp)
    launched = os.environ.get("WORLD_SIZE", "")
    dp = data_parallel_size(parallel, int(launched) if launched.isdecimal() else tp * pp)
    local = shape.parameters_per_device(tp, pp)
    rows = [
        ("parameters", f"{shape.num_parameters():,}"),
        ("layout", f"TP {tp} x PP {pp} x DP {dp} = {tp * pp * dp} processes"),
        ("parameters per device", f"{local:,}"),
    ]
    return shape, local, dp, rows


def _document_rows(fitted: FittedDocuments, lengths: npt.NDArray[np.int32]) -> Rows:
    return [
        ("documents", f"{len(lengths):,}"),
        ("  dropped, truncated", f"{fitted.num_dropped:,}, {fitted.num_truncated:,}"),
        ("  without a label left", f"{fitted.num_unlabelled:,}"),
        ("positions per epoch", f"{(lengths - 1).clip(0).sum(dtype=np.int64):,}"),
    ]


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _text(title: str, rows: Rows, memory: dict[str, int]) -> str:
    rows = [*rows, ("memory per device", _gib(sum(memory.values())))]
    rows += [(f"  {name}", _gib(size)) for name, size in memory.items()]
    width = max(len(name) for name, _ in rows)
    return "".join([f"{title}, dry run\n", *(f"{name:<{width}}  {v}\n" for name, v in rows)])
