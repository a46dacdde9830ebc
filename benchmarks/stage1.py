"""What each exact saving of Stage 1 saves, one after another: python -m benchmarks.stage1

A step is forward, backward and AdamW over the same documents in every arm, joining them with the
store included. Rows named "Stage 0" are its work on them, to a store on the disk, from which
Stage 1 reads its candidate sets. Peers: transformers' model of the same weights, its own loss,
``torch.optim.AdamW(fused=True)``.

The last arms are of documents of a schema, a question and an answer (benchmarks.prefix has real
ones): two a schema share as much as a step of 16 packs of 4,096 does in random order, eight as
much as --group-prefixes 8, and 48, of which Stage 0 is measured, as much as a whole corpus.

Every arm runs once a round, in turn. "CPU" is CPU time, which other processes disturb least; ratios
are medians over the rounds of CPU time against the named row's in the same round. "memory" is the
peak of resident memory beyond weights, gradients and moments.

The model is Qwen3-0.6B's at a quarter of the width, deeper, so that the output layer (V = 151,936)
keeps about its share of the work: 35 % of a token's products with weights where Qwen3-0.6B has
26 %. Its weights are random, and as wide as gives sets of about 100 candidates.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import Measured, machine
from megatron_replay import parallel, platform
from megatron_replay.config import ParallelConfig
from megatron_replay.data.corpus import Corpus
from megatron_replay.store import CandidateReader

CPU = torch.device("cpu")
platform.select("cpu").prepare()  # before megatron-core may be imported

from benchmarks.stages import (  # noqa: E402
    HIDDEN,
    VOCAB_SIZE,
    Ours,
    Peer,
    random_documents,
    save_corpus,
    save_model,
    schema_documents,
)
from megatron_replay.data.packing import without_unread  # noqa: E402

SEQ_LENGTH = 1024
#: Tokens of prompt and of answer. Packed next to each other they fill nine tenths of two packs, as
#: documents of this length fill packs of 4,096; padded to SEQ_LENGTH they fill less than half.
DOCUMENTS = ((110, 290), (190, 410), (130, 240), (150, 380))
#: Corpora of documents that share a schema -> how many do, schema after schema.
SCHEMAS = {"pairs": (2, 2, 2, 2), "eight": (8,), "48": (48,)}
#: name of a store -> how its positions are chosen.
STORES: dict[str, dict[str, Any]] = {
    "bucket 0.5": {"position_strategy": "bucket"},
    "random 0.25": {"position_strategy": "random", "position_fraction": 0.25},
    "all": {"position_strategy": "all"},
}
PADDED, PACKED = "transformers, padded", "full softmax, packed"
SCHEMA_STAGE0, SCHEMA_PACKED = "Stage 0, 48 documents of a schema", "full softmax, pairs, unshared"


@dataclass(frozen=True)
class Arm:
    """``store`` names the candidate sets; None: full softmax."""

    store: str | None = None
    recompute: bool = False
    corpus: str = "documents"
    share: bool = True


ARMS = {
    PACKED: Arm(),
    "  recomputed": Arm(recompute=True),
    "restricted": Arm("bucket 0.5"),
    "  restricted, recomputed": Arm("bucket 0.5", recompute=True),
    "restricted, random 0.25": Arm("random 0.25"),
    "restricted, all positions": Arm("all"),
    SCHEMA_PACKED: Arm(corpus="pairs", share=False),
    "restricted, pairs of a schema": Arm("bucket 0.5", corpus="pairs"),
    "restricted, eight of a schema": Arm("bucket 0.5", corpus="eight"),
}
#: Rows of the table of a whole training: Stage 0, Stage 1, and what they are compared with.
TRAININGS = {
    "bucket 0.5": ("Stage 0, bucket 0.5", "restricted", PACKED),
    "random 0.25": ("Stage 0, random 0.25", "restricted, random 0.25", PACKED),
    "all": ("Stage 0, all", "restricted, all positions", PACKED),
    "prefixes, random order": (SCHEMA_STAGE0, "restricted, pairs of a schema", SCHEMA_PACKED),
    "--group-prefixes 8": (SCHEMA_STAGE0, "restricted, eight of a schema", SCHEMA_PACKED),
}


class Work:
    """Every arm's, on corpora of its own."""

    def __init__(self, folder: Path) -> None:
        groups = parallel.initialize(ParallelConfig(), platform.select("cpu"))
        self.ours = Ours(folder, groups, seq_length=SEQ_LENGTH)
        made = {
            "documents": random_documents(VOCAB_SIZE, DOCUMENTS),
            **{name: schema_documents(VOCAB_SIZE, counts) for name, counts in SCHEMAS.items()},
        }
        self.corpora = {
            name: save_corpus(folder / name, VOCAB_SIZE, documents)
            for name, documents in made.items()
        }
        self.stores: dict[tuple[str, str], Path] = {}

    def stage0(self, store: str, corpus: str = "documents") -> None:
        """Stage 0's own work on the corpus, to the disk."""
        self.stores[corpus, store] = self.ours.stage0(self.corpora[corpus], **STORES[store])

    def step(self, arm: Arm) -> float:
        """One step on all documents; returns the loss."""
        granularity = "full" if arm.recompute else None
        self.ours.model.config.recompute_granularity = granularity  # read at each forward pass
        store = self.stores[arm.corpus, arm.store] if arm.store else None
        return self.ours.step(self.corpora[arm.corpus], store, share=arm.share)


def ratio(ours: list[float], others: list[float]) -> float:
    """Of what was measured in the same rounds."""
    return statistics.median(a / b for a, b in zip(ours, others, strict=True))


def report(measured: dict[str, Measured], tokens: dict[str, int]) -> None:
    """``tokens``: positions of each row's documents."""
    cost = {name: [seconds / tokens[name] for seconds in m.seconds] for name, m in measured.items()}
    print(
        f"\n{'a step on all documents':<36}{'CPU s':>8}{'least':>8}{'x packed, a token':>18}"
        f"{'tokens/s':>9}{'memory MiB':>11}"
    )
    for name, m in measured.items():
        least = min(m.seconds)
        print(
            f"{name:<36}{statistics.median(m.seconds):8.2f}{least:8.2f}"
            f"{ratio(cost[name], cost[PACKED]):18.3f}"
            f"{tokens[name] / least:9.1f}{max(m.memory) / 2**20:11.0f}"
        )
    print("\nStage 0 once and E epochs of Stage 1, over E epochs of full softmax")
    print(f"{'store, epochs':<28}{PADDED:>24}{'packed, unshared':>24}")
    for name, (stage0, stage1, packed) in TRAININGS.items():
        for epochs in (1, 3, 10):
            ours = [a / epochs + b for a, b in zip(cost[stage0], cost[stage1], strict=True)]
            # transformers, padded, has other documents than the last rows.
            padded = f"{ratio(ours, cost[PADDED]):24.3f}" if packed == PACKED else 24 * " "
            print(
                f"{name + ', ' + str(epochs):<28}{padded}{ratio(ours, cost[packed]):24.3f}",
                flush=True,
            )


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
        work, peer = Work(folder), Peer(folder, CPU, torch.float32)
        corpus = work.corpora["documents"]
        documents = [corpus[number] for number in range(len(corpus))]
        losses = work.step(ARMS[PACKED]), peer.step(documents)  # and this makes the moments
        for store in STORES:
            work.stage0(store)
        for name in ("pairs", "eight"):
            work.stage0("bucket 0.5", name)
        runs: dict[str, tuple[Callable[[], object], Corpus]] = {
            **{f"Stage 0, {s}": (functools.partial(work.stage0, s), corpus) for s in STORES},
            SCHEMA_STAGE0: (
                functools.partial(work.stage0, "bucket 0.5", "48"),
                work.corpora["48"],
            ),
            **{
                name: (functools.partial(work.step, arm), work.corpora[arm.corpus])
                for name, arm in ARMS.items()
            },
            PADDED: (functools.partial(peer.step, documents, padded_to=SEQ_LENGTH), corpus),
            "transformers, no padding": (functools.partial(peer.step, documents), corpus),
        }
        tokens = {name: int((of.lengths - 1).sum()) for name, (_, of) in runs.items()}
        reader = CandidateReader(work.stores["documents", "bucket 0.5"])
        sets = np.concatenate([np.diff(document.offsets) for document in reader])
        read = int((without_unread(corpus.lengths, reader.stops()) - 1).sum())
        print(
            f"H {HIDDEN}, {options.layers} layers, V {VOCAB_SIZE:,}, {parameters:,} parameters, "
            f"{VOCAB_SIZE * HIDDEN / parameters:.0%} of them the output layer; "
            f"threads {torch.get_num_threads()}\n"
            f"{len(corpus)} documents, {tokens[PACKED]} positions, "
            f"{len(work.ours.batch(corpus).parts)} packs; bucket 0.5: {len(sets)} "
            f"positions, |S| mean {sets.mean():.0f}, {(sets >= 200).mean():.0%} at the cap, "
            f"{tokens[PACKED] - read} tokens unread\n"
            f"weights, gradients and moments {16 * parameters / 2**20:.0f} MiB; loss of the full "
            f"softmax before any step {losses[0]:.5f}, transformers' {losses[1]:.5f}",
            flush=True,
        )
        measured = {name: Measured() for name in runs}
        for number in range(options.rounds):
            for name, (run, _) in runs.items():
                measured[name].add(run, CPU)
            print(f"\nafter round {number + 1}")
            report(measured, tokens)


if __name__ == "__main__":
    main()
