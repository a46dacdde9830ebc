"""The settings of Stage 1."""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_replay.config.shared import SET, Section, Settings, option
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
        "candidate store of this corpus; with --loss full, only the probe and --kl-weight read it",
        None,
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
        "--store-logits), at the store's positions alone; the logged loss includes it",
        0.0,
        within="[0, inf)",
        used_with={"store": SET},
    )
    head_backend: str = option(
        "restricted-head backend; auto: the fastest for this device, union: dense products over "
        "unions of sets, torch: the definition, as costly as full softmax",
        "auto",
        ("auto", "torch", "union", "cpu", "triton", "ascend"),
        used_with={"loss": ("restricted",)},
    )

    @property
    def trains_on_store(self) -> bool:
        """Whether the loss is that of the store's positions, and needs their records."""
        return self.loss == "restricted" or self.kl_weight > 0

    def _check(self) -> None:
        if self.loss == "restricted" and self.store is None:
            raise ConfigError(
                "--loss restricted, the default, reads the candidates of a store",
                where="--store",
                fix="Give the store that Stage 0 made, or train with --loss full",
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """The update rule and its schedule."""

    optimizer: str = option(
        "update rule", "moclip", ("moclip", "adamw", "mofo", "tam", "adamuon", "muonclip")
    )
    # A step moves a weight by up to the learning rate: above 1, nothing of the model is left.
    lr: float = option("peak learning rate", within="(0, 1]")
    min_lr: float = option(
        "learning rate at the end of the decay",
        0.0,
        used_with={"lr_decay_style": ("cosine", "linear")},
    )
    lr_decay_style: str = option("shape of the decay", "cosine", ("cosine", "linear", "constant"))
    lr_warmup_iters: int = option("iterations of linear warm-up", 0, within="[0, inf)")
    weight_decay: float = option("decoupled weight decay", 0.1, within="[0, inf)")
    clip_grad: float = option(
        "global gradient norm to clip at; 0: no clipping", 1.0, within="[0, inf)"
    )
    adam_beta1: float = option("decay of the first moment", 0.9, within="[0, 1)")
    adam_beta2: float = option("decay of the second moment", 0.95, within="[0, 1)")
    use_distributed_optimizer: bool = option(
        "shard the optimizer's state over data parallel ranks (ZeRO-1)", False
    )
    angle_scope: str = option(
        "compute one angle for the whole model, or one for each parameter",
        "model",
        ("model", "tensor"),
        used_with={"optimizer": ("moclip", "tam")},
    )
    max_angle: float = option(
        "largest angle between gradient and momentum, in degrees",
        45.0,
        within="(0, 90]",
        used_with={"optimizer": ("moclip",)},
    )
    obtuse: str = option(
        "a gradient more than 90 degrees from the momentum: keep it on the momentum's line, or "
        "drop it",
        "line",
        ("line", "zero"),
        used_with={"optimizer": ("moclip",)},
    )
    mofo_fraction: float = option(
        "share of each matrix that is updated",
        0.2,
        within="(0, 1]",
        used_with={"optimizer": ("mofo",)},
    )
    qk_clip_threshold: float | None = option(
        "largest attention logit that QK-Clip leaves; for models without QK-norm",
        None,
        within="(0, inf)",
        used_with={"optimizer": ("muonclip",)},
    )

    def _check(self) -> None:
        # A step subtracts this share of a weight.
        self.require(self.lr * self.weight_decay <= 1, "weight_decay", "at most 1 / --lr")
        self.require(0 <= self.min_lr <= self.lr, "min_lr", "0 to --lr")
        if self.angle_scope == "tensor":
            self.require(
                self.obtuse != "zero", "obtuse", "line: zero counts obtuse steps of the whole model"
            )
        if self.optimizer in ("adamuon", "muonclip"):
            self.require(
                not self.use_distributed_optimizer,
                "use_distributed_optimizer",
                f"False under --optimizer {self.optimizer}, which orthogonalises whole matrices: "
                "sharding over data parallel ranks cuts them at any row",
            )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Section):
    """The length of the run, its batches, and what is saved."""

    save: str = option("directory for checkpoints, metrics.jsonl and the resolved configuration")
    global_batch_size: int = option(
        "packs of documents in one optimizer step, over all devices", 16, within="[1, 1048576]"
    )
    pack_documents: bool = option(
        "a pack of a step has as many documents as fit; off: it has one", True
    )
    group_prefixes: int = option(
        "draw up to this many documents of one prefix together: cheaper, but another order of "
        "documents; 1: independently",
        1,
        within="[1, inf)",
    )
    train_epochs: int | None = option(
        "passes over the corpus; by default 1, or as many as --train-iters needs",
        None,
        within="[1, 100000]",
    )
    train_iters: int | None = option(
        "iterations, over as many epochs as they need; by default those of --train-epochs",
        None,
        within="[1, inf)",
    )
    seed: int = option("seed for the order of documents", 1234, within="[0, inf)")
    save_interval: int = option(
        "iterations between checkpoints; 0: at the end only", 0, within="[0, inf)"
    )
    keep_last: int = option(
        "keep only this many checkpoints, the newest; 0: all", 0, within="[0, inf)"
    )
    exit_interval: int | None = option(
        "save and exit at each iteration that is a multiple of this", None, within="[1, inf)"
    )
    recompute_granularity: str = option(
        "full: keep only the inputs of layers, and recompute the rest in backward",
        "none",
        ("none", "full"),
    )
    profile: bool = option(
        "trace the 4th to 6th step of this process into --save/profile, one file per rank", False
    )
    log_interval: int = option(
        "iterations between lines of metrics.jsonl and TensorBoard", 1, within="[1, inf)"
    )

    def _check(self) -> None:
        self.require(
            self.train_iters is None or self.train_epochs is None,
            "train_epochs",
            "no value together with --train-iters, which also sets the length",
        )


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(Section):
    """The fixed samples that measure the mass outside the candidate sets, and forgetting."""

    probe_interval: int = option(
        "iterations between probes and measurements of stability; 0: only stability, at the end",
        50,
        within="[0, inf)",
    )
    probe_documents: int = option(
        "documents in the sample of --data-path, and in that of --general-data-path",
        64,
        within="[1, inf)",
        used_with={"probe_interval": SET},
    )
    general_data_path: str | None = option(
        "prefix of a corpus of general text, whose perplexity is compared with that of --load",
        None,
        used_with={"probe_interval": SET},
    )


@dataclass(frozen=True, kw_only=True)
class Stage1Config(Settings):
    """All settings of python -m megatron_replay.stage1."""

    loss: LossConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    probe: ProbeConfig

    def __post_init__(self) -> None:
        """Check the branches against each other."""
        super().__post_init__()
        # A store or a sample that the run does not read.
        probe, store = self.probe, self.loss.store
        self.loss.require(
            store is None or self.loss.trains_on_store or probe.probe_interval > 0,
            "store",
            "no store with --loss full and --probe-interval 0, which do not read it",
        )
        [default] = [f.default for f in fields(probe) if f.name == "probe_documents"]
        probe.require(
            bool(store or probe.general_data_path) or probe.probe_documents == default,
            "probe_documents",
            f"{default}, as only --store or --general-data-path uses it",
        )
