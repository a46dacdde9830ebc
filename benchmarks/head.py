"""The restricted head beside its peers, forward and backward: python -m benchmarks.head

A row's times are the median and the least of the rounds; "x" is each over that of the first row
that ran, our best form. "sgemm" is the share that 6 P H flops in the least time are of torch's fp32
matrix product, at its best in the table; with 6 N V H for a full softmax, and for documents' unions
P the sum of length times union. "MiB" is the most resident memory beyond operands and main_grad, of
one pass in a fresh process; autograd's dense gradient of the weight is in it. "error" is the
largest of either gradient against float64, over the largest entry, at the candidates' rows.

Restricted heads add to main_grad in place. Full softmaxes are slow: they are measured on the first
positions ("of 256") and on 16, in rounds of their own, which ours takes part in; their row is the
line through both at N positions. Their memory is that of the first positions.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.head_case import (
    REGIMES,
    Batch,
    full_reference,
    gradient_error,
    make_batch,
    restricted_reference,
    sets_of,
)
from benchmarks.head_contenders import Contender, Pass, contenders
from benchmarks.memory import available_bytes, peak_bytes
from benchmarks.timing import Times, interleave, machine
from megatron_replay.platform import select

VOCAB_SIZE = 151_936
SGEMM, OURS = "sgemm", "ours"
#: By dtype of the operands, whether over the whole vocabulary, whether of documents' unions.
References = dict[tuple[torch.dtype, bool, bool], tuple[torch.Tensor, torch.Tensor]]
SGEMM_SIZE = 2048
#: Positions on which a full softmax is checked, in float64 over the whole vocabulary; and timed,
#: for what does not grow with them.
FEW, OF_FEW = 16, " of few"
#: More would be a wrong gradient of fp32 operands, or of bf16 ones.
TOLERANCE, TOLERANCE_BF16 = 1e-4, 1e-2
GIB = 1 << 30


@dataclass
class Row:
    """What became known of a contender."""

    contender: Contender
    times: Times = field(default_factory=Times)
    flops: int | None = None
    error: float | None = None
    peak: int | None = None
    note: str = ""

    def text(self, ours: Times, rate: float) -> str:
        name = f"{self.contender.name:44}"
        if not self.times.values:
            return f"{name}{self.note}"
        median, least = self.times.median, self.times.least
        share = f"{100 * self.flops / self.times.least / rate:.0f} %" if self.flops else "-"
        peak = "-" if self.peak is None else f"{self.peak / 2**20:.1f}"
        error = "-" if self.error is None else f"{self.error:.0e}"
        return (
            f"{name}{median / 1e6:10.2f}{median / ours.median:9.2f}{least / 1e6:10.2f}"
            f"{least / ours.least:9.2f}{share:>7}{peak:>9}{error:>8}  {self.note}"
        )


HEADING = f"{'':44}{'ms':>10}{'x':>9}{'least':>10}{'x':>9}{'sgemm':>7}{'MiB':>9}{'error':>8}"


def sgemm(device: torch.device) -> Pass:
    a, b = torch.randn(2, SGEMM_SIZE, SGEMM_SIZE, device=device)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def check(contender: Contender, batch: Batch, references: References) -> float:
    """Run once on clean gradients and compare."""
    batch.clear()
    batch.weight_grad.zero_()
    contender.make(batch)()
    full, documents = contender.full and contender.flops is not None, contender.documents
    key = batch.hidden.dtype, full, documents
    if key not in references:
        exact = full_reference(batch) if full else restricted_reference(batch, documents=documents)
        references[key] = exact
    error = gradient_error(batch, references[key], documents=documents)
    batch.clear()
    if not error <= (TOLERANCE_BF16 if contender.bf16 else TOLERANCE):
        raise SystemExit(f"error: wrong gradients: {contender.name} is {error:.1e} off")
    return error


@dataclass
class Part:
    """Rows measured in the same rounds, with what they are compared to."""

    rows: list[Row]
    ours: Times
    rate: float

    def print(self, rate: float) -> None:
        print(f"sgemm {rate:.1f} GFLOP/s, {len(self.ours.values)} rounds\n{HEADING}")
        for row in self.rows:
            print(row.text(self.ours, rate), flush=True)


def measure(chosen: Sequence[Contender], batch: Batch, *, rounds: int) -> Part:
    """Restricted heads, in turn with the matrix product; the first is ours."""
    device, references = batch.hidden.device, References()
    work = {SGEMM: sgemm(device)}
    rows, able, rounded = _rows(chosen, batch)
    for row in able:
        contender, operands = row.contender, rounded if row.contender.bf16 else batch
        if contender.has_gradients:
            row.error = check(contender, operands, references)
        row.flops = contender.flops(operands) if contender.flops else None
        work[contender.name] = contender.make(operands)
    times = interleave(work, rounds=rounds, each=1, device=device)
    for row in able:
        row.times = times[row.contender.name]
    return Part(rows, able[0].times, 2 * SGEMM_SIZE**3 / times[SGEMM].least)


def measure_full(
    chosen: Sequence[Contender], batch: Batch, *, ours: Contender, slice_: int, rounds: int
) -> Part:
    """Full softmaxes, on a slice and on a few positions; the line through both gives all N.

    What does not grow with positions, such as a dense gradient of the weight, is so counted once.
    """
    device, references, N = batch.hidden.device, References(), batch.num_positions
    work = {SGEMM: sgemm(device), OURS: ours.make(batch)}
    rows, able, rounded = _rows(chosen, batch)
    for row in able:
        contender, operands = row.contender, rounded if row.contender.bf16 else batch
        few = operands.first(FEW)
        row.error = check(contender, few, references)  # this has been the warm-up, too
        row.flops = contender.flops(operands) if contender.flops else None
        work[contender.name] = _then_clear(contender, operands.first(slice_))
        if slice_ < N:
            work[contender.name + OF_FEW] = _then_clear(contender, few)
            row.note = f"of {slice_}"
    times = interleave(work, rounds=rounds, each=1, device=device, warm_up=False)
    for row in able:
        row.times = times[row.contender.name]
        if slice_ < N:
            more = (N - slice_) / (slice_ - FEW)
            pairs = zip(row.times.values, times[row.contender.name + OF_FEW].values, strict=True)
            row.times = Times([part + more * (part - few) for part, few in pairs])
    return Part(rows, times[OURS], 2 * SGEMM_SIZE**3 / times[SGEMM].least)


def _then_clear(contender: Contender, batch: Batch) -> Pass:
    """A dense gradient that is kept would leave the next contender without memory."""
    run = contender.make(batch)

    def run_and_clear() -> None:
        run()
        batch.clear()

    return run_and_clear


def _rows(chosen: Sequence[Contender], batch: Batch) -> tuple[list[Row], list[Row], Batch]:
    """All rows, those that can run, and the batch in bf16 where one of them asks for it."""
    rows = [Row(contender, note=contender.why_not or "") for contender in chosen]
    able = [row for row in rows if not row.contender.why_not]
    return rows, able, batch.rounded() if any(row.contender.bf16 for row in able) else batch


def peak_of(options: argparse.Namespace, contender: Contender, case: Sequence[str]) -> int | None:
    """Ask a fresh process."""
    if contender.why_not or not contender.has_gradients:
        return None
    command = [sys.executable, "-m", "benchmarks.head", "--peak-of", contender.name, *case]
    command += ["--device", str(options.device), "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: memory of {contender.name}: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def print_peak(options: argparse.Namespace) -> None:
    """The fresh process: one position first, so that libraries are loaded and threads started."""
    torch.set_num_threads(options.threads[0])
    contender = next(c for c in contenders(options.device) if c.name == options.peak_of)
    regime, N, H = options.regimes[0], options.positions[0], options.hidden[0]
    batch = make_batch(
        sets_of(regime, N, VOCAB_SIZE),
        hidden_size=H, vocab_size=VOCAB_SIZE, device=options.device, constant=True,
    )  # fmt: skip
    batch = batch.rounded() if contender.bf16 else batch
    alone = batch.first(1)
    contender.make(alone)()
    alone.clear()
    print(peak_bytes(contender.make(batch), options.device))


def table(options: argparse.Namespace, regime: str, N: int, H: int) -> None:
    """One shape and regime: restricted heads in many rounds, full softmaxes in few.

    Full softmaxes, whose times do not depend on the sets, and memory with the first regime alone.
    """
    device, first = options.device, regime == options.regimes[0]
    sets = sets_of(regime, N, VOCAB_SIZE)
    batch = make_batch(sets, hidden_size=H, vocab_size=VOCAB_SIZE, device=device)
    every = contenders(device)
    ours = next(c for c in every if not c.why_not)
    chosen = [c for c in every if c is ours or options.only in c.name]
    small = [c for c in chosen if not c.full and (regime == "real" or not c.documents)]
    print(f"\n(H, V) = ({H}, {VOCAB_SIZE:,}), N {N}, threads {torch.get_num_threads()}")
    print(f"{regime} sets: {sets.describe()}")
    parts = [measure(small, batch, rounds=options.rounds)]
    few = min(options.slice or N, N)
    if first and not options.no_full:
        large = [c for c in chosen if c.full]
        rounds = options.full_rounds
        parts.append(measure_full(large, batch, ours=ours, slice_=few, rounds=rounds))
    del batch
    for row in itertools.chain(*(part.rows for part in parts)):
        positions = few if row.contender.full else N
        case = ["--regimes", regime, "--positions", str(positions), "--hidden", str(H)]
        # Of full softmaxes at the first shape alone: it is that of logits and a dense gradient.
        if first and not options.no_memory and not (row.contender.full and options.hidden[0] != H):
            row.peak = peak_of(options, row.contender, case)
    rate = max(part.rate for part in parts)  # the part that was disturbed less tells it better
    for part in parts:
        part.print(rate)


def require_memory(hidden: int) -> None:
    """Weight and main_grad in fp32, the weight in bf16, a dense gradient, logits of a slice."""
    needed = VOCAB_SIZE * hidden * (4 + 4 + 2 + 4) + 2 * GIB
    if needed > available_bytes():
        raise SystemExit(
            f"error: H {hidden} takes {needed / GIB:.0f} GiB, {available_bytes() / GIB:.0f} are "
            "left; choose others with --hidden"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024, 2560, 4096])
    parser.add_argument("--positions", type=int, nargs="+", default=[1024])
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument(
        "--every", action="store_true", help="all regimes for each H, not the first"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full-rounds", type=int, default=2)
    parser.add_argument("--slice", type=int, default=256, help="positions of a full softmax; 0 all")
    parser.add_argument("--no-full", action="store_true", help="leave full softmaxes out")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--only", default="", help="contenders whose name has this in it")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    select("cpu").prepare()
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    if options.peak_of:
        print_peak(options)
        return
    print(f"{machine(options.device)}; torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    for threads, H, N in itertools.product(options.threads, options.hidden, options.positions):
        torch.set_num_threads(threads)
        require_memory(H)
        every = options.every or options.hidden[0] == H
        for regime in options.regimes if every else options.regimes[:1]:
            table(options, regime, N, H)


if __name__ == "__main__":
    main()
