"""Candidate selection beside torch's pieces of it: python -m benchmarks.select

Rows of 151,936 logits, at most 200 candidates, coverage 0.95; ms a row, the median and the least of
the rounds. "faster": how many times as fast as ``topk`` + ``logsumexp``, which find neither the cut
nor equal sets for ties and shards. Stage 0 reads these logits right after the output layer's matrix
product, the row "h W"; "of h W" is each row's least time over that of the product. The rows do not
fit the cache together, as in Stage 0.

gauss: independent normal. peaked: those times 8, so that few tokens hold the mass. tied: gauss
rounded to bf16, so that ties straddle the cut.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timing import Times, interleave, machine
from megatron_replay.functional import select_candidates
from megatron_replay.kernels import SELECTION

VOCAB_SIZE, HIDDEN, COVERAGE, MAX_CANDIDATES = 151_936, 2560, 0.95, 200
BASELINE, PRODUCT = "torch.topk + torch.logsumexp", f"h W, H {HIDDEN}"
KINDS = ("gauss", "peaked", "tied")


def logits_of(kind: str, rows: int) -> Tensor:
    """fp32 [n, V]."""
    logits_nV = torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    if kind == "peaked":
        logits_nV *= 8
    return logits_nV.bfloat16().float() if kind == "tied" else logits_nV


def contenders(logits_nV: Tensor) -> dict[str, Callable[[], object]]:
    n, dtype = len(logits_nV), logits_nV.dtype
    labels_n = torch.randint(VOCAB_SIZE, (n,))
    hidden_nH, weight_VH = torch.randn(n, HIDDEN).to(dtype), torch.randn(VOCAB_SIZE, HIDDEN)
    weight_HV, out_nV = weight_VH.to(dtype).T, torch.empty_like(logits_nV)

    def ours(name: str) -> Callable[[], object]:
        backend = SELECTION.choose(name, logits_nV)
        options = {"coverage": COVERAGE, "max_candidates": MAX_CANDIDATES, "backend": backend}
        return lambda: select_candidates(logits_nV, labels_n, **options)

    def both() -> None:
        logits_nV.topk(MAX_CANDIDATES, dim=1)
        logits_nV.logsumexp(1)

    best = SELECTION.resolve("auto", logits_nV)
    return {
        BASELINE: both,
        "torch.topk": lambda: logits_nV.topk(MAX_CANDIDATES, dim=1),
        "torch.logsumexp": lambda: logits_nV.logsumexp(1),
        **{f"select_candidates, {name}": ours(name) for name in dict.fromkeys(("torch", best))},
        PRODUCT: lambda: torch.mm(hidden_nH, weight_HV, out=out_nV),
    }


HEADING = f"{'':36}{'ms/row':>9}{'faster':>9}{'least':>9}{'faster':>9}{'of h W':>9}"


def text(name: str, times: Times, baseline: Times, product: Times) -> str:
    return (
        f"{name:36}{times.median / 1e6:9.4f}{baseline.median / times.median:9.2f}"
        f"{times.least / 1e6:9.4f}{baseline.least / times.least:9.2f}"
        f"{100 * times.least / product.least:7.1f} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    cpu, rows = torch.device("cpu"), options.rows
    print(f"{machine(cpu)}; torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    for threads in options.threads:
        torch.set_num_threads(threads)
        for dtype in options.dtypes:
            for kind in options.kinds:
                work = contenders(logits_of(kind, rows).to(getattr(torch, dtype)))
                times = interleave(work, rounds=options.rounds, each=rows, device=cpu)
                print(f"\n[{rows}, {VOCAB_SIZE}] {kind}, {dtype}, threads {threads}\n{HEADING}")
                for name, each in times.items():
                    print(text(name, each, times[BASELINE], times[PRODUCT]), flush=True)


if __name__ == "__main__":
    main()
