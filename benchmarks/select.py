"""Choosing candidate sets beside torch's pieces of it: python -m benchmarks.select

Rows of 151,936 logits, 200 candidates at most, coverage 0.95; ms a row, the median and the least of
the rounds. "faster": how many times, than ``topk`` + ``logsumexp``, which find neither the cut nor
equal sets for ties and shards. Stage 0 reads these logits right after the output layer's matrix
product, the rows "h W"; "of h W" is each row's least time over that of H 2560. The rows do not fit
the cache together, as in Stage 0.

gauss: independent normal. peaked: those times 8, few tokens hold the mass. real: log p of
benchmarks.real_sets. tied: gauss rounded to bf16, so that ties straddle the cut.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.real_sets import VOCAB_SIZE, real_logits
from benchmarks.timing import Times, interleave, machine
from megatron_replay.kernels import SELECTION
from megatron_replay.selection.candidates import select_candidates
from megatron_replay.selection.shard_selection import TORCH_SELECTION, SelectionKernel

COVERAGE, MAX_CANDIDATES = 0.95, 200
BASELINE = "torch.topk + torch.logsumexp"
LAYERS = (1024, 2560)
PASS = "h W, H 2560"
Pass = Callable[[], object]
KINDS = ("gauss", "peaked", "real", "tied")


def logits_of(kind: str, rows: int) -> Tensor:
    """fp32 [n, V]."""
    if kind == "real":
        return real_logits()[:rows].clone()
    logits_nV = torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    if kind == "peaked":
        logits_nV *= 8
    return logits_nV.bfloat16().float() if kind == "tied" else logits_nV


def contenders(logits_nV: Tensor, compiled: SelectionKernel) -> dict[str, Pass]:
    labels_n = torch.randint(VOCAB_SIZE, logits_nV.shape[:1])

    def ours(kernel: SelectionKernel) -> Pass:
        return lambda: select_candidates(
            logits_nV,
            labels_n,
            coverage=COVERAGE,
            max_candidates=MAX_CANDIDATES,
            kernel=kernel,
        )

    def both() -> None:
        logits_nV.topk(MAX_CANDIDATES, dim=1)
        logits_nV.logsumexp(1)

    work: dict[str, Pass] = {
        BASELINE: both,
        "torch.topk": lambda: logits_nV.topk(MAX_CANDIDATES, dim=1),
        "torch.logsumexp": lambda: logits_nV.logsumexp(1),
        "select_candidates, torch form": ours(TORCH_SELECTION),
    }
    if compiled is not TORCH_SELECTION:
        work[f"select_candidates, {compiled.name} form"] = ours(compiled)
    return work


def slow_work(logits_nV: Tensor) -> dict[str, Pass]:
    """A sort, and the output layer's products that make such logits."""
    n, dtype = len(logits_nV), logits_nV.dtype
    out_nV = torch.empty_like(logits_nV)

    def layer(hidden_size: int) -> Pass:
        hidden_nH = torch.randn(n, hidden_size).to(dtype)
        weight_VH = torch.randn(VOCAB_SIZE, hidden_size).to(dtype)
        return lambda: torch.mm(hidden_nH, weight_VH.T, out=out_nV)

    work: dict[str, Pass] = {"torch.sort": lambda: logits_nV.sort(1, descending=True)}
    return work | {f"h W, H {size}": layer(size) for size in LAYERS}


def require_equal(logits_nV: Tensor, compiled: SelectionKernel) -> None:
    """Both forms' sets, bit for bit, before either is timed."""
    labels_n = torch.zeros(len(logits_nV), dtype=torch.long)
    one, other = (
        select_candidates(
            logits_nV, labels_n, coverage=COVERAGE, max_candidates=MAX_CANDIDATES, kernel=kernel
        )
        for kernel in (TORCH_SELECTION, compiled)
    )
    for name, value in vars(one).items():
        if not torch.equal(value, getattr(other, name)):
            raise SystemExit(f"error: the forms differ in {name}")


HEADING = f"{'':36}{'ms/row':>9}{'faster':>9}{'least':>9}{'faster':>9}{'of h W':>9}"


def text(name: str, times: Times, baseline: Times, pass_: Times) -> str:
    return (
        f"{name:36}{times.median / 1e6:9.4f}{baseline.median / times.median:9.2f}"
        f"{times.least / 1e6:9.4f}{baseline.least / times.least:9.2f}"
        f"{100 * times.least / pass_.least:7.1f} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()

    cpu, rows = torch.device("cpu"), options.rows
    print(f"{machine(cpu)}; torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    print(SELECTION.describe("auto", torch.empty(0)))
    for threads in options.threads:
        torch.set_num_threads(threads)
        for dtype in (getattr(torch, name) for name in options.dtypes):
            # Slow, and next to alike for all logits: in the rounds of the first.
            first = logits_of(options.kinds[0], rows).to(dtype)
            slow = slow_work(first)
            pass_ = Times()
            for kind in options.kinds:
                logits_nV = logits_of(kind, rows).to(dtype)
                compiled = SELECTION.choose("auto", logits_nV)
                require_equal(logits_nV, compiled)
                work = contenders(logits_nV, compiled) | slow
                times = interleave(work, rounds=options.rounds, each=rows, device=cpu)
                pass_ = times[PASS] if slow else pass_
                slow = {}
                print(f"\n[{rows}, {VOCAB_SIZE}] {kind}, {dtype}, threads {threads}\n{HEADING}")
                for name, each in times.items():
                    print(text(name, each, times[BASELINE], pass_), flush=True)


if __name__ == "__main__":
    main()
