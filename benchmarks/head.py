"""The restricted head beside its peers, forward and backward: python -m benchmarks.head

A row's times are the median and the least of the rounds; "x" is each over that of the first row,
our best backend. "sgemm" is the rate of 6 P H flops in the least time, as a share of torch's fp32
matrix product in the same rounds; P is the number of pairs of a position and a candidate, for
documents the sum of length times union, for a full softmax N V. "error" is the largest of either
gradient against float64 on 16 positions, over the largest entry, at the candidates' rows.

Full softmaxes are slow: they are timed on the first positions ("of 256") and on 16, beside ours,
and their row is the line through both at N positions.

Sets have 1 to 200 ids, 100 on average: zipf draws them with p ~ 1 / (rank + 3), ranks shuffled;
uniform draws all ids alike, so next to no id is in two sets, which is the worst case.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from benchmarks.timing import Times, available_bytes, interleave, machine
from megatron_replay.config import ParallelConfig
from megatron_replay.functional import restricted_cross_entropy
from megatron_replay.kernels import HEAD
from megatron_replay.platform import select

VOCAB_SIZE, LARGEST_SET, DOCUMENT = 151_936, 200, 170
SGEMM, SGEMM_SIZE = "sgemm", 2048
#: Positions of a check and of the shorter of a full softmax's two timings.
FEW = 16
#: Positions that torch gathers at a time: more would not fit the caches, nor soon the memory.
GATHERED = 32
TOLERANCE, TOLERANCE_BF16 = 1e-4, 1e-2
Pass = Callable[[], object]


@dataclass(eq=False)
class Batch:
    """Operands [N, H] and [V, H], Megatron's fp32 main_grad, and sets by position or by document.

    A pass leaves dH in ``hidden.grad`` and dW in ``weight.grad`` (dense, by autograd) or added to
    ``weight_grad``. ``starts``: where documents start, N included.
    """

    hidden: Tensor
    weight: Tensor
    weight_grad: Tensor
    ids: Tensor
    offsets: Tensor
    labels: Tensor
    starts: Tensor

    def __post_init__(self) -> None:
        self.hidden = self.hidden.detach().requires_grad_()
        self.weight = self.weight.detach().requires_grad_()

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def first(self, count: int) -> Batch:
        """The first positions, on the same weight."""
        starts = torch.cat([self.starts[self.starts < count], torch.tensor([count])])
        offsets = self.offsets[: count + 1]
        return replace(
            self, hidden=self.hidden[:count], ids=self.ids[: int(offsets[-1])], offsets=offsets,
            labels=self.labels[:count], starts=starts,
        )  # fmt: skip

    @functools.cached_property
    def unions(self) -> tuple[Tensor, Tensor]:
        """(ids, offsets) of the union of each document's sets."""
        bounds = self.offsets[self.starts].tolist()
        found = [self.ids[a:b].unique() for a, b in itertools.pairwise(bounds)]
        return torch.cat(found), torch.tensor([0, *map(len, found)]).cumsum(0)

    def mask(self, kind: str) -> Tensor:
        """bool [N, V], the candidates of each position."""
        ids, offsets = self.unions if kind == "documents" else (self.ids, self.offsets)
        mask_GV = torch.zeros(len(offsets) - 1, len(self.weight), dtype=torch.bool)
        mask_GV[torch.arange(len(mask_GV)).repeat_interleave(offsets.diff()), ids.long()] = True
        if kind == "documents":
            return mask_GV.repeat_interleave(self.starts.diff(), 0)
        return mask_GV if kind == "sets" else torch.ones_like(mask_GV)

    def pairs(self, kind: str) -> int:
        if kind == "full":
            return len(self.hidden) * len(self.weight)
        sizes = (self.unions[1].diff() * self.starts.diff()) if kind == "documents" else None
        return len(self.ids) if sizes is None else int(sizes.sum())


def make_batch(regime: str, positions: int, hidden_size: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, LARGEST_SET + 1, (positions,), generator=generator)
    log_p_V = -torch.log(torch.randperm(VOCAB_SIZE, generator=generator) + 3.0)
    if regime == "uniform":
        log_p_V.zero_()
    sets = []
    for size in sizes.tolist():  # without replacement: the largest of log p + Gumbel noise
        noise_V = torch.rand(VOCAB_SIZE, generator=generator).log_().neg_().log_()
        sets.append((log_p_V - noise_V).topk(size).indices.sort().values.int())
    ids, offsets = torch.cat(sets), torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    places = (torch.rand(positions, generator=generator) * sizes).long()
    starts = torch.tensor([*range(0, positions, DOCUMENT), positions])
    hidden_NH = torch.randn(positions, hidden_size, generator=generator)
    weight_VH = torch.randn(VOCAB_SIZE, hidden_size, generator=generator) * 0.02
    operands = hidden_NH, weight_VH, torch.zeros_like(weight_VH), ids, offsets
    labels = ids[offsets[:-1] + places].long()
    return Batch(*(x.to(device) for x in (*operands, labels)), starts)


@dataclass(frozen=True)
class Contender:
    """A row of the table; ``kind``: sets by position ("sets") or document, or all ids ("full")."""

    name: str
    make: Callable[[Batch], Pass]
    kind: str = "sets"
    bf16: bool = False
    why_not: str | None = None


def ours(backend: str, *, documents: bool = False, **options: Any) -> Callable[[Batch], Pass]:
    """``main_grad=False`` leaves a dense gradient of the weight to autograd."""
    main_grad = options.pop("main_grad", True)

    def make(batch: Batch) -> Pass:
        chosen = HEAD.choose(backend, batch.weight)
        ids, offsets = batch.unions if documents else (batch.ids, batch.offsets)

        def run() -> None:
            batch.clear()
            restricted_cross_entropy(
                batch.hidden, batch.weight, ids, offsets, batch.labels, backend=chosen,
                group_offsets=batch.starts if documents else None,
                weight_grad_out=batch.weight_grad if main_grad else None, **options,
            ).sum().backward()  # fmt: skip

        return run

    return make


def by_autograd(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Batch], Pass]:
    """``loss`` returns a sum of losses from hidden states, weight and labels."""

    def make(batch: Batch) -> Pass:
        def run() -> None:
            batch.clear()
            loss(batch.hidden, batch.weight, batch.labels).backward()

        return run

    return make


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(linear(hidden, weight).float(), labels, reduction="sum")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """In one chunk: "auto" took 3 to 5 times as long. Without options it is ``plain``."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=len(hidden))
    return torch.nn.functional.linear_cross_entropy(
        hidden, weight, labels, reduction="sum", options=options
    )


def megatron(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return vocab_parallel_cross_entropy(linear(hidden, weight)[:, None], labels[:, None]).sum()


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    module = importlib.import_module("liger_kernel.transformers")
    loss = module.LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return loss(weight, hidden, labels)  # type: ignore[no-any-return]


def cut_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    module = importlib.import_module("cut_cross_entropy")
    return module.linear_cross_entropy(hidden, weight, labels, reduction="sum")


def gather_and_bmm(batch: Batch) -> Pass:
    """Rows gathered and padded to the largest set, a batched product, dW by index_add_."""
    sizes_N = batch.offsets.diff()
    valid_NK = torch.arange(int(sizes_N.max()), device=sizes_N.device) < sizes_N[:, None]
    ids_NK = batch.ids.new_zeros(valid_NK.shape).masked_scatter_(valid_NK, batch.ids).long()
    label_NK = (ids_NK == batch.labels[:, None]) & valid_NK
    weight_VH = batch.weight.detach()

    def run() -> None:
        batch.clear()
        dH_NH = torch.empty_like(batch.hidden, requires_grad=False)
        for first in range(0, len(dH_NH), GATHERED):
            at = slice(first, first + GATHERED)
            hidden_nH = batch.hidden.detach()[at]
            rows_nKH = weight_VH[ids_NK[at]]
            z_nK = torch.bmm(rows_nKH, hidden_nH[:, :, None]).squeeze(2)
            slope_nK = z_nK.masked_fill_(~valid_NK[at], -torch.inf).softmax(1)
            slope_nK -= label_NK[at].float()
            dH_NH[at] = torch.bmm(slope_nK[:, None], rows_nKH).squeeze(1)
            dW_nKH = torch.mul(slope_nK[:, :, None], hidden_nH[:, None], out=rows_nKH)
            batch.weight_grad.index_add_(0, ids_NK[at].flatten(), dW_nKH.flatten(0, 1))
        batch.hidden.grad = dH_NH

    return run


def contenders(device: torch.device) -> list[Contender]:
    like = torch.empty(0, device=device)
    best = HEAD.best(like) or "union"
    mine = functools.partial(Contender, why_not=HEAD.why_not(best, like))

    def foreign(name: str, package: str, loss: Any) -> Contender:
        why_not = "needs CUDA; not run" if device.type == "cpu" else None
        if not why_not and importlib.util.find_spec(package) is None:
            why_not = "not installed"
        return Contender(name, by_autograd(loss), "full", bf16=True, why_not=why_not)

    return [
        mine(f"{best} backend", ours(best, validate=False)),
        mine(f"{best}, sets validated too", ours(best)),
        mine(f"{best}, no main_grad: dense gradient", ours(best, main_grad=False)),
        mine(f"{best}, bf16 operands", ours(best, validate=False), bf16=True),
        mine(f"{best}, documents' unions", ours(best, documents=True), "documents"),
        Contender("union backend: union-GEMM in torch", ours("union", validate=False)),
        Contender("torch gather + bmm, padded", gather_and_bmm),
        Contender("F.linear + F.cross_entropy", by_autograd(plain), "full"),
        Contender("F.linear + F.cross_entropy, bf16", by_autograd(plain), "full", bf16=True),
        Contender("F.linear_cross_entropy, one chunk", by_autograd(linear_cross_entropy), "full"),
        Contender("megatron-core vocab-parallel", by_autograd(megatron), "full"),
        foreign("Liger fused linear CE", "liger_kernel", liger),
        foreign("cut-cross-entropy", "cut_cross_entropy", cut_cross_entropy),
    ]


def gradient_error(contender: Contender, batch: Batch) -> float:
    """Run once on clean gradients and compare with float64, the vocabulary in blocks."""
    batch.clear()
    batch.weight_grad.zero_()
    contender.make(batch)()
    dense = batch.weight_grad if batch.weight.grad is None else batch.weight.grad
    hidden_NH, mask_NV = batch.hidden.detach().double(), batch.mask(contender.kind)
    blocks = [block.double() for block in batch.weight.detach().split(1 << 13)]
    z_NV = torch.cat([hidden_NH @ block.T for block in blocks], 1)
    slope_NV = z_NV.masked_fill_(~mask_NV, -torch.inf).softmax(1)
    slope_NV[torch.arange(len(slope_NV)), batch.labels] -= 1
    slopes = slope_NV.split(1 << 13, 1)
    exact_NH = torch.stack([a @ b for a, b in zip(slopes, blocks, strict=True)]).sum(0)
    rows = batch.ids.unique().long()
    assert batch.hidden.grad is not None
    found = (batch.hidden.grad, exact_NH), (dense[rows], slope_NV[:, rows].T @ hidden_NH)
    error = max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in found)
    batch.clear()
    if not error <= (TOLERANCE_BF16 if contender.bf16 else TOLERANCE):
        raise SystemExit(f"error: wrong gradients: {contender.name} is {error:.1e} off")
    return error


HEADING = f"{'':40}{'ms':>10}{'x':>9}{'least':>10}{'x':>9}{'sgemm':>7}{'error':>8}"


def run_and_clear(run: Pass, batch: Batch) -> None:
    """Keeps no dense gradient, which would leave the next pass without memory."""
    run()
    batch.clear()


def table(chosen: Sequence[Contender], batch: Batch, *, slice_: int, rounds: int) -> None:
    """Times the first contender, ours, in turn with the others and with a matrix product."""
    a, b = torch.randn(2, SGEMM_SIZE, SGEMM_SIZE, device=batch.hidden.device)
    work: dict[str, Pass] = {SGEMM: lambda: torch.mm(a, b)}
    few, N, errors = batch.first(FEW), len(batch.hidden), {}
    rounded = batch
    if any(c.bf16 and not c.why_not for c in chosen):
        bf16 = {"hidden": batch.hidden.bfloat16(), "weight": batch.weight.bfloat16()}
        rounded = replace(batch, **bf16)
    for c in chosen:
        if c.why_not:
            continue
        operands = rounded if c.bf16 else batch
        errors[c.name] = gradient_error(c, operands.first(FEW))
        full = c.kind == "full"
        parts = {c.name: operands.first(slice_) if full else operands}
        if full and slice_ < N:
            parts[c.name + SGEMM] = operands.first(FEW)
        for name, part in parts.items():
            work[name] = functools.partial(run_and_clear, c.make(part), part)
    times = interleave(work, rounds=rounds, each=1, device=few.hidden.device)
    rate = 2 * SGEMM_SIZE**3 / times[SGEMM].least
    print(f"sgemm {rate:.1f} GFLOP/s, {rounds} rounds\n{HEADING}")
    first = times[chosen[0].name]
    for c in chosen:
        if c.why_not:
            print(f"{c.name:40}{c.why_not}")
            continue
        found, note = times[c.name], ""
        if c.name + SGEMM in times:
            more, note = (N - slice_) / (slice_ - FEW), f"  of {slice_}"
            both = zip(found.values, times[c.name + SGEMM].values, strict=True)
            found = Times([part + more * (part - short) for part, short in both])
        flops = 6 * batch.pairs(c.kind) * batch.hidden.shape[1]
        print(
            f"{c.name:40}{found.median / 1e6:10.2f}{found.median / first.median:9.2f}"
            f"{found.least / 1e6:10.2f}{found.least / first.least:9.2f}"
            f"{100 * flops / found.least / rate:5.0f} %{errors[c.name]:8.0e}{note}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024, 2560])
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--regimes", nargs="+", default=["zipf", "uniform"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full-rounds", type=int, default=2, help="of full softmaxes")
    parser.add_argument("--slice", type=int, default=256, help="positions of a full softmax")
    parser.add_argument("--only", default="", help="contenders whose name has this in it")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options = parser.parse_args()
    select("cpu").prepare()
    from megatron_replay.parallel import initialize  # after prepare()

    os.environ.setdefault("RANK", "0")
    initialize(ParallelConfig(), select("cpu"))
    print(f"{machine(options.device)}; torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    for threads, H in itertools.product(options.threads, options.hidden):
        torch.set_num_threads(threads)
        needed = VOCAB_SIZE * H * (4 + 4 + 2 + 4 + 8) + (2 << 30)
        if needed > available_bytes():
            raise SystemExit(f"error: H {H} takes {needed >> 30} GiB; choose others with --hidden")
        for regime in options.regimes:
            batch = make_batch(regime, options.positions, H, options.device)
            every = contenders(options.device)
            chosen = [c for c in every if c is every[0] or options.only in c.name]
            print(f"\n(H, V) = ({H}, {VOCAB_SIZE:,}), N {options.positions}, threads {threads}")
            sizes = batch.offsets.diff().double()
            print(
                f"{regime} sets: |S| mean {sizes.mean():.1f}; {len(batch.ids.unique()):,} distinct "
                f"ids in {len(batch.ids):,} pairs"
            )
            small = [c for c in chosen if c.kind != "full"]
            slice_ = min(options.slice, options.positions)
            table(small, batch, slice_=slice_, rounds=options.rounds)
            if regime == options.regimes[0]:  # a full softmax does not depend on the sets
                full = [every[0], *(c for c in chosen if c.kind == "full")]
                table(full, batch, slice_=slice_, rounds=options.full_rounds)


if __name__ == "__main__":
    main()
