"""``--dry-run``: does the layout fit, how long is the run, how much memory and disk will it take?

Needs no device and no other process. Parameters, optimizer state and disk are counted exactly;
activations are estimated from the tensors that a layer keeps for its backward pass.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_replay.collection import LOGITS_CHUNK_SIZE
from megatron_replay.config import (
    CandidatesConfig,
    DataConfig,
    ModelConfigSource,
    ParallelConfig,
    Stage0Config,
    Stage1Config,
)
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.packing import (
    FittedDocuments,
    document_order,
    fit_documents,
    plan_packs,
    usable_documents,
)
from megatron_replay.data.sampler import global_batches, require_iterations
from megatron_replay.errors import CheckpointError, ConfigError
from megatron_replay.model.config import ModelConfig
from megatron_replay.parallel import data_parallel_size
from megatron_replay.store import CandidateReader

_GIB = 1 << 30
#: Bytes of a stored position beside its ids: |S|, lse, gold log-probability, tail mass, position.
_POSITION_BYTES = 11
#: Micro-batches larger than this are not looked for.
_MOST_PACKS = 1024


def stage0(config: Stage0Config) -> str:
    """The estimate for Stage 0, as text.

    Raises:
        ConfigError: it does not fit --device-memory-gib.
    """
    shape, dp = _layout(config.model, config.parallel)
    corpus = Corpus(config.data.data_path)
    fitted = fit_documents(
        corpus.lengths, config.data.seq_length, config.data.long_documents, corpus.first_labels
    )
    width = 2 if config.model.bf16 else 4
    weights = _parameters_per_device(shape, config.parallel) * width
    # One chunk of logits: as computed, fp32, and int64 masses.
    chunk = LOGITS_CHUNK_SIZE * shape.vocab_size
    logits = chunk // config.parallel.tensor_model_parallel_size * (width + 4 + 8)

    def memory(micro_batch_size: int) -> int:
        data = dataclasses.replace(config.data, micro_batch_size=micro_batch_size)
        return weights + layer_activations(shape, config.parallel, data, width) + logits

    needed = memory(config.data.micro_batch_size)
    return _table(
        "Stage 0",
        _layout_rows(shape, config.parallel, dp)
        + _corpus_rows(fitted, fitted.lengths, config.data)
        + _recorded_rows(config.candidates, corpus, shape.vocab_size)
        + [
            ("memory per device", _gib(needed)),
            ("  weights", _gib(weights)),
            ("  activations of one layer", _gib(needed - weights - logits)),
            ("  one chunk of logits", _gib(logits)),
        ]
        + _budget_rows(config.parallel, config.data, memory, lambda _: True),
    )


def _recorded_rows(
    candidates: CandidatesConfig, corpus: Corpus, vocab_size: int
) -> list[tuple[str, str]]:
    share = {"all": 1.0}.get(candidates.position_strategy, candidates.position_fraction)
    positions = round(corpus.description.num_loss_tokens * share)
    if candidates.position_strategy == "last-token":
        positions = min(positions, len(corpus) * candidates.last_n)
    id_bytes = 2 + (vocab_size > 1 << 16) * 0.25
    logit_bytes = 0 if candidates.store_logits == "none" else 2
    store = [
        positions * (_POSITION_BYTES + size * (id_bytes + logit_bytes))
        for size in (min(100, candidates.max_candidates), candidates.max_candidates)
    ]
    return [
        ("positions to record", f"about {positions:,}"),
        ("disk for the store", f"{_gib(store[0])} at |S| = 100, {_gib(store[1])} at the cap"),
        ("free on that disk", _free(candidates.store)),
    ]


def stage1(config: Stage1Config) -> str:
    """The estimate for Stage 1, as text.

    Raises:
        ConfigError: it does not fit --device-memory-gib.
    """
    shape, dp = _layout(config.model, config.parallel)
    corpus = Corpus(config.data.data_path)
    reader, store_row = _store(config.loss.store)
    fitted, lengths = usable_documents(config, corpus, reader)
    batches = global_batches(config, lengths, dp_rank=0, dp_size=dp)
    train_iters = config.training.train_iters or batches.num_batches
    require_iterations(config, train_iters)
    width = 2 if config.model.bf16 else 4
    local = _parameters_per_device(shape, config.parallel)
    masters = 4 if config.model.bf16 else 0
    # Main gradient; fp32 master, exp_avg and exp_avg_sq, which ZeRO-1 shards.
    sharded = dp if config.optimizer.use_distributed_optimizer else 1
    state = local * 4 + local * (masters + 8) // sharded

    def memory(micro_batch_size: int) -> int:
        data = dataclasses.replace(config.data, micro_batch_size=micro_batch_size)
        return local * width + state + _kept_activations(shape, config, data, width)

    def divides(micro_batch_size: int) -> bool:
        return config.training.global_batch_size % (micro_batch_size * dp) == 0

    needed = memory(config.data.micro_batch_size)
    return _table(
        "Stage 1",
        _layout_rows(shape, config.parallel, dp)
        + store_row
        + _corpus_rows(fitted, lengths, config.data)
        + [
            ("iterations", f"{train_iters:,}"),
            ("memory per device", _gib(needed)),
            ("  weights", _gib(local * width)),
            ("  gradients, masters, optimizer", _gib(state)),
            ("  activations, about", _gib(needed - local * width - state)),
            ("disk per checkpoint", _gib(shape.num_parameters() * (width + masters + 8))),
            ("free on that disk", _free(config.training.save)),
        ]
        + _budget_rows(config.parallel, config.data, memory, divides),
    )


def _kept_activations(
    shape: ModelConfig, config: Stage1Config, data: DataConfig, width: int
) -> int:
    per_layer = layer_activations(shape, config.parallel, data, width)
    if config.training.recompute_granularity == "full":
        kept = data.seq_length * data.micro_batch_size * shape.hidden_size * width
        return per_layer + shape.num_layers * kept
    # The first of pp stages holds layers / pp of each of up to pp micro-batches in flight.
    pp = config.parallel.pipeline_model_parallel_size
    return per_layer * shape.num_layers // pp * pp


def _budget_rows(
    parallel: ParallelConfig,
    data: DataConfig,
    memory: Callable[[int], int],
    allowed: Callable[[int], bool],
) -> list[tuple[str, str]]:
    """The largest micro-batch that --device-memory-gib holds, if that was given."""
    if parallel.device_memory_gib is None:
        return []
    budget = int(parallel.device_memory_gib * _GIB)
    sizes = [size for size in range(1, _MOST_PACKS + 1) if allowed(size) and memory(size) <= budget]
    if memory(data.micro_batch_size) > budget:
        least = f"--micro-batch-size {sizes[-1]} fits" if sizes else "not even --micro-batch-size 1"
        raise ConfigError(
            f"it does not fit on a device: {least}",
            where="--device-memory-gib",
            expected=f"at least {_gib(memory(data.micro_batch_size))}",
            found=_gib(budget),
            fix="Raise --tensor-model-parallel-size or --pipeline-model-parallel-size, lower "
            "--seq-length or --micro-batch-size, or give --recompute-granularity full",
        )
    return [(f"largest micro-batch in {_gib(budget)}", f"{sizes[-1]} packs")]


def _layout(source: ModelConfigSource, parallel: ParallelConfig) -> tuple[ModelConfig, int]:
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    files = Path(source.load)
    places = [place for place in (files, files / "hf") if (place / "config.json").exists()]
    if not places:
        raise CheckpointError(
            "no checkpoint here",
            where=files,
            expected="config.json (Hugging Face) or hf/config.json (a training checkpoint)",
            found="neither" if files.is_dir() else "no such directory",
        )
    shape = ModelConfig.from_hf(places[0])
    shape.check_layout(tp, pp)
    launched = os.environ.get("WORLD_SIZE", "")
    return shape, data_parallel_size(parallel, int(launched) if launched.isdecimal() else tp * pp)


def _parameters_per_device(shape: ModelConfig, parallel: ParallelConfig) -> int:
    return shape.parameters_per_device(
        parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    )


def layer_activations(
    shape: ModelConfig, parallel: ParallelConfig, data: DataConfig, width: int
) -> int:
    """Bytes a layer keeps for backward.

    Counted, not derived: numbers of hidden states, of query heads and of ffn channels a token that
    autograd saved on a CPU (tests/test_estimate.py). bf16 keeps some of norms and rotation in fp32.
    """
    tp = parallel.tensor_model_parallel_size
    hidden, heads = (7, 10) if width == 4 else (8, 15)
    whole = hidden * shape.hidden_size
    if parallel.sequence_parallel:
        whole //= tp
    attention = heads * shape.num_attention_heads * shape.kv_channels
    sharded = (attention + 4 * shape.ffn_hidden_size) // tp  # gate, up, silu, their product
    tokens = data.seq_length * data.micro_batch_size
    return tokens * (whole + sharded) * width


def _layout_rows(shape: ModelConfig, parallel: ParallelConfig, dp: int) -> list[tuple[str, str]]:
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    return [
        ("parameters", f"{shape.num_parameters():,}"),
        ("layout", f"TP {tp} x PP {pp} x DP {dp} = {tp * pp * dp} processes"),
        ("parameters per device", f"{_parameters_per_device(shape, parallel):,}"),
    ]


def _store(path: str | None) -> tuple[CandidateReader | None, list[tuple[str, str]]]:
    """The store, and what to say where it is still to be collected."""
    if path is None:
        return None, []
    if not Path(path).exists():
        return None, [("store", "not there yet: tokens that no position reads are counted")]
    return CandidateReader(path), []


def _corpus_rows(
    fitted: FittedDocuments, lengths: npt.NDArray[np.int32], data: DataConfig
) -> list[tuple[str, str]]:
    order = document_order(len(lengths), seed=0, epoch=0, shuffle=False)
    packs = len(plan_packs(lengths, order, data.seq_length, together=data.pack_documents))
    positions = int((lengths - 1).clip(0).sum(dtype=np.int64))
    used = positions / max(1, packs * data.seq_length)
    return [
        ("documents", f"{len(lengths):,}"),
        ("  dropped, truncated", f"{fitted.num_dropped:,}, {fitted.num_truncated:,}"),
        ("  without a label left", f"{fitted.num_unlabelled:,}"),
        ("positions per epoch", f"{positions:,}"),
        ("packs per epoch", f"{packs:,} of {data.seq_length:,}, {100 * used:.0f} % filled"),
    ]


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f} GiB"


def _free(path: str) -> str:
    """Free space where ``path`` is or will be."""
    existing = Path(path).absolute()
    while not existing.exists():
        existing = existing.parent
    stat = os.statvfs(existing)
    return _gib(stat.f_bavail * stat.f_frsize)


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    return "\n".join([f"{title}, dry run", *lines]) + "\n"
