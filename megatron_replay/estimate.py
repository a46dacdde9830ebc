"""``--dry-run``: checks that the layout fits the model, and predicts length, work and memory.

It needs no device and no other process. Documents and iterations are computed as in the run, and so
are the micro-batches of some steps, or store shards; parameters, gradients and optimizer state are
counted; activations are those of the largest of these micro-batches (``layer_activations``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_replay.collection import LOGITS_CHUNK_SIZE
from megatron_replay.config import ParallelConfig, Settings, Stage0Config, Stage1Config
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.forest import Forest
from megatron_replay.data.loader import global_batches, require_iterations
from megatron_replay.data.packing import (
    FittedDocuments,
    PackedBatch,
    fit_documents,
    micro_batches_of,
    pack_batch,
    usable_documents,
)
from megatron_replay.model.compatibility import require_context, require_store
from megatron_replay.model.config import ModelConfig
from megatron_replay.parallel import data_parallel_size
from megatron_replay.platform import kind_of
from megatron_replay.store import CandidateReader

Rows = list[tuple[str, str]]

#: Steps or store shards of which micro-batches are planned, so that a dry run takes seconds.
MOST_PLANNED = 16


def stage0(config: Stage0Config) -> str:
    """The estimate for Stage 0, as text."""
    shape, local, dp, rows = _layout(config)
    corpus, data = Corpus(config.data.data_path), config.data
    fitted = fit_documents(corpus, data)
    require_context(fitted.lengths, shape)
    width = 2 if config.model.bf16 else 4
    numbers, size = np.arange(len(corpus)), config.candidates.documents_per_shard

    def micro_batches(shard: int) -> list[Forest]:
        documents = numbers[shard * size : (shard + 1) * size]
        return micro_batches_of(corpus, documents, fitted.lengths, data)

    num_shards = -(-len(corpus) // size)
    plan = _plan(config, shape, corpus, fitted.lengths, "shard", num_shards, micro_batches)
    # A chunk of logits exists as computed, in fp32, and as int64 masses.
    rows_V = shape.vocabulary_rows(config.parallel.tensor_model_parallel_size)
    logits = LOGITS_CHUNK_SIZE * rows_V * (width + 4 + 8)
    memory = {
        "weights": local * width,
        "activations of one layer": plan.layer,
        "one chunk of logits": logits,
        **_communicators(shape, config.parallel, dp),
    }
    rows += [*_document_rows(fitted, fitted.lengths), *plan.report]
    return _text("Stage 0", rows, memory)


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

    def micro_batches(step: int) -> list[Forest]:
        return micro_batches_of(corpus, batches.documents(step), lengths, config.data, multiple=dp)

    plan = _plan(config, shape, corpus, lengths, "step", train_iters, micro_batches)
    width, masters = (2, 4) if config.model.bf16 else (4, 0)
    # fp32 masters, exp_avg and exp_avg_sq; ZeRO-1 shards them, not the main gradient.
    copies = dp if config.optimizer.use_distributed_optimizer else 1
    if config.training.recompute_granularity == "full":
        inputs = shape.num_layers * plan.rows * shape.hidden_size * width
        activations = plan.layer + inputs
    else:  # the first of pp stages holds its layers of each of up to pp micro-batches in flight
        pp = config.parallel.pipeline_model_parallel_size
        activations = plan.layer * shape.layers_of_stages(pp)[0] * pp
    memory = {
        "weights": local * width,
        "gradients, masters, optimizer": local * 4 + local * (masters + 8) // copies,
        "activations, about": activations,
        **_communicators(shape, config.parallel, dp),
    }
    rows += [
        *_document_rows(fitted, lengths),
        *plan.report,
        ("iterations", f"{train_iters:,}"),
        ("disk per checkpoint", _gib(checkpoint_bytes(shape, config))),
    ]
    return _text("Stage 1", rows, memory)


def checkpoint_bytes(shape: ModelConfig, config: Stage1Config) -> int:
    """Bytes on disk of a checkpoint of Stage 1: weights, fp32 masters, and moments in fp32.

    MuonClip has a second moment of what is no hidden matrix; it is not counted.
    """
    weights = 6 if config.model.bf16 else 4
    moments = 1 if config.optimizer.optimizer == "muonclip" else 2
    return shape.num_parameters() * (weights + 4 * moments)


def _communicators(shape: ModelConfig, parallel: ParallelConfig, dp: int) -> dict[str, int]:
    """Bytes that collectives hold on a device, where they hold much.

    A communicator for each group of several processes that communicates: of all, TP, PP, DP,
    TP x PP, TP x DP and, between the stages that hold tied embeddings, theirs.
    """
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    sizes = (tp * pp * dp, tp, pp, dp, tp * pp, tp * dp, pp if shape.tie_embeddings else 1)
    count = sum(size > 1 for size in sizes)
    size = count * kind_of(parallel.platform).communicator_bytes()
    return {f"buffers of {count} communicators": size} if size else {}


def layer_activations(
    shape: ModelConfig, parallel: ParallelConfig, batch: PackedBatch, width: int
) -> int:
    """Bytes that a layer keeps of a micro-batch for the backward pass.

    The factors were counted, not derived: how many hidden states, query heads, key-value groups
    and ffn channels per row autograd saves on a CPU (tests/test_estimate.py). In bf16, parts of the
    norms are kept in fp32. The fused operators of NPUs keep less (``kernels.ascend_layers``). Where
    documents share prefixes, the keys and values gathered for attention are kept as well; so are
    the masks of torch's attention, whole on each rank.
    """
    tp, rows = parallel.tensor_model_parallel_size, len(batch.token_T)
    hidden, heads, groups = (6, 6, 4) if width == 4 else (10, 8, 7)
    whole = rows * hidden * shape.hidden_size
    if parallel.sequence_parallel:
        whole //= tp
    documents, channels = batch.documents, shape.kv_channels
    queries = rows * heads * shape.num_attention_heads * channels
    gathered = 0 if documents.key_rows is None else 2 * len(documents.key_rows)
    pairs = (rows * groups + gathered) * shape.num_query_groups * channels
    ffn = 4 * rows * shape.ffn_hidden_size
    masked = [s for s in documents.segments if s.mask is not None or s.prefix]
    masks = sum((s.stop - s.start) * s.num_keys for s in masked)
    return (whole + (queries + pairs + ffn) // tp + masks) * width


class Plan(NamedTuple):
    """The micro-batches of some steps, or store shards.

    Attributes:
        report: rows about them.
        rows: of the longest micro-batch.
        layer: bytes that a layer keeps of the one of which it keeps most.
    """

    report: Rows
    rows: int
    layer: int


def _plan(
    config: Settings,
    shape: ModelConfig,
    corpus: Corpus,
    lengths: npt.NDArray[np.int32],
    unit: str,
    count: int,
    micro_batches: Callable[[int], list[Forest]],
) -> Plan:
    """Plan up to ``MOST_PLANNED`` of ``count`` units ("step" or "shard"), evenly spaced.

    ``micro_batches`` gives those of a unit on all data-parallel ranks.
    """
    planned = np.unique(np.linspace(0, count - 1, min(count, MOST_PLANNED)).round().astype(int))
    width, tp = 2 if config.model.bf16 else 4, config.parallel.tensor_model_parallel_size
    positions = computed = num_batches = rows = layer = 0
    for number in planned.tolist():
        for forest in micro_batches(number):
            batch = pack_batch(corpus, forest, lengths, multiple=tp)
            positions += forest.positions
            computed += forest.computed
            num_batches += 1
            rows = max(rows, len(batch.token_T))
            layer = max(layer, layer_activations(shape, config.parallel, batch, width))
    each = len(planned)
    report = [
        (f"positions of a {unit}", f"{positions / each:,.0f}, mean over {each} of {count:,}"),
        ("  computed", f"{computed / each:,.0f} ({computed / max(positions, 1):.1%})"),
        ("  micro-batches", f"{num_batches / each:,.1f}"),
        ("  largest micro-batch", f"{rows:,} rows"),
    ]
    return Plan(report, rows, layer)


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
        ("layers of each stage", ", ".join(map(str, shape.layers_of_stages(pp)))),
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
