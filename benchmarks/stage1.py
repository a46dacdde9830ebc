"""What each exact saving of Stage 1 saves, one after another: python -m benchmarks.stage1

A step is forward, backward and AdamW over the same documents in every arm, joining them with the
store included. Rows named "Stage 0" are its work on them, to a store on the disk, from which
Stage 1 reads its candidate sets. Peers: transformers' model of the same weights, its own loss,
``torch.optim.AdamW(fused=True)``.

Every arm runs once a round, in turn. "CPU" is CPU time, which other processes disturb least; ratios
are medians over the rounds of CPU time against the named row's in the same round. "memory" is the
peak of resident memory beyond weights, gradients and moments.

The model is Qwen3-0.6B's at a quarter of the width, deeper, so that the output layer (V = 151,936)
keeps about its share of the work: 35 % of a token's products with weights where Qwen3-0.6B has
26 %. Its weights are random, and as wide as gives sets of about 100 candidates.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import machine, peak_bytes
from megatron_replay import kernels, parallel, platform
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
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.loader import GlobalBatches
from megatron_replay.store import CandidateReader

CPU = torch.device("cpu")
platform.select("cpu").prepare()  # before megatron-core may be imported

from benchmarks.stages import (  # noqa: E402
    ADAMW,
    DOCUMENTS,
    HIDDEN,
    SEQ_LENGTH,
    VOCAB_SIZE,
    Peer,
    save_corpus,
    save_model,
    write_store,
)
from megatron_replay.checkpoint.load import load_model  # noqa: E402
from megatron_replay.data.packing import without_unread  # noqa: E402
from megatron_replay.optim.build import build_optimizer  # noqa: E402
from megatron_replay.training.batches import BatchBuilder, TrainingData  # noqa: E402
from megatron_replay.training.step import train_step, wrap_for_training  # noqa: E402

#: name of a store -> how its positions are chosen.
STORES: dict[str, dict[str, Any]] = {
    "bucket 0.5": {"position_strategy": "bucket"},
    "random 0.25": {"position_strategy": "random", "position_fraction": 0.25},
    "all": {"position_strategy": "all"},
}
PADDED, PACKED, DEFAULT = "full softmax, padded", "full softmax, packed", "restricted"


@dataclass(frozen=True)
class Arm:
    """``store`` names the candidate sets; None: full softmax."""

    store: str | None = None
    packed: bool = True
    recompute: bool = False


ARMS = {
    PADDED: Arm(packed=False),
    PACKED: Arm(),
    "  recomputed": Arm(recompute=True),
    DEFAULT: Arm("bucket 0.5"),
    "  restricted, recomputed": Arm("bucket 0.5", recompute=True),
    "restricted, random 0.25": Arm("random 0.25"),
    "restricted, all positions": Arm("all"),
}


@dataclass(frozen=True)
class Measured:
    """CPU time in seconds and peak memory in bytes of each round."""

    processor: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def add(self, run: Callable[[], object]) -> None:
        def timed() -> None:
            start = time.process_time()
            run()
            self.processor.append(time.process_time() - start)

        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what earlier arms freed is no longer resident
        self.memory.append(peak_bytes(timed, CPU))


class Ours:
    """This framework's model and optimizer, and the work of each arm."""

    def __init__(self, folder: Path, corpus: Corpus) -> None:
        self.folder, self.corpus = folder, corpus
        self.source = ModelConfigSource(load=str(folder / "model"))
        self.groups = parallel.initialize(ParallelConfig(), platform.select("cpu"))
        self.model = load_model(self.source, ParallelConfig(), self.groups, recompute=True)
        self.wrapped = wrap_for_training(self.model)
        self.settings = OptimizerConfig(optimizer="adamw", lr=ADAMW["lr"])
        self.optimizer = build_optimizer(self.settings, self.model, self.wrapped, self.groups)
        self.stores: dict[str, Path] = {}
        self._numbers = itertools.count()
        self._head = kernels.HEAD.choose("auto", torch.empty(0))

    def stage0(self, name: str) -> None:
        """Stage 0's own work on the corpus, to the disk."""
        store = self.folder / f"store-{next(self._numbers)}"
        settings = CandidatesConfig(store=str(store), **STORES[name])
        self.stores[name] = write_store(settings, self.corpus, self.model, self.groups)

    def step(self, arm: Arm) -> float:
        """One step on all documents; returns the loss."""
        maker = self._maker(arm)
        granularity = "full" if arm.recompute else None
        self.model.config.recompute_granularity = granularity  # read at each forward pass
        work = maker(0).micro_batches
        result = train_step(self.wrapped, self.optimizer, work, self.groups, lr=ADAMW["lr"])
        assert result.loss is not None
        assert not result.skipped
        return result.loss

    def packs(self, arm: Arm) -> int:
        return self._maker(arm).config.training.global_batch_size

    def _maker(self, arm: Arm) -> BatchBuilder:
        reader = CandidateReader(self.stores[arm.store]) if arm.store else None
        lengths = self.corpus.lengths
        if reader is not None:
            lengths = without_unread(lengths, reader.stops())

        batches = functools.partial(
            GlobalBatches, lengths, seq_length=SEQ_LENGTH, micro_batch_size=1, seed=0, epochs=1,
            pack_documents=arm.packed, dp_rank=0, dp_size=1,
        )  # fmt: skip
        size = batches(global_batch_size=1).num_batches
        config = Stage1Config(
            parallel=ParallelConfig(),
            model=self.source,
            data=DataConfig(data_path="unused", seq_length=SEQ_LENGTH, pack_documents=arm.packed),
            loss=LossConfig(
                loss="restricted" if arm.store else "full",
                store=str(self.stores[arm.store]) if arm.store else None,
            ),
            optimizer=self.settings,
            training=TrainingConfig(save="unused", global_batch_size=size),
            probe=ProbeConfig(probe_interval=0),
        )
        vocab_size = self.model.shape.vocab_size
        data = TrainingData(
            corpus=self.corpus,
            reader=reader,
            lengths=lengths,
            batches=batches(global_batch_size=size),
            train_iters=1,
        )
        return BatchBuilder(config, self.groups, data, self._head, vocab_size)


def ratio(ours: list[float], others: list[float]) -> float:
    """Of what was measured in the same rounds."""
    return statistics.median(a / b for a, b in zip(ours, others, strict=True))


def report(measured: dict[str, Measured], tokens: int) -> None:
    print(
        f"\n{'a step on all documents':<34}{'CPU s':>8}{'least':>8}{'x padded':>9}{'x packed':>9}"
        f"{'tokens/s':>9}{'memory MiB':>11}"
    )
    for name, m in measured.items():
        least = min(m.processor)
        print(
            f"{name:<34}{statistics.median(m.processor):8.2f}{least:8.2f}"
            f"{ratio(m.processor, measured[PADDED].processor):9.3f}"
            f"{ratio(m.processor, measured[PACKED].processor):9.3f}"
            f"{tokens / least:9.1f}{max(m.memory) / 2**20:11.0f}"
        )
    print("\nStage 0 once and E epochs of Stage 1 with all savings, over E epochs of full softmax")
    baselines = (PADDED, PACKED)
    print(f"{'store, epochs':<24}" + "".join(f"{baseline:>34}" for baseline in baselines))
    for name, arm in ARMS.items():
        if arm.store is None or arm.recompute:
            continue
        for epochs in (1, 3, 10):
            stage0 = measured[f"Stage 0, {arm.store}"].processor
            stage1 = measured[name].processor
            ours = [a / epochs + b for a, b in zip(stage0, stage1, strict=True)]
            line = "".join(f"{ratio(ours, measured[b].processor):34.3f}" for b in baselines)
            print(f"{arm.store + ', ' + str(epochs):<24}{line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=72)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{machine(CPU)}; torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = save_model(folder, options.layers)
        corpus = save_corpus(folder, VOCAB_SIZE, DOCUMENTS)
        ours, peer = Ours(folder, corpus), Peer(folder, corpus)
        runs: dict[str, Callable[[], object]] = {
            **{f"Stage 0, {s}": functools.partial(ours.stage0, s) for s in STORES},
            **{n: functools.partial(ours.step, arm) for n, arm in ARMS.items()},
            "transformers, padded": functools.partial(peer.step, padded=True),
            "transformers, no padding": functools.partial(peer.step, padded=False),
        }
        losses = ours.step(ARMS[PACKED]), peer.step(padded=False)  # and this makes the moments
        for store in STORES:
            ours.stage0(store)
        tokens = int((corpus.lengths - 1).sum())
        reader = CandidateReader(ours.stores["bucket 0.5"])
        sets = np.concatenate([np.diff(document.offsets) for document in reader])
        unread = tokens - int((without_unread(corpus.lengths, reader.stops()) - 1).sum())
        print(
            f"H {HIDDEN}, {options.layers} layers, V {VOCAB_SIZE:,}, {parameters:,} parameters, "
            f"{VOCAB_SIZE * HIDDEN / parameters:.0%} of them the output layer; "
            f"threads {torch.get_num_threads()}\n"
            f"{len(corpus)} documents, {tokens} positions; {ours.packs(ARMS[PADDED])} packs padded "
            f"to {SEQ_LENGTH}, {ours.packs(ARMS[PACKED])} packed; bucket 0.5: {len(sets)} "
            f"positions, |S| mean {sets.mean():.0f}, {(sets >= 200).mean():.0%} at the cap, "
            f"{unread} tokens unread\n"
            f"weights, gradients and moments {16 * parameters / 2**20:.0f} MiB; loss of the full "
            f"softmax before any step {losses[0]:.5f}, transformers' {losses[1]:.5f}",
            flush=True,
        )
        measured = {name: Measured() for name in runs}
        for number in range(options.rounds):
            for name, run in runs.items():
                measured[name].add(run)
            print(f"\nafter round {number + 1}")
            report(measured, tokens)


if __name__ == "__main__":
    main()
