"""Which runs the study is made of: each a base, a store, a loss, an optimizer, a seed.

Names of methods are the paper's. "Dyn. Top-K" is Stage 1 on the candidate sets with AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import product

DOMAINS = ("tables", "joins", "protocols")
#: AdamW's learning rate in all tables but the sweeps.
LR = 2e-4
#: Rates of the sweeps, on one domain each, so of fewer steps. MoClip moves less at the same rate.
ADAMW_RATES = (2e-4, 4e-4, 8e-4)
MOCLIP_RATES = (4e-4, 8e-4, 1.6e-3)
#: Of full softmax with AdamW as well: what forgets less must be compared with a lower rate.
LOW_RATE = 1e-4
#: The rate of this method is found: at which AdamW moves the weights as far as the paper's recipe.
MATCHED, MATCHED_TO = "AdamW, matched", "Dyn. Top-K + MoClip"


@dataclass(frozen=True, kw_only=True)
class Store:
    """A run of Stage 0: a base on one domain, or all three."""

    base: str
    size: str
    domain: str = "all"
    strategy: str = "bucket"
    coverage: float = 0.95
    logits: bool = False

    @property
    def setting(self) -> str:
        """What runs must share to be compared."""
        return self.base if self.domain == "all" else f"{self.base}, {self.domain}"

    @property
    def name(self) -> str:
        """Its directory's name."""
        name = f"{self.base}-{self.size}-{self.domain}-{self.strategy}-{self.coverage}"
        return name + ("-logits" if self.logits else "")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One fine-tuning, evaluated.

    Attributes:
        method: as in the tables.
        tables: which of them it belongs to.
        variant: what differs within a table.
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
        """Distinct for distinct runs, and a good name of a directory."""
        rate = "matched" if self.lr is None else f"{self.lr:g}"
        flags = "-".join(flag.lstrip("-") for flag in (*self.loss, *self.optimizer))
        return f"{self.store.name}/{flags}/lr{rate}-seed{self.seed}"


FULL = ("--loss", "full")
REPLAY = ("--loss", "restricted")
SCOPE = {scope: (*REPLAY, "--candidate-scope", scope) for scope in ("document",)}
GHOST = ("--tail", "ghost")
DOCUMENT_GHOST = (*SCOPE["document"], *GHOST)
KL = ("--kl-weight", "0.5")


def optimizer(name: str, *flags: str) -> tuple[str, ...]:
    """Flags that choose one."""
    return ("--optimizer", name, *flags)


ADAMW, MOCLIP = optimizer("adamw"), optimizer("moclip")
METHODS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "AdamW (SFT)": (FULL, ADAMW),
    MATCHED: (FULL, ADAMW),
    "MoClip (SFT)": (FULL, MOCLIP),
    "MoFO": (FULL, optimizer("mofo")),
    "TAM": (FULL, optimizer("tam")),
    "AdaMuon": (FULL, optimizer("adamuon")),
    "MuonClip": (FULL, optimizer("muonclip")),
    "Dyn. Top-K": (REPLAY, ADAMW),
    MATCHED_TO: (REPLAY, MOCLIP),
    "Dyn. Top-K, document + ghost": (DOCUMENT_GHOST, ADAMW),
}


def _tables_of(method: str) -> tuple[str, ...]:
    if method == MATCHED:  # each seed has a rate of its own: no curve
        return ("methods",)
    ours = ("positions", "angles", "coverage") if method == MATCHED_TO else ()
    return ("methods", "sweep", *ours)


def methods(base: str, size: str, seeds: Iterable[int]) -> Iterator[Run]:
    """The paper's tables 1 to 3 and 6, seed by seed."""
    store = Store(base=base, size=size)
    for seed, (method, (loss, optim)) in product(seeds, METHODS.items()):
        yield Run(
            method=method, store=store, loss=loss, optimizer=optim, seed=seed,
            lr=None if method == MATCHED else LR,
            tables=_tables_of(method),
        )  # fmt: skip


#: Further rates of each method: those that move little at `LR` get higher ones.
PARETO_RATES: dict[str, tuple[float, float]] = dict.fromkeys(METHODS, (0.0004, 0.0008))
for _name in ("AdamW (SFT)", "Dyn. Top-K", "Dyn. Top-K, document + ghost"):
    PARETO_RATES[_name] = (1e-4, 4e-4)
PARETO_RATES[MATCHED_TO] = (8e-4, 1.6e-3)


def pareto(seeds: Iterable[int]) -> Iterator[Run]:
    """Every method of the tables at other rates, and the remedy with the best optimizer of them."""
    store = Store(base="competent", size="small")
    muon = optimizer("muonclip")
    for seed in seeds:
        for method, (loss, optim) in METHODS.items():
            for lr in PARETO_RATES[method] if method != MATCHED else ():
                yield Run(
                    method=method, store=store, loss=loss, optimizer=optim, seed=seed, lr=lr,
                    tables=("sweep",),
                )  # fmt: skip
        for lr in (LR, *PARETO_RATES["MuonClip"]):
            yield Run(
                method="document + ghost, MuonClip", store=store, loss=DOCUMENT_GHOST,
                optimizer=muon, seed=seed, lr=lr, tables=("sweep",),
            )  # fmt: skip


def ablations(base: str, size: str, seeds: Iterable[int]) -> Iterator[Run]:
    """The paper's tables 4 and 5, and the coverage tau; their middle is in `methods`."""
    store = Store(base=base, size=size)
    for seed in seeds:
        ours = Run(
            method=MATCHED_TO, store=store, loss=REPLAY, optimizer=MOCLIP, seed=seed, tables=()
        )
        for strategy in ("random", "last-token", "all"):
            yield replace(
                ours, store=replace(store, strategy=strategy), tables=("positions",),
                variant=strategy,
            )  # fmt: skip
        for angle in (30, 60, 90):
            yield replace(
                ours, optimizer=optimizer("moclip", "--max-angle", str(angle)),
                tables=("angles",), variant=str(angle),
            )  # fmt: skip
        for coverage in (0.8, 0.99, 0.999):
            yield replace(
                ours, store=replace(store, coverage=coverage), tables=("coverage",),
                variant=str(coverage),
            )  # fmt: skip


REMEDIES = {
    "full softmax": FULL,
    "position (the paper's)": REPLAY,
    "position + ghost": (*REPLAY, *GHOST),
    "document": SCOPE["document"],
    "document + ghost": DOCUMENT_GHOST,
    "position + KL 0.5": (*REPLAY, *KL),
    "document + ghost + KL 0.5": (*DOCUMENT_GHOST, *KL),
}


#: The one remedy that is swept on all domains together.
SWEPT_ON_ALL = REMEDIES["document + ghost + KL 0.5"]


def remedies(base: str, seeds: Iterable[int]) -> Iterator[Run]:
    """Every remedy at one rate, on every answer position of all domains, with AdamW."""
    store = Store(base=base, size="small", strategy="all", logits=True)
    for seed, (method, loss) in product(seeds, REMEDIES.items()):
        yield Run(
            method=method, store=store, loss=loss, optimizer=ADAMW, seed=seed,
            tables=("remedies", "sweep") if loss == SWEPT_ON_ALL else ("remedies",),
        )  # fmt: skip


def sweep(store: Store, seed: int, *, moclip: bool = False) -> Iterator[Run]:
    """Losses over learning rates, so that a curve is compared with a curve.

    The paper's at the middle one only: where it falls short, no rate mends it (docs/evidence.md).
    """
    rates = MOCLIP_RATES if moclip else ADAMW_RATES
    swept = {
        "full softmax": rates if moclip else (LOW_RATE, *rates),
        "document + ghost": rates,
        "position (the paper's)": rates[1:2],
    }
    for method, of_method in swept.items():
        for lr in of_method:
            yield Run(
                method=f"{method}, MoClip" if moclip else method, store=store,
                loss=REMEDIES[method], optimizer=MOCLIP if moclip else ADAMW, seed=seed, lr=lr,
                tables=("sweep",),
            )  # fmt: skip


def divergence(store: Store, seed: int) -> Iterator[Run]:
    """The remedy that kept most, over learning rates."""
    for lr in ADAMW_RATES:
        yield Run(
            method="document + ghost + KL 0.5", store=replace(store, logits=True),
            loss=SWEPT_ON_ALL, optimizer=ADAMW, seed=seed, lr=lr,
            # One of them is a remedy of the table at one rate.
            tables=("remedies", "sweep") if (store.domain, lr) == ("all", LR) else ("sweep",),
        )  # fmt: skip


#: Further weights of the divergence; heavier ones move less, so they get a higher rate.
KL_RATES = {"0.25": ADAMW_RATES, "0.5": (1.6e-3,), "1": (4e-4, 8e-4, 1.6e-3), "2": (8e-4, 1.6e-3)}


def weights(store: Store, seed: int) -> Iterator[Run]:
    """The weight of the divergence, each over learning rates."""
    for weight, rates in KL_RATES.items():
        for lr in rates:
            yield Run(
                method=f"document + ghost + KL {weight}", store=replace(store, logits=True),
                loss=(*DOCUMENT_GHOST, "--kl-weight", weight), optimizer=ADAMW, seed=seed, lr=lr,
                tables=("sweep",),
            )  # fmt: skip


def matching(run: Run) -> tuple[Run, Run]:
    """The two runs that a matched rate is found from: AdamW, and what it is to move like."""
    moving, target = (
        replace(run, method=name, loss=METHODS[name][0], optimizer=METHODS[name][1], lr=LR)
        for name in ("AdamW (SFT)", MATCHED_TO)
    )
    return moving, target


def plan(name: str, only: Sequence[str] = ("*",)) -> list[Run]:
    """The runs of a plan, each once, what matters most first.

    Args:
        name: "quick", "paper" or "evidence".
        only: patterns of names of runs, as a shell's; those that these need come with them.

    Raises:
        KeyError: no such plan.
    """
    runs = list(dict.fromkeys(PLANS[name]()))
    wanted = {run.name for run in runs if any(fnmatchcase(run.name, one) for one in only)}
    wanted |= {
        needed.name
        for run in runs
        if run.lr is None and run.name in wanted
        for needed in matching(run)
    }
    return [run for run in runs if run.name in wanted]


def _quick() -> Iterator[Run]:
    """One base, one seed."""
    yield from methods("competent", "small", [0])
    yield from ablations("competent", "small", [0])


def _paper() -> Iterator[Run]:
    """Ablations on the base that the method is meant for."""
    for seed in range(3):
        yield from methods("competent", "small", [seed])
        yield from methods("ignorant", "small", [seed])
        yield from ablations("competent", "small", [seed])


def _evidence() -> Iterator[Run]:
    """What matters most first, seed by seed, so that it may be stopped at any moment.

    Neither base has read the modules that "protocols" is of: one of them is enough there.
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
    yield from pareto(range(3))
    for seed in range(3):
        yield from weights(together, seed)
    for seed, base in product(seeds, bases):
        yield from remedies(base, [seed])
    for seed, setting in product(seeds, settings):
        yield from sweep(setting, seed, moclip=True)
    larger = replace(together, size="large", domain="joins")
    for seed in seeds:
        yield from sweep(larger, seed, moclip=True)


PLANS = {"quick": _quick, "paper": _paper, "evidence": _evidence}
