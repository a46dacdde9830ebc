"""What shared prefixes save, Stage 0 included: python -m benchmarks.prefix [--data SPIDER ...]

Rows: Spider's training questions, or generated ones that share as much. Spider's token ids are
renumbered, since the vocabulary here is smaller than a tokenizer's. A step is 16 packs of 4,096
tokens, with forward, backward and AdamW; joining with the store is included. Stage 0 runs on every
eighth schema with all of its documents, the plain forward pass and the peers on part of a step.
All are scaled by positions to one epoch.

On a CPU seconds are CPU time, and the model is Qwen3-0.6B's at a quarter of the width, with few
layers and so much less of the vocabulary that the output layer has its share of the weights, 26 %.
With CUDA they are elapsed time, and the model is Qwen3-0.6B's shape in bf16. Weights are random.
Every arm runs once a round, in turn; ratios are medians over the rounds, but for the one that must
show a percent: noise only adds time, so that one compares the least of many.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import Measured, machine
from megatron_replay import parallel, platform
from megatron_replay.collection import LOGITS_CHUNK_SIZE
from megatron_replay.config import ParallelConfig
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.forest import Forest
from megatron_replay.store import CandidateReader

PLATFORM = platform.select()
PLATFORM.prepare()  # before megatron-core may be imported
IS_CPU = PLATFORM.device.type == "cpu"

from benchmarks.prefix_rows import (  # noqa: E402
    DATABASES,
    GROUP,
    SEQ_LENGTH,
    SPREAD,
    Rows,
    forest,
    generated_rows,
    labels,
    share_of,
    spider_rows,
)
from benchmarks.stages import (  # noqa: E402
    ANSWER,
    HIDDEN,
    QUESTION,
    SCHEMA,
    VOCAB_SIZE,
    Ours,
    Peer,
    save_model,
)
from megatron_replay.data.packing import pack_batch  # noqa: E402
from megatron_replay.data.replay import eligible_rows  # noqa: E402
from megatron_replay.forward import MicroBatch, forward_backward, forward_only  # noqa: E402
from megatron_replay.model.selected_rows import HiddenStates  # noqa: E402

BASELINE = "packed full softmax, unshared"
OFF, ON = "nothing to share, sharing off", "nothing to share, sharing on"
RANDOM, GROUPED = "replay, random order", f"replay, groups of {GROUP}"
STAGE0, PLAIN = "Stage 0", "plain forward, unshared"
PADDED, UNPADDED = "transformers, padded", "transformers, no padding"


class Shape(NamedTuple):
    """A decoder whose feed-forward layers are gated; ``heads`` and ``groups`` of 128 channels."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    groups: int
    vocab_size: int = VOCAB_SIZE

    @staticmethod
    def measured(layers: int) -> Shape:
        """Of ``save_model``: a quarter of Qwen3-0.6B's width on a CPU, Qwen3-0.6B's elsewhere."""
        hidden = HIDDEN if IS_CPU else 1024
        # At this width 112 layers with the whole vocabulary have Qwen3-0.6B's proportions.
        vocab_size = VOCAB_SIZE * layers // 112 if IS_CPU else VOCAB_SIZE
        return Shape(layers, hidden, 3 * hidden, hidden // 64, hidden // 128, vocab_size)

    def flops(self, forest: Forest, labels: int) -> float:
        """Of the forward pass, with the output layer at ``labels`` positions."""
        attention = 128 * self.hidden * (2 * self.heads + 2 * self.groups)
        token = 2 * self.layers * (attention + 3 * self.hidden * self.feed_forward)
        # A position looks at itself and all before it.
        seen = (forest.positions_D * (forest.positions_D + 1) // 2).sum()
        seen -= (forest.shared_D * (forest.shared_D + 1) // 2).sum()
        looks = 4 * 128 * self.heads * self.layers * float(seen)
        return token * forest.computed + looks + 2 * self.hidden * self.vocab_size * labels


QWEN3 = {
    "Qwen3-0.6B": Shape(28, 1024, 3072, 16, 8),
    "Qwen3-4B": Shape(36, 2560, 9728, 32, 8),
    "Qwen3-8B": Shape(36, 4096, 12288, 32, 8),
}


def plain_forward(ours: Ours, corpus: Corpus) -> None:
    """The logits of every position with loss, discarded; packed, nothing shared."""
    for pack in forest(corpus, share=False).cut(SEQ_LENGTH):
        batch = pack_batch(corpus, pack, corpus.lengths, multiple=1)
        rows_N = eligible_rows(batch)

        def head(hidden: HiddenStates, weight_VH: Tensor, rows_N: Tensor = rows_N) -> None:
            for rows in rows_N.to(weight_VH.device).split(LOGITS_CHUNK_SIZE):
                hidden[rows] @ weight_VH.T

        forward_only(ours.model.module, [MicroBatch(batch.to(ours.groups.device), head)])


def saved_bytes(ours: Ours, work: MicroBatch) -> int:
    """Bytes that autograd keeps of a micro-batch until backward, parameters excepted."""
    storages: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in ours.model.module.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()  # kept until backward: no address twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward_backward(ours.wrapped, [work])
    return sum(size for address, size in storages.items() if address not in weights)


def print_memory(ours: Ours, rows: Rows, stores: Mapping[str, Path]) -> None:
    print("\nactivations kept for backward, one micro-batch of up to 4,096 computed tokens")
    arms = {
        BASELINE: (rows.random, None, False),
        RANDOM: (rows.random, stores["random"], True),
        GROUPED: (rows.grouped, stores["grouped"], True),
    }
    for name, (corpus, store, share) in arms.items():
        batch = ours.batch(corpus, store, share=share)
        part, saved = batch.parts[0], saved_bytes(ours, batch.micro_batches[0])
        print(
            f"  {name:<32}{saved / 2**20:8.0f} MiB for {part.positions:6,} tokens: "
            f"{saved / 2**10 / part.positions:6.1f} KiB each; {len(batch.parts)} micro-batches a "
            "step",
            flush=True,
        )


class Arm(NamedTuple):
    """What is measured, and the positions it stands for."""

    run: Callable[[], object]
    positions: int


def arms_of(ours: Ours, peer: Peer, rows: Rows, stores: Mapping[str, Path]) -> dict[str, Arm]:
    def step(corpus: Corpus, store: str | None, *, share: bool) -> Arm:
        path = stores[store] if store else None
        run = functools.partial(ours.step, corpus, path, share=share)
        return Arm(run, forest(corpus).positions)

    few = [rows.random[i] for i in range(0, len(rows.random), 12)]
    positions = sum(len(document) - 1 for document in few)
    longest = int(rows.random.lengths.max())
    return {
        BASELINE: step(rows.random, None, share=False),
        "  the same, shared": step(rows.random, None, share=True),
        "replay, unshared": step(rows.random, "random", share=False),
        RANDOM: step(rows.random, "random", share=True),
        GROUPED: step(rows.grouped, "grouped", share=True),
        OFF: step(rows.nothing, "nothing", share=False),
        ON: step(rows.nothing, "nothing", share=True),
        PLAIN: Arm(
            functools.partial(plain_forward, ours, rows.random), forest(rows.random).positions
        ),
        STAGE0: Arm(functools.partial(ours.stage0, rows.stage0), forest(rows.stage0).positions),
        UNPADDED: Arm(functools.partial(peer.step, few), positions),
        PADDED: Arm(functools.partial(peer.step, few, padded_to=longest), positions),
    }


def report(measured: Mapping[str, Measured], arms: Mapping[str, Arm]) -> None:
    """ms a token; then the goals, each the median of its rounds."""
    cost = {
        name: [1e3 * seconds / arms[name].positions for seconds in m.seconds]
        for name, m in measured.items()
    }
    print(f"\n{'':<34}{'ms a token':>11}{'least':>8}{'x baseline':>11}{'peak MiB':>9}")
    baseline = statistics.median(cost[BASELINE])
    for name, values in cost.items():
        print(
            f"{name:<34}{statistics.median(values):11.3f}{min(values):8.3f}"
            f"{statistics.median(values) / baseline:11.3f}{max(measured[name].memory) / 2**20:9.0f}"
        )

    def epoch(stage1: str) -> list[float]:
        return [a + b for a, b in zip(cost[STAGE0], cost[stage1], strict=True)]

    goals: list[tuple[str, list[float], str, float]] = [
        ("Stage 0, over a plain forward pass", cost[STAGE0], PLAIN, 0.20),
        ("an epoch, random order", epoch(RANDOM), BASELINE, 0.65),
        (f"an epoch, groups of {GROUP}", epoch(GROUPED), BASELINE, 0.40),
        ("random order, over transformers padded", epoch(RANDOM), PADDED, 0.30),
        ("random order, over transformers unpadded", epoch(RANDOM), UNPADDED, 0.65),
    ]
    print(f"\n{'an epoch includes Stage 0':<44}{'x':>7}{'must be at most':>17}")
    for name, values, other, most in goals:
        print(f"{name:<44}{ratio(values, cost[other]):7.3f}{most:17.2f}")
    nothing = min(cost[ON]) / min(cost[OFF])
    print(f"{'a step with nothing to share, on / off':<44}{nothing:7.3f}{1.01:17.2f}", flush=True)


def ratio(ours: Sequence[float], others: Sequence[float]) -> float:
    """Of what was measured in the same rounds."""
    return statistics.median(a / b for a, b in zip(ours, others, strict=True))


def print_arithmetic(rows: Rows, shapes: Mapping[str, Shape]) -> None:
    """FLOPs in matrix products, all layers at all computed tokens; backward is twice the forward.

    The restricted head counts as nothing: its sets have a thousandth of the vocabulary.
    """
    print(
        f"\n{'FLOPs, over packed full softmax':<34}{'head':>7}{'random':>8}{'groups':>8}"
        f"{'Stage 0 / forward':>19}{'epoch, random':>15}{'epoch, groups':>15}"
    )
    for name, shape in shapes.items():

        def cost(corpus: Corpus, num: int, *, share: bool, shape: Shape = shape) -> float:
            planted = forest(corpus, share=share)
            return shape.flops(planted, num) / planted.positions

        forward = cost(rows.random, labels(rows.random), share=False)
        body = cost(rows.random, 0, share=False)
        stage0 = cost(rows.stage0, labels(rows.stage0), share=True) / forward
        random = cost(rows.random, 0, share=True) / forward
        grouped = cost(rows.grouped, 0, share=True) / forward
        print(
            f"{name:<34}{1 - body / forward:7.1%}{random:8.3f}{grouped:8.3f}{stage0:19.3f}"
            f"{stage0 / 3 + random:15.3f}{stage0 / 3 + grouped:15.3f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="Spider: train_spider.json and database/")
    parser.add_argument("--tokenizer", type=Path, help="of --data: a Hugging Face directory")
    parser.add_argument("--layers", type=int, default=6 if IS_CPU else 28)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if (options.data is None) != (options.tokenizer is None):
        parser.error("--data needs --tokenizer, and the reverse")
    torch.set_num_threads(options.threads)
    device, shape = PLATFORM.device, Shape.measured(options.layers)
    print(f"{machine(device)}; torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.data:
            print(f"rows: {options.data}/train_spider.json")
            documents = spider_rows(options.data, options.tokenizer)
        else:
            print(
                f"rows: generated, {DATABASES} schemas of {SCHEMA} tokens, spread {SPREAD}; "
                f"questions of {QUESTION}, answers of {ANSWER}"
            )
            documents = generated_rows(shape.vocab_size)
        rows = Rows.of(folder, shape.vocab_size, documents)
        print(
            f"  the {len(rows.stage0)} documents that Stage 0 is measured on "
            f"{share_of(forest(rows.stage0)):.3f}"
        )
        print_arithmetic(rows, {"the model measured": shape, **QWEN3})

        parameters = save_model(
            folder, shape.layers, hidden=shape.hidden, vocab_size=shape.vocab_size
        )
        groups = parallel.initialize(ParallelConfig(), PLATFORM)
        ours = Ours(folder, groups, seq_length=SEQ_LENGTH, bf16=not IS_CPU)
        peer = Peer(folder, device, torch.float32 if IS_CPU else torch.bfloat16)
        stores = {
            part: ours.stage0(getattr(rows, part)) for part in ("random", "grouped", "nothing")
        }
        sets = np.concatenate([np.diff(d.offsets) for d in CandidateReader(stores["random"])])
        print(
            f"\nH {shape.hidden}, {shape.layers} layers, V {shape.vocab_size:,}, "
            f"{parameters:,} parameters, {shape.vocab_size * shape.hidden / parameters:.0%} of "
            f"them the output layer; threads {options.threads}; |S| mean {sets.mean():.0f}"
        )
        print_memory(ours, rows, stores)
        arms = arms_of(ours, peer, rows, stores)
        measured = {name: Measured() for name in arms}
        # A percent is to be seen there, so these two, which are short, have more rounds.
        order = [name for name in arms if name not in (OFF, ON)] + 5 * [OFF, ON]
        for number in range(options.rounds):
            for name in order:
                measured[name].add(arms[name].run, device)
            print(f"\nafter round {number + 1}")
            report(measured, arms)


if __name__ == "__main__":
    main()
