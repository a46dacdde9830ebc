"""Stage 0's run: each model copy writes its share of the missing shards, then all report.

``report.json`` follows from the store alone, so it is the same however often a run was interrupted;
``cost.json`` describes the run that finished the store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_replay.checkpoint.load import base_fingerprint, describe_model, load_model
from megatron_replay.collection.collector import NUM_BUCKETS, Collector
from megatron_replay.collection.stream import ShardStream
from megatron_replay.config import Stage0Config
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.packing import fit_documents, report_long_documents
from megatron_replay.errors import ConfigError
from megatron_replay.files import require_apart, write_json
from megatron_replay.model.compatibility import require_context, require_vocabulary
from megatron_replay.model.config import ModelConfig
from megatron_replay.parallel import Parallel
from megatron_replay.progress import Progress
from megatron_replay.store import CandidateReader, CandidateWriter, StoreDescription
from megatron_replay.store.summary import Tally, summary, summary_text, tally

REPORT_FILE, COST_FILE = "report.json", "cost.json"
#: Seconds between two listings of the shards: every rank lists them, on a shared file system.
_LONGEST_PAUSE = 20.0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one model copy spent on its shards.

    Attributes:
        positions, computed: positions of the documents, and how many went through the model.
        waited: of the ``seconds``, those for which the device waited for the disk.
    """

    shards: int
    documents: int
    positions: int
    computed: int
    seconds: float
    waited: float


def collect(config: Stage0Config, groups: Parallel) -> None:
    """Write the store, or what an interrupted run left of it, and print its summary."""
    candidates, data = config.candidates, config.data
    require_apart(
        candidates.store,
        [("--load", config.model.load), ("--data-path", data.data_path)],
        flag="--store",
    )
    corpus = Corpus(data.data_path)
    # What can be refused is refused before minutes of loading.
    files, shape = describe_model(config.model.load)
    require_vocabulary(corpus, shape, files)
    fitted = fit_documents(corpus, data)
    require_context(fitted.lengths, shape)
    num_shards = -(-len(corpus) // candidates.documents_per_shard)
    chosen = _chosen_shards(candidates.shards, num_shards)
    writer = _open_writer(config, corpus, shape, groups)
    model = load_model(config.model, config.parallel, groups)
    collector = Collector(candidates, data, corpus, fitted.lengths, model, groups)
    if groups.rank == 0:
        print(f"candidate selection: {collector.backend}")
        report_long_documents(fitted, data.long_documents)

    missing = [s for s in groups.broadcast(writer.missing_shards()) if s in chosen]
    if not missing and groups.rank == 0:
        print(f"{candidates.store}: nothing is left to do; its report again")
    cost = _write_shards(missing[groups.dp_rank :: groups.dp_size], writer, collector, groups)
    wait_for(
        lambda: [shard for shard in writer.missing_shards() if shard in chosen],
        minutes=config.parallel.distributed_timeout_minutes,
    )
    if groups.broadcast(len(writer.missing_shards())):
        if groups.rank == 0:
            print(
                f"--shards {candidates.shards} is done; others are missing. When they are written "
                "elsewhere: tools/inspect_store.py merge WHOLE PART PART ..."
            )
        writer.close()
        return
    groups.on_rank_zero(writer.finish)
    _report(candidates.store, cost, groups, writes=collector.writes)


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


def _open_writer(
    config: Stage0Config, corpus: Corpus, shape: ModelConfig, groups: Parallel
) -> CandidateWriter:
    """Open the store on rank 0 first, which locks it against other runs, then everywhere."""
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

    # A refused run is refused on every rank, with the same line.
    groups.on_rank_zero(lambda: open_it(lock=True))
    groups.agreed(lambda: None if opened else open_it(lock=False))
    return opened[0]


def _write_shards(
    shards: list[int], writer: CandidateWriter, collector: Collector, groups: Parallel
) -> Cost:
    """Collect and write ``shards``, of one model copy."""
    num_documents = sum(len(writer.description.documents(shard)) for shard in shards)
    start, waited = time.perf_counter(), 0.0
    unit = f"documents (1 of {groups.dp_size} replicas)" if groups.dp_size > 1 else "documents"
    with Progress("Stage 0", num_documents, unit, enabled=groups.writer) as progress:
        for shard in shards:
            documents = writer.description.documents(shard)
            parts = collector.collect(np.array(documents))
            if collector.writes:
                with ShardStream(writer, shard) as stream:
                    for records, nbytes in parts:
                        stream.put(records, nbytes)
                waited += stream.waited
            else:
                for _ in parts:  # takes part in the forward passes and yields nothing
                    pass
            progress.advance(len(documents))
    return Cost(
        shards=len(shards),
        documents=num_documents,
        positions=collector.positions,
        computed=collector.computed,
        seconds=time.perf_counter() - start,
        waited=waited,
    )


def wait_for(missing_shards: Callable[[], list[int]], *, minutes: float) -> None:
    """Wait until no shard is missing, or none has been added for ``minutes``.

    Model copies end hours of work minutes apart, and a collective would time out. Where a copy is
    lost, the next collective fails.
    """
    missing, since, pause = missing_shards(), time.monotonic(), 0.01
    while missing and time.monotonic() - since < 60 * minutes:
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
        left = missing_shards()
        if left != missing:
            missing, since = left, time.monotonic()


def _report(store: str, cost: Cost, groups: Parallel, *, writes: bool) -> None:
    """Tally the finished store together, then print and write its report on one process.

    Each model copy's writing rank reads its share of the shards. Communication: an all-gather of
    errors over the world, and a gather of tallies, a megabyte each, over the writing ranks.
    """
    counted: list[Tally] = []

    def count() -> None:
        if writes:
            reader = CandidateReader(store)
            shards = range(reader.description.num_shards)[groups.dp_rank :: groups.dp_size]
            documents = sum(len(reader.description.documents(shard)) for shard in shards)
            with Progress("read", documents, "documents", enabled=groups.writer) as progress:
                counted.append(tally(reader, shards, progress))

    groups.agreed(count)
    gathered: list[Any] = [None] * groups.dp_size
    if writes:
        dist.gather_object(
            (counted[0], cost),
            gathered if groups.writer else None,
            dst=dist.get_global_rank(groups.dp_group, 0),
            group=groups.dp_group,
        )
    groups.agreed(lambda: _print_report(store, gathered) if groups.writer else None)


def _print_report(store: str, gathered: Sequence[tuple[Tally, Cost]]) -> None:
    reader = CandidateReader(store)
    (total, _), *others = gathered
    for counted, _ in others:
        total += counted
    facts, rates = summary(reader.description, total), rates_of([cost for _, cost in gathered])
    write_json(reader.directory / REPORT_FILE, facts)
    print(summary_text(facts))
    if not rates["shards"]:  # every shard was there already: keep what they have cost
        return
    write_json(reader.directory / COST_FILE, rates)
    replicas = f" on {rates['replicas']} replicas" if len(gathered) > 1 else ""
    print(
        f"cost: {rates['positions']:,} positions of {rates['documents']:,} documents, "
        f"{rates['computed']:,} of them computed ({rates['computed_share']:.1%}), in "
        f"{rates['seconds']:.1f} s{replicas}: {rates['positions_per_second']:,.0f} a second; "
        f"waited for the disk {rates['share_waiting_for_disk']:.2%} of the time",
        flush=True,
    )


def rates_of(costs: Sequence[Cost]) -> dict[str, float]:
    """Counts, rates and the share of waiting of model copies that ran side by side."""
    positions = sum(cost.positions for cost in costs)
    computed = sum(cost.computed for cost in costs)
    longest = max(cost.seconds for cost in costs)
    together = sum(cost.seconds for cost in costs)
    return {
        "replicas": len(costs),
        "shards": sum(cost.shards for cost in costs),
        "documents": sum(cost.documents for cost in costs),
        "positions": positions,
        "computed": computed,
        "computed_share": computed / max(positions, 1),
        "seconds": longest,
        "positions_per_second": positions / max(longest, 1e-9),
        "share_waiting_for_disk": sum(cost.waited for cost in costs) / max(together, 1e-9),
    }
