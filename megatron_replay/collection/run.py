"""Stage 0's run: every missing shard of the store, by whichever model copy it falls to."""

from __future__ import annotations

import time

import numpy as np
import torch

from megatron_replay import kernels
from megatron_replay.checkpoint.load import base_fingerprint, describe_model, load_model
from megatron_replay.collection.collector import Collector
from megatron_replay.collection.records import NUM_BUCKETS
from megatron_replay.collection.report import Cost, report
from megatron_replay.collection.stream import ShardStream
from megatron_replay.config import Stage0Config
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.packing import fit_documents, report_long_documents
from megatron_replay.errors import ConfigError
from megatron_replay.files import require_apart
from megatron_replay.model.compatibility import require_context, require_vocabulary
from megatron_replay.model.config import ModelConfig
from megatron_replay.parallel import Parallel
from megatron_replay.progress import Progress
from megatron_replay.store import CandidateWriter, StoreDescription

#: Seconds between two looks at which shards are there: of all ranks, at a shared file system.
_LONGEST_PAUSE = 20.0


def collect(config: Stage0Config, groups: Parallel) -> None:
    """Write the store, or what an interrupted run left of it, and print its summary."""
    require_apart(
        config.candidates.store,
        [("--load", config.model.load), ("--data-path", config.data.data_path)],
        flag="--store",
    )
    corpus = Corpus(config.data.data_path)
    dtype = torch.bfloat16 if config.model.bf16 else torch.float32
    like = torch.empty(0, dtype=dtype, device=groups.device)
    # What can be refused is refused before minutes of loading.
    kernel = kernels.SELECTION.choose("auto", like)
    files, shape = describe_model(config.model.load)
    require_vocabulary(corpus, shape, files)
    fitted = fit_documents(
        corpus.lengths, config.data.seq_length, config.data.long_documents, corpus.first_labels
    )
    require_context(fitted.lengths, shape)
    num_shards = -(-len(corpus) // config.candidates.documents_per_shard)
    chosen = _chosen_shards(config.candidates.shards, num_shards)
    writer = _open_writer(config, corpus, shape, groups)
    model = load_model(config.model, config.parallel, groups)
    collector = Collector(
        config.candidates, config.data, corpus, fitted.lengths, model, groups, kernel
    )
    if groups.rank == 0:
        print(f"candidate selection: {kernels.SELECTION.describe('auto', like)}")
        report_long_documents(fitted, config.data.long_documents)
    missing = [s for s in groups.broadcast(writer.missing_shards()) if s in chosen]
    if not missing and groups.rank == 0:
        print(f"{config.candidates.store}: nothing is left to do; its report again")
    cost = _write_shards(
        missing[groups.dp_rank :: groups.dp_size], writer, collector, config, groups
    )
    _wait_for_all(writer, chosen, minutes=config.parallel.distributed_timeout_minutes)
    candidates = config.candidates
    if groups.broadcast(len(writer.missing_shards())):
        if groups.rank == 0:
            print(
                f"--shards {candidates.shards} is done; others are missing. When they are written "
                "elsewhere: tools/inspect_store.py merge WHOLE PART PART ..."
            )
        writer.close()
        return
    groups.on_rank_zero(writer.finish)
    report(candidates.store, cost, groups, writes=collector.writes)


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
    ) as progress:
        for shard in shards:
            documents = writer.description.documents(shard)
            batches = collector.collect(np.array(documents))
            if collector.writes:
                with ShardStream(writer, shard) as stream:
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


def _chosen_shards(text: str | None, num_shards: int) -> range:
    """FIRST:STOP as a range of shards; all where nothing is given."""
    if text is None:
        return range(num_shards)
    first, colon, stop = text.partition(":")
    numbers = first.isdecimal() and stop.isdecimal() and bool(colon)
    if not numbers or not int(first) < int(stop) <= num_shards:
        raise ConfigError(
            "not shards of this store",
            where="--shards",
            expected=f"FIRST:STOP within 0:{num_shards}",
            found=text,
        )
    return range(int(first), int(stop))


def _wait_for_all(writer: CandidateWriter, shards: range, *, minutes: float) -> None:
    """Wait until every one of ``shards`` is there, or none has come for ``minutes``.

    Model copies end hours of work minutes apart, and a collective would time out. Where a copy is
    lost, the next collective says so.
    """

    def left_out() -> list[int]:
        return [shard for shard in writer.missing_shards() if shard in shards]

    missing, since, pause = left_out(), time.monotonic(), 0.01
    while missing and time.monotonic() - since < 60 * minutes:
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
        left = left_out()
        if left != missing:
            missing, since = left, time.monotonic()


def _open_writer(
    config: Stage0Config, corpus: Corpus, shape: ModelConfig, groups: Parallel
) -> CandidateWriter:
    """Open the store on rank 0 first, which keeps other runs out, then everywhere."""
    fingerprint = groups.from_rank_zero(lambda: base_fingerprint(config.model.load))
    candidates = config.candidates
    description = StoreDescription(
        vocab_size=shape.vocab_size,
        num_documents=len(corpus),
        documents_per_shard=candidates.documents_per_shard,
        logits=candidates.store_logits,
        corpus_fingerprint=corpus.fingerprint,
        tokenizer_fingerprint=corpus.tokenizer_fingerprint,
        checkpoint_fingerprint=fingerprint,
        selection={
            "coverage": candidates.coverage,
            "max_candidates": candidates.max_candidates,
            "position_strategy": candidates.position_strategy,
            "position_fraction": candidates.position_fraction,
            "num_buckets": NUM_BUCKETS,
            "confidence": "max-prob",
            "last_n": candidates.last_n,
            "position_seed": candidates.seed,
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
