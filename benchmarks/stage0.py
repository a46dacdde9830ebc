"""Stage 0 beside a plain forward pass of the same model: python -m benchmarks.stage0

The plain pass is this framework's own, over the same packs: every logit is computed, as many
positions at a time as in Stage 0, and discarded. Stage 0 also makes candidate sets, records and a
store on the disk, fsync included. Every label carries loss, so "all" and "bucket" need as many
logits as the plain pass. Each runs once a round; "x plain" is the median of the rounds' times over
those of the plain pass in the same round. CPU time, of all threads, is least disturbed by other
processes; with several threads it counts those that wait as well.

Two models of random weights: in "output" most of the work is the output layer (V = 151,936), in
"body" it is the layers. Logits are normal, and as wide as gives sets of about 100 candidates.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import Times, interleave, machine
from megatron_replay import kernels, parallel, platform
from megatron_replay.collection import LOGITS_CHUNK_SIZE
from megatron_replay.config import CandidatesConfig, ParallelConfig
from megatron_replay.data.corpus import Corpus
from megatron_replay.parallel import Parallel
from megatron_replay.store import CandidateReader

platform.select("cpu").prepare()  # before megatron-core may be imported

from benchmarks.stages import random_documents, save_corpus, write_store  # noqa: E402
from megatron_replay.checkpoint.load import LoadedModel  # noqa: E402
from megatron_replay.data.packing import forest_of, pack_batch  # noqa: E402
from megatron_replay.data.replay import eligible_rows  # noqa: E402
from megatron_replay.forward import MicroBatch, forward_only  # noqa: E402
from megatron_replay.model.config import ModelConfig  # noqa: E402
from megatron_replay.model.gpt import build_model, transformer_config  # noqa: E402
from megatron_replay.model.selected_rows import HiddenStates  # noqa: E402

#: name -> layers, vocabulary, standard deviation of the logits.
MODELS = {"output": (2, 151_936, 5.6), "body": (16, 32_000, 4.6)}
HIDDEN, SEQ_LENGTH = 1024, 1024
CPU = torch.device("cpu")
PLAIN = "plain forward"
STRATEGIES = ("all", "bucket", "random", "last-token")


@dataclass(frozen=True)
class Case:
    """A model, its packs, and where stores go."""

    model: LoadedModel
    corpus: Corpus
    groups: Parallel
    folder: Path
    numbers: itertools.count[int]

    def plain(self, then: Callable[[Tensor], object] = lambda logits_NV: None) -> None:
        """Every logit of every position; ``then`` is done with a chunk of them."""
        corpus = self.corpus
        forest = forest_of(corpus, np.arange(len(corpus)), corpus.lengths, share=False)
        for pack in forest.cut(SEQ_LENGTH):
            batch = pack_batch(corpus, pack, corpus.lengths, multiple=1)
            rows_N = eligible_rows(batch)

            def head(hidden: HiddenStates, weight_VH: Tensor, rows_N: Tensor = rows_N) -> None:
                for rows in rows_N.split(LOGITS_CHUNK_SIZE):
                    then(hidden[rows] @ weight_VH.T)

            forward_only(self.model.module, [MicroBatch(batch, head)])

    def stage0(self, strategy: str) -> Path:
        """Stage 0's own work. Returns the store's directory."""
        settings = CandidatesConfig(
            store=str(self.folder / f"store-{next(self.numbers)}"),
            position_strategy=strategy,
            documents_per_shard=len(self.corpus),
        )
        return write_store(settings, self.corpus, self.model, self.groups, SEQ_LENGTH)


def random_model(name: str, groups: Parallel) -> LoadedModel:
    num_layers, vocab_size, deviation = MODELS[name]
    shape = ModelConfig(
        num_layers=num_layers,
        hidden_size=HIDDEN,
        ffn_hidden_size=3 * HIDDEN,
        num_attention_heads=16,
        num_query_groups=8,
        kv_channels=128,
        vocab_size=vocab_size,
        max_position_embeddings=4096,
        rotary_base=1e6,
        layernorm_epsilon=1e-6,
        tie_embeddings=False,
    )
    torch.manual_seed(0)
    config = transformer_config(shape, ParallelConfig())
    module = build_model(shape, config, groups)
    # The last norm gives hidden states of length sqrt(H), so logits of this deviation.
    torch.nn.init.normal_(module.output_layer.weight, std=deviation / HIDDEN**0.5)
    return LoadedModel(shape, config, module, Path(), 0)


def document_sizes(positions: int) -> Iterator[tuple[int, int]]:
    """60 to 350 tokens each, all labels with loss, until there are ``positions``."""
    rng, left = np.random.default_rng(0), positions
    while left > 0:
        length = int(rng.integers(60, 350))
        yield 0, length
        left -= length - 1


def contenders(case: Case) -> dict[str, Callable[[], object]]:
    def topk_and_lse(logits_NV: Tensor) -> None:
        logits_NV.topk(200, dim=1)
        logits_NV.logsumexp(1)

    return {
        PLAIN: case.plain,
        "plain, topk + logsumexp": functools.partial(case.plain, topk_and_lse),
        **{f"Stage 0, {s}": functools.partial(case.stage0, s) for s in STRATEGIES},
    }


def measure(work: dict[str, Callable[[], object]], rounds: int, positions: int) -> None:
    """Print wall-clock and CPU time in ms a position, and ratios within each round."""
    cpu = {name: Times() for name in work}

    def counted(name: str) -> None:
        start = time.process_time_ns()
        work[name]()
        cpu[name].values.append((time.process_time_ns() - start) / positions)

    runs = {name: functools.partial(counted, name) for name in work}
    wall = interleave(runs, rounds=rounds, each=positions, device=CPU)
    print(f"{'ms a position':26}{'wall':>9}{'x plain':>9}{'CPU':>9}{'x plain':>9}")
    for name in work:
        del cpu[name].values[0]  # the warm-up
        columns = ""
        for times in (wall, cpu):
            pairs = zip(times[name].values, times[PLAIN].values, strict=True)
            ratio = statistics.median(a / b for a, b in pairs)
            columns += f"{times[name].median / 1e6:9.3f}{ratio:9.3f}"
        print(f"{name:26}{columns}", flush=True)


def describe_sets(case: Case) -> str:
    reader = CandidateReader(case.stage0("all"))
    sizes = np.concatenate([np.diff(document.offsets) for document in reader])
    at_cap = (sizes >= 200).mean()
    return f"|S| mean {sizes.mean():.0f}, median {np.median(sizes):.0f}, {at_cap:.1%} at the cap"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--positions", type=int, default=700)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()

    print(f"{machine(CPU)}; torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    print(kernels.SELECTION.describe("auto", torch.empty(0)))
    groups = parallel.initialize(ParallelConfig(), platform.select("cpu"))
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            vocab_size = MODELS[name][1]
            documents = random_documents(vocab_size, document_sizes(options.positions))
            corpus = save_corpus(Path(folder) / "corpus", vocab_size, documents)
            case = Case(
                model=random_model(name, groups),
                corpus=corpus,
                groups=groups,
                folder=Path(folder),
                numbers=itertools.count(),
            )
            positions = int((corpus.lengths - 1).sum())
            print(
                f"\n{name}: H {HIDDEN}, {MODELS[name][0]} layers, V {vocab_size:,}; "
                f"{positions} positions; {describe_sets(case)}"
            )
            for threads in options.threads:
                torch.set_num_threads(threads)
                print(f"threads {threads}")
                measure(contenders(case), options.rounds, positions)


if __name__ == "__main__":
    main()
