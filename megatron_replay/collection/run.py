"""Stage 0's run: every missing shard of the store, by whichever model copy it falls to."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from megatron_replay import kernels
from megatron_replay.checkpoint.load import LoadedModel, checkpoint_fingerprint, load_model
from megatron_replay.collection.collector import Collector
from megatron_replay.collection.stream import ShardStream
from megatron_replay.config import Stage0Config
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.packing import report_long_documents
from megatron_replay.model.compatibility import require_context, require_vocabulary
from megatron_replay.parallel import Parallel
from megatron_replay.progress import Progress
from megatron_replay.store import CandidateReader, CandidateWriter, StoreDescription
from megatron_replay.store.summary import summarize, summary_text


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
    _write_shards(missing[groups.dp_rank :: groups.dp_size], writer, collector, config, groups)
    dist.barrier()
    if groups.rank == 0:
        writer.finish()
        print(summary_text(summarize(CandidateReader(config.candidates.store))), flush=True)
    dist.barrier()


def _write_shards(
    shards: list[int],
    writer: CandidateWriter,
    collector: Collector,
    config: Stage0Config,
    groups: Parallel,
) -> float:
    """Collect and write ``shards``; the seconds for which this rank waited for its disk."""
    waited = 0.0
    with Progress(
        "Stage 0",
        sum(len(writer.description.documents(shard)) for shard in shards),
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
    return waited


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
