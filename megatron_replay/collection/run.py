"""Stage 0's run: every missing shard of the store, by whichever model copy it falls to."""

from __future__ import annotations

import time

import numpy as np
import torch

from megatron_replay import kernels
from megatron_replay.checkpoint.load import LoadedModel, checkpoint_fingerprint, load_model
from megatron_replay.collection.collector import Collector
from megatron_replay.collection.report import Cost, report
from megatron_replay.collection.stream import ShardStream
from megatron_replay.config import Stage0Config
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.packing import report_long_documents
from megatron_replay.model.compatibility import require_context, require_vocabulary
from megatron_replay.parallel import Parallel
from megatron_replay.progress import Progress
from megatron_replay.store import CandidateWriter, StoreDescription

#: Seconds between two looks at which shards are there: of all ranks, at a shared file system.
_LONGEST_PAUSE = 20.0


def collect(config: Stage0Config, groups: Parallel) -> None:
    """Write the store, or what an interrupted run left of it, and print its summary."""
    corpus = Corpus(config.data.data_path)
    dtype = torch.bfloat16 if config.model.bf16 else torch.float32
    like = torch.empty(0, dtype=dtype, device=groups.device)
    backend = config.candidates.selection_backend
    kernel = kernels.SELECTION.choose(backend, like)  # before minutes of loading, if it cannot run
    model = load_model(config.model, config.parallel, groups)
    require_vocabulary(corpus, model.shape)
    writer = _open_writer(config, corpus, model, groups)
    collector = Collector(config.candidates, config.data, corpus, model, groups, kernel)
    require_context(collector.fitted.lengths, model.shape)
    if groups.rank == 0:
        print(f"candidate selection: {kernels.SELECTION.describe(backend, like)}")
        report_long_documents(collector.fitted, config.data.long_documents)
    missing = groups.broadcast(writer.missing_shards())
    cost = _write_shards(
        missing[groups.dp_rank :: groups.dp_size], writer, collector, config, groups
    )
    _wait_for_all(writer, minutes=config.parallel.distributed_timeout_minutes)
    groups.on_rank_zero(writer.finish)
    candidates = config.candidates
    report(
        candidates.store,
        cost,
        groups,
        tensorboard_dir=candidates.tensorboard_dir,
        writes=collector.writes,
    )


def _write_shards(
    shards: list[int],
    writer: CandidateWriter,
    collector: Collector,
    config: Stage0Config,
    groups: Parallel,
) -> Cost:
    """Collect and write ``shards``, of one model copy."""
    num_documents = sum(len(writer.description.documents(shard)) for shard in shards)
    start, waited = time.perf_counter(), 0.0
    with Progress(
        "Stage 0",
        num_documents,
        f"documents (1 of {groups.dp_size} replicas)" if groups.dp_size > 1 else "documents",
        enabled=groups.writer,
        interval=config.progress.progress_interval,
    ) as progress:
        for shard in shards:
            documents = writer.description.documents(shard)
            batches = collector.collect(np.array(documents))
            if collector.writes:
                most = config.candidates.write_buffer_mib << 20
                with ShardStream(writer, shard, max_bytes=most) as stream:
                    for batch in batches:
                        stream.put(batch)
                waited += stream.waited
            else:
                for _ in batches:  # takes part in the work, and gets nothing of it
                    pass
            progress.advance(len(documents))
    seconds = time.perf_counter() - start
    return Cost(
        shards=len(shards),
        documents=num_documents,
        positions=collector.positions,
        seconds=seconds,
        replica_seconds=seconds,
        waited=waited,
    )


def _wait_for_all(writer: CandidateWriter, *, minutes: float) -> None:
    """Wait until every shard is there, or none has come for ``minutes``.

    Model copies end hours of work minutes apart, and a collective would time out. Where a copy is
    lost, the next collective says so.
    """
    missing, since, pause = writer.missing_shards(), time.monotonic(), 0.01
    while missing and time.monotonic() - since < 60 * minutes:
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
        left = writer.missing_shards()
        if left != missing:
            missing, since = left, time.monotonic()


def _open_writer(
    config: Stage0Config, corpus: Corpus, model: LoadedModel, groups: Parallel
) -> CandidateWriter:
    """Open the store on rank 0 first, which keeps other runs out, then everywhere."""
    fingerprint = checkpoint_fingerprint(config.model.load) if groups.rank == 0 else ""
    candidates = config.candidates
    description = StoreDescription(
        vocab_size=model.shape.vocab_size,
        num_documents=len(corpus),
        documents_per_shard=candidates.documents_per_shard,
        codec="planar",
        logits=candidates.store_logits,
        corpus_fingerprint=corpus.fingerprint,
        tokenizer_fingerprint=corpus.tokenizer_fingerprint,
        checkpoint_fingerprint=groups.broadcast(fingerprint),
        selection={
            "coverage": candidates.coverage,
            "max_candidates": candidates.max_candidates,
            "position_strategy": candidates.position_strategy,
            "position_fraction": candidates.position_fraction,
            "num_buckets": candidates.num_buckets,
            "confidence": candidates.confidence,
            "last_n": candidates.last_n,
            "position_seed": candidates.position_seed,
            "bf16": config.model.bf16,
            "seq_length": config.data.seq_length,
            "long_documents": config.data.long_documents,
        },
    )
    opened: list[CandidateWriter] = []

    def open_it(lock: bool) -> None:
        opened.append(CandidateWriter(candidates.store, description, lock=lock))

    # A run that is refused is so on every rank, with the same line.
    groups.on_rank_zero(lambda: open_it(lock=True))
    groups.agreed(lambda: None if opened else open_it(lock=False))
    return opened[0]
