"""Vocabulary skew over tensor-parallel ranks: python -m benchmarks.skew

A BPE tokenizer's low ids are its common ones, so of contiguous shards the first has most pairs; of
interleaved ones (rank = id % TP) all have alike. On the sets of benchmarks.real_sets: each rank's
share of the pairs; the time of its head, forward and backward, ranks one after another on this
machine and without communication; the slowest rank over the mean of its ranks.

"step" is the slowest rank's time beyond the mean over that of a training step whose other FLOPs
(6 per token and parameter of the layers, attention at 4,096 tokens; a head at every position) run
at torch's fp32 matrix product's rate in the same rounds, divided among the ranks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.head import SGEMM, SGEMM_SIZE, sgemm
from benchmarks.real_sets import VOCAB_SIZE, Sets, real_sets
from benchmarks.timing import Times, interleave, machine
from megatron_replay.functional.shard_head import (
    HeadForm,
    ShardSets,
    Softmax,
    VocabShard,
    finite,
    shard_sets,
)
from megatron_replay.kernels import HEAD

SEQUENCE, ATTENTION_WIDTH, KEY_VALUE_WIDTH = 4096, 4096, 1024


@dataclass(frozen=True)
class Model:
    """A Qwen3, as its config.json has it."""

    name: str
    hidden_size: int
    ffn_size: int
    num_layers: int = 36

    @property
    def flops(self) -> int:
        """Of a training step per token, without the output layer."""
        H, Q = self.hidden_size, ATTENTION_WIDTH
        layer = 2 * H * Q + 2 * H * KEY_VALUE_WIDTH + 3 * H * self.ffn_size
        causal = Q * SEQUENCE  # scores and values, 2 * 2 FLOP for each of S / 2 earlier tokens ...
        return self.num_layers * (6 * layer + 3 * 2 * causal)  # ... and twice that in backward


MODELS = Model("Qwen3-4B", 2560, 9728), Model("Qwen3-8B", 4096, 12288)


def cut(sets: Sets, tp: int, rank: int, *, interleaved: bool) -> ShardSets:
    """A rank's part of the sets."""
    rows = VOCAB_SIZE // tp
    shard = VocabShard(rank, tp, rows) if interleaved else VocabShard(rank * rows, 1, rows)
    return shard_sets(sets.ids, sets.offsets, sets.labels, None, shard)


def head_pass(
    form: HeadForm, sets: ShardSets, hidden_NH: Tensor, weight_VH: Tensor, grad_VH: Tensor
) -> Callable[[], object]:
    """What a rank does; the other ranks' part of the softmax, which costs nothing, is left out."""
    grad_N = torch.ones(len(hidden_NH))

    def run() -> None:
        fresh = ShardSets(sets.ids, sets.offsets, None, sets.labels_N, sets.num_rows)
        head = form(fresh)
        max_N, sum_N, _ = head.forward(hidden_NH, weight_VH, hidden_grad=True)
        softmax = Softmax(finite(max_N), sum_N.clamp(min=1.0))
        head.backward(
            hidden_NH, weight_VH, softmax, grad_N, hidden_grad=True, weight_grad_out=grad_VH
        )

    return run


HEADING = (
    f"{'TP':>3} {'shards':12}{'slowest ms':>11}{'over mean':>10}{'over interl.':>13}"
    f"{'step':>9}   pairs of each rank, %"
)


def table(model: Model, sets: Sets, form: HeadForm, sizes: list[int], rounds: int) -> None:
    N, cpu = len(sets.labels), torch.device("cpu")
    hidden_NH = torch.randn(N, model.hidden_size)
    weight_VH = torch.randn(VOCAB_SIZE, model.hidden_size).mul_(0.02)
    grad_VH = torch.full_like(weight_VH, 0.0)
    work, pairs = {SGEMM: sgemm(cpu)}, {}
    for tp in sizes:
        for interleaved in (False, True):
            for rank in range(tp):
                part, at = cut(sets, tp, rank, interleaved=interleaved), (tp, interleaved, rank)
                rows = slice(rank * part.num_rows, (rank + 1) * part.num_rows)
                work[str(at)] = head_pass(form, part, hidden_NH, weight_VH[rows], grad_VH[rows])
                pairs[at] = len(part.ids)
    times = interleave(work, rounds=rounds, each=1, device=cpu)
    rate = 2 * SGEMM_SIZE**3 / times[SGEMM].median
    step = N * model.flops / rate
    print(f"\n{model.name}, H {model.hidden_size}: a step's other FLOPs take {step / 1e9:.0f} s")
    print(HEADING)
    for tp in sizes:
        balanced = slowest(times, tp, True)[0]
        for interleaved in (False, True):
            worst, mean = slowest(times, tp, interleaved)
            shares = [100 * pairs[tp, interleaved, rank] / len(sets.ids) for rank in range(tp)]
            print(
                f"{tp:3} {'interleaved' if interleaved else 'contiguous':12}{worst / 1e6:11.2f}"
                f"{worst / mean:10.2f}{worst / balanced:13.2f}"
                f"{100 * (worst - mean) / (step / tp):7.3f} %   "
                + " ".join(f"{share:.1f}" for share in shares),
                flush=True,
            )


def slowest(times: dict[str, Times], tp: int, interleaved: bool) -> tuple[float, float]:
    """The slowest rank's median time, and the mean over ranks."""
    medians = [times[str((tp, interleaved, rank))].median for rank in range(tp)]
    return max(medians), sum(medians) / tp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tp", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--form", default="auto", help="of the head, as --head-backend")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine(torch.device('cpu'))}; torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    like = torch.empty(0)
    form = HEAD.choose(options.form, like)
    sets = real_sets().first(options.positions)
    print(
        f"{HEAD.describe(options.form, like)}, 1 thread, N {options.positions}: {sets.describe()}"
    )
    for model in MODELS:
        table(model, sets, form, options.tp, options.rounds)


if __name__ == "__main__":
    main()
