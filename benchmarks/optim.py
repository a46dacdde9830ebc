"""What an optimizer's step costs, per parameter, beside its peers: python -m benchmarks.optim

Contenders step the same parameters, gradients and, under AdamW's names, moments: where a tensor
happens to lie in memory changes the speed by a quarter. A row's bytes are those that its passes
must move per parameter if no cache helps; "bf16" rows also write the model's weights. Times are the
median and the least of the rounds, "x" is each over that of torch's fused AdamW with the gradient's
norm, GB/s is of the least.

Muon-like rules multiply matrices and are orders of magnitude slower: they step one layer, in few
rounds.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytorch_optimizer
import torch
from torch import Tensor

from benchmarks.timing import Times, interleave, machine
from megatron_replay.optim import MoClip
from megatron_replay.optim.momentum_step import OPTIMIZER, Coefficients

HIDDEN, FFN = 1024, 2816
LAYER = [(HIDDEN,), *[(HIDDEN, HIDDEN)] * 4, (HIDDEN,), *[(FFN, HIDDEN)] * 2, (HIDDEN, FFN)]
BASELINE = "torch AdamW(fused) + norm"
Step = Callable[[], object]


@dataclass
class Model:
    """Parameters with gradients and moments, in the shapes of a transformer's layers."""

    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]

    @property
    def grads(self) -> list[Tensor]:
        return [param.grad for param in self.params if param.grad is not None]

    @property
    def numel(self) -> int:
        return sum(param.numel() for param in self.params)


def make_model(numel: int, device: torch.device) -> Model:
    """Layer after layer, until there are ``numel`` parameters; the last tensor is cut."""
    generator = torch.Generator(device).manual_seed(0)
    params: list[Tensor] = []
    while numel > 0:
        for shape in LAYER:
            rows = min(shape[0], numel // torch.Size(shape[1:]).numel())
            if rows == 0:
                numel = 0
                break
            size = (rows, *shape[1:])
            param = torch.randn(size, generator=generator, device=device).mul_(0.02)
            param.requires_grad_().grad = torch.randn(size, generator=generator, device=device)
            params.append(param)
            numel -= param.numel()
    moments = ([torch.zeros_like(p, requires_grad=False) for p in params] for _ in range(2))
    return Model(params, *moments)


@dataclass(frozen=True)
class Contender:
    """A row of the table: ``make`` prepares the states and returns one step."""

    name: str
    bytes: int | None
    make: Callable[[Model], Step]
    multiplies_matrices: bool = False


def passes(form: str, *, bounded: bool, copies: bool = False) -> Callable[[Model], Step]:
    """Our two passes as they are, without an optimizer around them."""

    def make(model: Model) -> Step:
        kernels = OPTIMIZER.choose(form, model.params[0])
        params, grads = [param.detach() for param in model.params], model.grads
        m, v = model.exp_avgs, model.exp_avg_sqs
        copied = [param.bfloat16() for param in params] if copies else None
        packed = Coefficients(
            proceed=1.0, keep_m=0.9, take_g=0.1, clip=1.0, keep_v=0.95,
            take_v=0.05, scale_v=1.0, eps=1e-8, decay=0.9999, move=1e-6,
        ).pack(params[0])  # fmt: skip

        def step() -> None:
            if bounded:
                kernels.dot_products(m, grads)
            else:
                kernels.square_sums(grads)
            kernels.momentum_step(params, grads, m, v, packed, bounded=bounded, copies=copied)

        return step

    return make


def optimizer(cls: type, *, norm: bool, megatron: bool = False, **options: object):
    """An optimizer class; what surrounds it in Megatron are passes of their own: the gradient's
    norm, its clipping, the copy to the model's bf16 weights.
    """

    def make(model: Model) -> Step:
        stepper = cls(model.params, lr=1e-6, weight_decay=0.1, **options)
        stepper.step()  # creates the states
        for param, m, v in zip(model.params, model.exp_avgs, model.exp_avg_sqs, strict=True):
            state = stepper.state[param]
            state.update({k: x for k, x in (("exp_avg", m), ("exp_avg_sq", v)) if k in state})
        params, grads = [param.detach() for param in model.params], model.grads
        copies = [param.bfloat16() for param in params] if megatron else []

        def step() -> None:
            if norm:
                torch.nn.utils.get_total_norm(grads, foreach=True)
            if megatron:
                torch._foreach_mul_(grads, 1.0)
            stepper.step()
            if megatron:
                torch._foreach_copy_(copies, params)

        return step

    return make


def muon(cls: type) -> Callable[[Model], Step]:
    """Matrices by Newton and Schulz; norms by AdamW, as such optimizers are used."""

    def make(model: Model) -> Step:
        groups = [
            {"params": [p for p in model.params if (p.dim() == 2) is two], "use_muon": two}
            for two in (True, False)
        ]
        return cls(groups).step

    return make


def contenders(device: torch.device) -> list[Contender]:
    def copy(model: Model) -> Step:
        targets = [torch.empty_like(param) for param in model.params]
        return lambda: torch._foreach_copy_(targets, model.grads)

    norm_of = functools.partial(torch.nn.utils.get_total_norm, foreach=True)
    fast = OPTIMIZER.best(torch.empty(0, device=device))
    adamw, theirs = torch.optim.AdamW, pytorch_optimizer
    return [
        # The stream that all others are measured by: read 4 bytes, write 4.
        Contender("copy", 8, copy),
        Contender("gradient norm (foreach)", 4, lambda model: lambda: norm_of(model.grads)),
        Contender(BASELINE, 32, optimizer(adamw, norm=True, fused=True)),
        Contender(
            "torch AdamW(fused) + norm + clip + bf16", 46,
            optimizer(adamw, norm=True, megatron=True, fused=True),
        ),
        Contender("torch AdamW(foreach) + norm", None, optimizer(adamw, norm=True, foreach=True)),
        Contender(f"MoClip, {fast} passes", 36, passes(fast, bounded=True)),
        Contender(f"MoClip, {fast} passes + bf16", 38, passes(fast, bounded=True, copies=True)),
        Contender("MoClip, torch passes", None, passes("torch", bounded=True)),
        Contender("MoClip(...).step()", 36, optimizer(MoClip, norm=False)),
        Contender(f"AdamW, {fast} passes", 32, passes(fast, bounded=False)),
        Contender(f"AdamW, {fast} passes + bf16", 34, passes(fast, bounded=False, copies=True)),
        Contender("pytorch-optimizer StableAdamW", None, optimizer(theirs.StableAdamW, norm=False)),
        Contender("pytorch-optimizer TAM", None, optimizer(theirs.TAM, norm=False)),
        Contender("pytorch-optimizer AdaTAM", None, optimizer(theirs.AdaTAM, norm=False)),
        Contender(
            "pytorch-optimizer Prodigy(eps=None): atan2", None,
            optimizer(theirs.Prodigy, norm=False, eps=None),
        ),
        Contender("pytorch-optimizer Muon", None, muon(theirs.Muon), True),
        Contender("pytorch-optimizer AdaMuon", None, muon(theirs.AdaMuon), True),
    ]  # fmt: skip


HEADING = f"{'':46}{'B/param':>8}{'ns/param':>10}{'x':>7}{'least':>9}{'x':>7}{'GB/s':>7}"


def row(contender: Contender, times: Times, baseline: Times) -> str:
    moved, rate = "-", "-"
    if contender.bytes is not None:
        moved, rate = str(contender.bytes), f"{contender.bytes / times.least:.1f}"
    return (
        f"{contender.name:46}{moved:>8}"
        f"{times.median:10.3f}{times.median / baseline.median:7.2f}"
        f"{times.least:9.3f}{times.least / baseline.least:7.2f}{rate:>7}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numel", type=int, default=1 << 26, help="parameters")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=sorted({torch.get_num_threads(), 1})
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--only", default="", help="contenders whose name has this in it")
    options = parser.parse_args()
    device = options.device

    model = make_model(options.numel, device)
    print(f"{machine(device)}; torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    print(f"{model.numel:,} parameters in {len(model.params)} tensors, {options.rounds} rounds")
    fast = OPTIMIZER.best(model.params[0])
    assert fast is not None, device
    if reason := OPTIMIZER.why_not(fast, model.params[0]):
        raise SystemExit(f"error: no compiled kernels to measure: {reason}")
    kernels = importlib.import_module("megatron_replay.kernels._cpu") if fast == "cpu" else None
    print(f"{fast} kernels" + (f", level {kernels.level()}" if kernels else ""))
    rows = [c for c in contenders(device) if options.only in c.name or c.name == BASELINE]
    passing = [c for c in rows if not c.multiplies_matrices]
    multiplying = [c for c in rows if c.multiplies_matrices]
    layer = make_model(sum(torch.Size(shape).numel() for shape in LAYER), device)
    for threads in options.threads if device.type == "cpu" else [1]:
        torch.set_num_threads(threads)
        print(f"\n{threads} thread{'s' * (threads > 1)}\n{HEADING}")
        times: dict[str, Times] = {}
        for chosen, stepped, rounds in ((passing, model, options.rounds), (multiplying, layer, 3)):
            steps = {c.name: c.make(stepped) for c in chosen}
            times |= interleave(steps, rounds=rounds, each=stepped.numel, device=device)
            for c in chosen:
                print(row(c, times[c.name], times[BASELINE]), flush=True)


if __name__ == "__main__":
    main()
