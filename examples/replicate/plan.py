"""The runs of the study: each has a base, a store, a loss, an optimizer, a learning rate, a seed.

Methods have the paper's names: "Dyn. Top-K" is Stage 1 on the candidate sets with AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

DOMAINS = ("tables", "joins", "protocols")
#: The learning rate of all tables but the sweeps.
LR = 2e-4
#: Rates of the sweeps on one domain. MoClip moves the weights less than AdamW at the same rate.
ADAMW_RATES, MOCLIP_RATES = (2e-4, 4e-4, 8e-4), (4e-4, 8e-4, 1.6e-3)
#: Of full softmax with AdamW as well: what forgets less must be compared with a lower rate.
LOW_RATE = 1e-4
#: The rate of the first is computed: AdamW then moves the weights as far as the second does.
MATCHED, MATCHED_TO = "AdamW, matched", "Dyn. Top-K + MoClip"


@dataclass(frozen=True, kw_only=True)
class Store:
    """One run of Stage 0: a base on one domain, or on all three."""

    base: str
    size: str
    domain: str = "all"
    strategy: str = "bucket"
    coverage: float = 0.95
    logits: bool = False

    @property
    def setting(self) -> str:
        """Base and domain: runs are compared only where both are the same."""
        return self.base if self.domain == "all" else f"{self.base}, {self.domain}"

    @property
    def name(self) -> str:
        """The name of its directory."""
        name = f"{self.base}-{self.size}-{self.domain}-{self.strategy}-{self.coverage}"
        return name + ("-logits" if self.logits else "")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One fine-tuning, and its evaluation.

    Attributes:
        method: its name in the tables.
        tables: which tables list it.
        variant: what an ablation changes.
        loss, optimizer: further flags of Stage 1.
        lr: None for the matched rate.
    """

    method: str
    store: Store
    loss: tuple[str, ...]
    optimizer: tuple[str, ...]
    seed: int
    tables: tuple[str, ...]
    lr: float | None = LR
    variant: str = ""

    @property
    def name(self) -> str:
        """Distinct for distinct runs; the name of its directory."""
        rate = "matched" if self.lr is None else f"{self.lr:g}"
        flags = "-".join(flag.lstrip("-") for flag in (*self.loss, *self.optimizer))
        return f"{self.store.name}/{flags}/lr{rate}-seed{self.seed}"


FULL, REPLAY = ("--loss", "full"), ("--loss", "restricted")
DOCUMENT = (*REPLAY, "--candidate-scope", "document")
GHOST, KL = ("--tail", "ghost"), ("--kl-weight", "0.5")
DOCUMENT_GHOST = (*DOCUMENT, *GHOST)
DIVERGENCE = "document + ghost + KL 0.5"


def optimizer(name: str, *flags: str) -> tuple[str, ...]:
    """The flags that choose an optimizer."""
    return ("--optimizer", name, *flags)


ADAMW, MOCLIP = optimizer("adamw"), optimizer("moclip")
#: The methods of the paper's tables: flags of the loss, of the optimizer, and further rates.
METHODS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[float, ...]]] = {
    "AdamW (SFT)": (FULL, ADAMW, (1e-4, 4e-4)),
    MATCHED: (FULL, ADAMW, ()),  # each seed has a rate of its own, so there is no curve
    "MoClip (SFT)": (FULL, MOCLIP, (4e-4, 8e-4)),
    "MoFO": (FULL, optimizer("mofo"), (4e-4, 8e-4)),
    "TAM": (FULL, optimizer("tam"), (4e-4, 8e-4)),
    "AdaMuon": (FULL, optimizer("adamuon"), (4e-4, 8e-4)),
    "MuonClip": (FULL, optimizer("muonclip"), (4e-4, 8e-4)),
    "Dyn. Top-K": (REPLAY, ADAMW, (1e-4, 4e-4)),
    MATCHED_TO: (REPLAY, MOCLIP, (8e-4, 1.6e-3)),
    "Dyn. Top-K, document + ghost": (DOCUMENT_GHOST, ADAMW, (1e-4, 4e-4)),
}
REMEDIES = {
    "full softmax": FULL,
    "position (the paper's)": REPLAY,
    "position + ghost": (*REPLAY, *GHOST),
    "document": DOCUMENT,
    "document + ghost": DOCUMENT_GHOST,
    "position + KL 0.5": (*REPLAY, *KL),
    DIVERGENCE: (*DOCUMENT_GHOST, *KL),
}
#: Further weights of the divergence; heavier ones move less, so they get a higher rate.
KL_RATES = {"0.25": ADAMW_RATES, "0.5": (1.6e-3,), "1": (4e-4, 8e-4, 1.6e-3), "2": (8e-4, 1.6e-3)}


def at_rates(rates: Iterable[float], **run: Any) -> Iterator[Run]:
    """The same run at several learning rates, for the sweeps."""
    return (Run(lr=lr, tables=("sweep",), **run) for lr in rates)


def methods(base: str, seed: int) -> Iterator[Run]:
    """The paper's tables 1 to 3 and 6."""
    store = Store(base=base, size="small")
    for method, (loss, optim, _) in METHODS.items():
        tables: tuple[str, ...] = ("methods",) if method == MATCHED else ("methods", "sweep")
        if method == MATCHED_TO:
            tables += ("positions", "angles", "coverage")
        lr = None if method == MATCHED else LR
        yield Run(
            method=method, store=store, loss=loss, optimizer=optim, seed=seed, lr=lr, tables=tables
        )


def pareto(seed: int) -> Iterator[Run]:
    """Every method of the tables at other rates, and the remedy with the best optimizer of them."""
    store = Store(base="competent", size="small")
    muon = METHODS["MuonClip"][1:]
    swept = {**METHODS, "document + ghost, MuonClip": (DOCUMENT_GHOST, muon[0], (LR, *muon[1]))}
    for method, (loss, optim, rates) in swept.items():
        yield from at_rates(
            rates, method=method, store=store, loss=loss, optimizer=optim, seed=seed
        )


def ablations(base: str, seed: int) -> Iterator[Run]:
    """The paper's tables 4 and 5, and the coverage τ; the run in their middle is in `methods`."""
    store = Store(base=base, size="small")
    ours = Run(method=MATCHED_TO, store=store, loss=REPLAY, optimizer=MOCLIP, seed=seed, tables=())
    for strategy in ("random", "last-token", "all"):
        other = replace(store, strategy=strategy)
        yield replace(ours, store=other, tables=("positions",), variant=strategy)
    for angle in ("30", "60", "90"):
        other_rule = optimizer("moclip", "--max-angle", angle)
        yield replace(ours, optimizer=other_rule, tables=("angles",), variant=angle)
    for coverage in (0.8, 0.99, 0.999):
        other = replace(store, coverage=coverage)
        yield replace(ours, store=other, tables=("coverage",), variant=str(coverage))


def remedies(base: str, seed: int) -> Iterator[Run]:
    """Every remedy at one rate, on every answer position of all domains, with AdamW."""
    store = Store(base=base, size="small", strategy="all", logits=True)
    for method, loss in REMEDIES.items():
        tables = ("remedies", "sweep") if method == DIVERGENCE else ("remedies",)
        yield Run(method=method, store=store, loss=loss, optimizer=ADAMW, seed=seed, tables=tables)


def sweep(store: Store, seed: int, *, moclip: bool = False) -> Iterator[Run]:
    """Losses over learning rates, so that a curve is compared with a curve.

    The paper's loss at the middle rate only: where it falls short, no rate helps.
    """
    rates = MOCLIP_RATES if moclip else ADAMW_RATES
    swept = {
        "full softmax": rates if moclip else (LOW_RATE, *rates),
        "document + ghost": rates,
        "position (the paper's)": rates[1:2],
    }
    for method, its_rates in swept.items():
        yield from at_rates(
            its_rates, method=f"{method}, MoClip" if moclip else method, store=store,
            loss=REMEDIES[method], optimizer=MOCLIP if moclip else ADAMW, seed=seed,
        )  # fmt: skip


def divergence(store: Store, seed: int) -> Iterator[Run]:
    """The remedy that kept most, over learning rates."""
    for run in at_rates(
        ADAMW_RATES, method=DIVERGENCE, store=replace(store, logits=True),
        loss=REMEDIES[DIVERGENCE], optimizer=ADAMW, seed=seed,
    ):  # fmt: skip
        # One of them is a line of the remedies, too.
        is_remedy = (store.domain, run.lr) == ("all", LR)
        yield replace(run, tables=("remedies", "sweep")) if is_remedy else run


def weights(store: Store, seed: int) -> Iterator[Run]:
    """The weight of the divergence, each over learning rates."""
    for weight, rates in KL_RATES.items():
        yield from at_rates(
            rates, method=f"document + ghost + KL {weight}", store=replace(store, logits=True),
            loss=(*DOCUMENT_GHOST, "--kl-weight", weight), optimizer=ADAMW, seed=seed,
        )  # fmt: skip


def matching(run: Run) -> tuple[Run, Run]:
    """The two runs that a matched rate is computed from: AdamW, and the one it is matched to."""
    moving, target = (
        replace(run, method=name, loss=METHODS[name][0], optimizer=METHODS[name][1], lr=LR)
        for name in ("AdamW (SFT)", MATCHED_TO)
    )
    return moving, target


def plan(name: str, only: Sequence[str] = ("*",)) -> list[Run]:
    """The runs of a plan, each once, the most important ones first.

    Args:
        name: "quick", "paper" or "evidence".
        only: patterns of run names, as a shell's; the runs that these need are added.

    Raises:
        KeyError: no such plan.
    """
    runs = list(dict.fromkeys(PLANS[name]()))
    wanted = {run.name for run in runs if any(fnmatchcase(run.name, one) for one in only)}
    matched = [run for run in runs if run.lr is None and run.name in wanted]
    wanted |= {needed.name for run in matched for needed in matching(run)}
    return [run for run in runs if run.name in wanted]


def _quick() -> Iterator[Run]:
    """One base, one seed."""
    yield from methods("competent", 0)
    yield from ablations("competent", 0)


def _paper() -> Iterator[Run]:
    """Three seeds; the ablations on the base that the method is meant for."""
    for seed in range(3):
        yield from methods("competent", seed)
        yield from methods("ignorant", seed)
        yield from ablations("competent", seed)


def _evidence() -> Iterator[Run]:
    """The most important runs first, seed by seed, so that it may be stopped at any moment.

    Neither base has read the modules that "protocols" is about: one of them is enough there.
    """
    seeds, bases = range(5), ("competent", "ignorant")
    settings = [
        Store(base=base, size="small", domain=domain, strategy="all")
        for base, domain in product(bases, DOMAINS)
        if (base, domain) != ("ignorant", "protocols")
    ]
    together = Store(base="competent", size="small", strategy="all")
    for seed, setting in product(seeds, settings):
        yield from sweep(setting, seed)
    for seed, setting in product(seeds, (*settings, together)):
        yield from divergence(setting, seed)
    for seed, setting in product(seeds, settings):
        large = replace(setting, size="large")
        yield from sweep(large, seed)
        yield from divergence(large, seed)
    for seed in range(3):
        yield from pareto(seed)
        yield from weights(together, seed)
    for seed, base in product(seeds, bases):
        yield from remedies(base, seed)
    for seed, setting in product(seeds, settings):
        yield from sweep(setting, seed, moclip=True)
    for seed in seeds:
        yield from sweep(replace(together, size="large", domain="joins"), seed, moclip=True)


PLANS = {"quick": _quick, "paper": _paper, "evidence": _evidence}
