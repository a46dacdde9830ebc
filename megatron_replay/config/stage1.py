"""The settings of Stage 1."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_replay.config.optimizer import OptimizerConfig
from megatron_replay.config.section import SET, Section, option, require_used
from megatron_replay.config.shared import (
    DataConfig,
    ModelConfigSource,
    ParallelConfig,
    require_even_sequence,
)
from megatron_replay.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    """The loss that Stage 1 minimises."""

    loss: str = option(
        "cross-entropy over the candidates only, or over the whole vocabulary",
        "restricted",
        ("restricted", "full"),
    )
    store: str | None = option(
        "candidate store of this corpus; with --loss full, only the probe reads it", None
    )
    allow_other_store: bool = option(
        "accept a store that Stage 0 made with another base model than --load",
        False,
        used_with={"store": SET},
    )
    candidate_scope: str = option(
        "compute the softmax over a position's own set, or over the union of its document's sets",
        "position",
        ("position", "document"),
        used_with={"loss": ("restricted",)},
    )
    tail: str = option(
        "ghost: add the base model's mass outside the set to the denominator, as one more term",
        "none",
        ("none", "ghost"),
        used_with={"loss": ("restricted",)},
    )
    kl_weight: float = option(
        "weight of the KL divergence from the base model's stored logits (Stage 0 "
        "--store-logits); the logged loss includes it",
        0.0,
        used_with={"loss": ("restricted",)},
    )
    head_backend: str = option(
        "restricted-head backend; auto: the fastest for this device, union: dense products over "
        "unions of sets, torch: the definition, as costly as full softmax",
        "auto",
        ("auto", "torch", "union", "cpu", "triton", "ascend"),
        used_with={"loss": ("restricted",)},
    )

    def _check(self) -> None:
        self.require(
            self.loss == "full" or self.store is not None, "store", "a store for --loss restricted"
        )
        self.require(self.kl_weight >= 0, "kl_weight", "a number from 0")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Section):
    """The length of the run, its batches, and what is saved."""

    save: str = option("directory for checkpoints, metrics.jsonl and the resolved configuration")
    global_batch_size: int = option("packs in one optimizer step, over all devices", 16)
    train_epochs: int | None = option(
        "passes over the corpus; by default 1, or as many as --train-iters needs", None
    )
    train_iters: int | None = option(
        "iterations, over as many epochs as they need; by default those of --train-epochs", None
    )
    seed: int = option("seed for the order of documents", 1234)
    save_interval: int = option("iterations between checkpoints; 0: at the end only", 0)
    keep_last: int = option("how many checkpoints to keep, the newest; 0: all", 0)
    exit_interval: int | None = option(
        "save and exit after each iteration that is a multiple of this", None
    )
    recompute_granularity: str = option(
        "full: keep only the inputs of layers, and recompute the rest in backward",
        "none",
        ("none", "full"),
    )
    profile: bool = option(
        "trace the 4th to 6th step of this process into --save/profile, one file per rank", False
    )
    log_interval: int = option("iterations between lines of metrics.jsonl and TensorBoard", 1)

    def _check(self) -> None:
        self.require_positive("log_interval")
        self.require_between(1, 1 << 20, "global_batch_size")
        for name in ("train_epochs", "train_iters", "exit_interval"):
            value = getattr(self, name)
            self.require(value is None or value > 0, name, "a number above 0")
        epochs = self.train_epochs or 1
        self.require(epochs <= 100_000, "train_epochs", "at most 100,000")
        self.require(
            self.train_iters is None or self.train_epochs is None,
            "train_epochs",
            "no value together with --train-iters, which also sets the length",
        )
        for name in ("seed", "save_interval", "keep_last"):
            self.require(getattr(self, name) >= 0, name, "a number from 0")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(Section):
    """The fixed samples that measure the mass outside the candidate sets, and forgetting."""

    probe_interval: int = option(
        "iterations between readings of the probes and of stability; 0: stability at the end only",
        50,
    )
    probe_documents: int = option(
        "documents in the sample of --data-path, and in that of --general-data-path",
        64,
        used_with={"probe_interval": SET},
    )
    general_data_path: str | None = option(
        "prefix of a corpus of general text, whose perplexity is compared with that of --load",
        None,
        used_with={"probe_interval": SET},
    )

    def _check(self) -> None:
        self.require_positive("probe_documents")
        self.require(self.probe_interval >= 0, "probe_interval", "a number from 0")


@dataclass(frozen=True, kw_only=True)
class Stage1Config:
    """All settings of python -m megatron_replay.stage1."""

    parallel: ParallelConfig
    model: ModelConfigSource
    data: DataConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    probe: ProbeConfig

    def __post_init__(self) -> None:
        """Check settings of different branches against each other."""
        branches = [getattr(self, field.name) for field in dataclasses.fields(self)]
        require_used(branches)
        require_even_sequence(self.parallel, self.data)
        self._check_observers()
        gbs, mbs = self.training.global_batch_size, self.data.micro_batch_size
        if gbs % mbs:
            raise ConfigError(
                "the global batch is not a whole number of micro-batches",
                where="--global-batch-size",
                expected=f"a multiple of --micro-batch-size {mbs}",
                found=gbs,
            )

    def _check_observers(self) -> None:
        """Refuse a store or a sample that the run does not read."""
        has_probe = self.loss.store is not None and self.probe.probe_interval > 0
        self.loss.require(
            self.loss.loss == "restricted" or self.loss.store is None or has_probe,
            "store",
            "no store with --loss full and --probe-interval 0, which do not read it",
        )
        default = type(self.probe).__dataclass_fields__["probe_documents"].default
        has_sample = self.loss.store is not None or self.probe.general_data_path is not None
        self.probe.require(
            has_sample or self.probe.probe_documents == default,
            "probe_documents",
            f"{default}, as only --store or --general-data-path uses it",
        )
