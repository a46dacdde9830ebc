"""The runs of the study: each has a store, a loss, an optimizer, a learning rate, a seed.

Methods have the paper's names: "Dyn. Top-K" is Stage 1 on the candidate sets with AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from typing import NamedTuple

from examples.replicate.data import DATABASES

#: AdamW on the full softmax, which every method is compared with.
FULL = "full softmax"
#: The learning rates of every method, and more of full softmax, whose curve is the reference; and
#: the rate at which a method is tried first, and what is tried at one rate only.
RATES, FURTHER_RATES = (1e-4, 3e-4, 1e-3), (3e-5, 6e-4)
LR = 3e-4
#: α of ``(1 - α)·base + α·tuned``, for full softmax.
BLENDS = (0.3, 0.5, 0.7)


@dataclass(frozen=True, kw_only=True)
class Store:
    """One run of Stage 0, with the base's logits."""

    domain: str
    strategy: str = "all"
    coverage: float = 0.95

    @property
    def name(self) -> str:
        """The name of its directory."""
        return f"{self.domain}-{self.strategy}-{self.coverage:g}"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One fine-tuning, and its evaluation.

    Attributes:
        loss, optimizer: flags of Stage 1.
        blends: weights of the tuned model in averages with the base that are measured as well.
    """

    method: str
    store: Store
    loss: tuple[str, ...]
    optimizer: tuple[str, ...]
    lr: float
    seed: int
    blends: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """Distinct for distinct runs; the name of its directory."""
        flags = "-".join(flag.lstrip("-") for flag in (*self.loss, *self.optimizer))
        return f"{self.store.name}/{flags}/lr{self.lr:g}-seed{self.seed}"


class Cost(NamedTuple):
    """Core-minutes of a run's training, of one evaluation, and of the training with Muon."""

    training: float
    evaluation: float
    muon: float = 0.0


#: Core-minutes before the first run: the base's weights are healed, and the base is measured.
PREPARATION = 25.0
FULL_LOSS, REPLAY = ("--loss", "full"), ("--loss", "restricted")
DOCUMENT_GHOST = (*REPLAY, "--candidate-scope", "document", "--tail", "ghost")
ADAMW, MOCLIP = ("--optimizer", "adamw"), ("--optimizer", "moclip")
TOP_K, PAPER = "Dyn. Top-K", "Dyn. Top-K, MoClip"
GHOST, DIVERGENCE = "document + ghost", "document + ghost + KL 0.5"
FULL_DIVERGENCE = "full softmax + KL 0.5"
#: Flags of the loss and of the optimizer.
METHODS = {
    FULL: (FULL_LOSS, ADAMW),
    PAPER: (REPLAY, MOCLIP),
    TOP_K: (REPLAY, ADAMW),
    DIVERGENCE: ((*DOCUMENT_GHOST, "--kl-weight", "0.5"), ADAMW),
    GHOST: (DOCUMENT_GHOST, ADAMW),
    "document + ghost + KL 0.25": ((*DOCUMENT_GHOST, "--kl-weight", "0.25"), ADAMW),
    "document + ghost + KL 1": ((*DOCUMENT_GHOST, "--kl-weight", "1.0"), ADAMW),
    FULL_DIVERGENCE: ((*FULL_LOSS, "--kl-weight", "0.5"), ADAMW),
    "full softmax + KL 1": ((*FULL_LOSS, "--kl-weight", "1.0"), ADAMW),
    "full softmax, MoClip": (FULL_LOSS, MOCLIP),
    "full softmax, MoFO": (FULL_LOSS, ("--optimizer", "mofo")),
    "full softmax, TAM": (FULL_LOSS, ("--optimizer", "tam")),
    "full softmax, AdaMuon": (FULL_LOSS, ("--optimizer", "adamuon")),
    # The threshold of the paper that QK-Clip is from (arXiv 2507.20534).
    "full softmax, MuonClip": (
        FULL_LOSS, ("--optimizer", "muonclip", "--qk-clip-threshold", "100")
    ),
}  # fmt: skip
CLAIMED = (PAPER, TOP_K, DIVERGENCE)
#: Tried at one rate only.
OTHER_WEIGHTS = [name for name in METHODS if name.endswith(("KL 0.25", "KL 1"))]
OTHER_OPTIMIZERS = [name for name in METHODS if name.startswith(f"{FULL}, ")]


def runs_of(
    domain: str, methods: Sequence[str], rates: Sequence[float], *, seeds: Sequence[int] = (0,),
    blends: tuple[float, ...] = (),
) -> Iterator[Run]:  # fmt: skip
    """Each of ``methods`` at each rate with each seed, on all answer positions."""
    for seed, lr, method in product(seeds, rates, methods):
        loss, optimizer = METHODS[method]
        yield Run(method=method, store=Store(domain=domain), loss=loss, optimizer=optimizer, lr=lr,
                  seed=seed, blends=blends)  # fmt: skip


def ablations(domain: str, lr: float) -> Iterator[Run]:
    """The paper's recipe with other positions, of which "bucket" is the paper's; other τ, angles.

    Without them it has all answer positions, τ 0.95 and 45°.
    """
    loss, optimizer = METHODS[PAPER]
    own = Store(domain=domain)
    changes = {
        **{f"{name} positions": (Store(domain=domain, strategy=name), optimizer)
           for name in ("bucket", "random", "last-token")},
        **{f"τ {tau:g}": (Store(domain=domain, coverage=tau), optimizer) for tau in (0.8, 0.99)},
        **{f"{angle}°": (own, (*optimizer, "--max-angle", f"{angle}")) for angle in (30, 60, 90)},
    }  # fmt: skip
    for name, (store, optimizer) in changes.items():
        yield Run(method=f"{PAPER}, {name}", store=store, loss=loss, optimizer=optimizer, lr=lr,
                  seed=0)  # fmt: skip


def _quick() -> Iterator[Run]:
    yield from runs_of("causes", [FULL], RATES[:2], blends=(0.5,))
    yield from runs_of("causes", [PAPER, DIVERGENCE], [LR])


def _small() -> Iterator[Run]:
    """The claimed methods' curves on two domains, and the baselines."""
    yield from runs_of("causes", [FULL], RATES, blends=(0.5,))
    yield from runs_of("causes", CLAIMED, RATES)
    yield from runs_of("causes", [FULL_DIVERGENCE], [LR, 1e-4])
    yield from runs_of("spider", [FULL], RATES, blends=(0.5,))
    yield from runs_of("spider", CLAIMED, [LR])
    yield from runs_of("spider", [PAPER], [1e-4])
    # At the rate at which full softmax learns the facts and forgets least: other orders of the
    # data, and the other optimizers.
    yield from runs_of("causes", [FULL], [1e-4], seeds=[1, 2], blends=(0.5,))
    yield from runs_of("causes", [PAPER], [1e-4], seeds=[1, 2])
    yield from runs_of("causes", OTHER_OPTIMIZERS, [1e-4])
    for domain in ("causes", "spider"):
        yield from runs_of(domain, [FULL], [3e-5])  # does a lower rate learn, too?
    yield from ablations("causes", 1e-4)


def _whole() -> Iterator[Run]:
    """The most informative runs first, so that it may be stopped at any moment.

    What needs many runs is tried on the causes, whose runs are the shortest.
    """
    yield from runs_of("spider", [FULL], RATES, blends=BLENDS)
    yield from runs_of("spider", CLAIMED, [LR])
    yield from runs_of("oran", [FULL], [1e-4], blends=(0.5,))
    yield from runs_of("oran", [PAPER], [LR, 1e-4])
    yield from runs_of("oran", [FULL], [3e-5])
    yield from runs_of("causes", [FULL], RATES, blends=BLENDS)
    yield from runs_of("causes", CLAIMED, RATES)
    yield from runs_of("spider", CLAIMED, [1e-3, 1e-4])
    for domain in ("causes", "spider"):
        yield from runs_of(domain, [FULL], FURTHER_RATES)
        yield from runs_of(domain, [FULL], [LR], seeds=[1, 2], blends=(0.5,))
    yield from runs_of("causes", CLAIMED, [LR], seeds=[1, 2])
    yield from runs_of("causes", OTHER_WEIGHTS, [LR])
    done = (FULL, *CLAIMED, *OTHER_WEIGHTS)
    yield from runs_of("causes", [name for name in METHODS if name not in done], RATES)
    yield from ablations("causes", LR)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Runs and the size of their data.

    Attributes:
        databases: of Spider's, the first so many.
        items: questions of each general benchmark.
        costs: by domain; two processes at a time on two virtual cores of an AMD EPYC (Zen 3), fp32,
            where each computes 240 tokens a second forward and 85 forward and backward.
    """

    runs: Callable[[], Iterator[Run]]
    databases: int
    items: int
    costs: Mapping[str, Cost]

    def named(self, only: Sequence[str] = ("*",)) -> list[Run]:
        """The runs whose names fit one of the patterns, a shell's."""
        return [run for run in self.runs() if any(fnmatchcase(run.name, one) for one in only)]

    def minutes(self, run: Run) -> float:
        """What a run takes one core, about."""
        cost = self.costs[run.store.domain]
        is_muon = run.optimizer[1] in ("adamuon", "muonclip")
        training = cost.muon if is_muon else cost.training
        return training + (1 + len(run.blends)) * cost.evaluation

    @property
    def domains(self) -> list[str]:
        """The domains of its runs."""
        return list(self.costs)


PLANS = {
    "quick": Plan(runs=_quick, databases=6, items=60, costs={"causes": Cost(6.5, 3.5)}),
    "small": Plan(
        runs=_small, databases=6, items=60,
        costs={"spider": Cost(7, 4), "causes": Cost(6.5, 3.5, muon=19)},
    ),
    "whole": Plan(
        runs=_whole, databases=len(DATABASES), items=150,
        costs={"spider": Cost(14, 5), "oran": Cost(25, 7), "causes": Cost(5.5, 4.5, muon=18)},
    ),
}  # fmt: skip
