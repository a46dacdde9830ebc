"""The settings of the optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_replay.config.section import Section, option


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """The update rule and its schedule."""

    optimizer: str = option(
        "update rule", "moclip", ("moclip", "adamw", "mofo", "tam", "adamuon", "muonclip")
    )
    lr: float = option("peak learning rate")
    min_lr: float = option(
        "learning rate at the end of the decay",
        0.0,
        used_with={"lr_decay_style": ("cosine", "linear")},
    )
    lr_decay_style: str = option("shape of the decay", "cosine", ("cosine", "linear", "constant"))
    lr_warmup_iters: int = option("iterations of linear warm-up", 0)
    weight_decay: float = option("decoupled weight decay", 0.1)
    clip_grad: float = option("global gradient norm to clip at; 0: no clipping", 1.0)
    adam_beta1: float = option("decay of the first moment", 0.9)
    adam_beta2: float = option("decay of the second moment", 0.95)
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
        "share of each matrix that is updated", 0.2, used_with={"optimizer": ("mofo",)}
    )
    qk_clip_threshold: float | None = option(
        "largest attention logit that QK-Clip leaves; for models without QK-norm",
        None,
        used_with={"optimizer": ("muonclip",)},
    )

    def _check(self) -> None:
        self.require_positive("lr")
        # A step moves a weight by up to the learning rate: above 1, nothing of the model is left.
        self.require(self.lr <= 1, "lr", "a number above 0, at most 1")
        # A step subtracts this share of a weight.
        self.require(self.lr * self.weight_decay <= 1, "weight_decay", "at most 1 / --lr")
        self.require(0 <= self.min_lr <= self.lr, "min_lr", "0 to --lr")
        for name in (
            "lr_warmup_iters",
            "weight_decay",
            "clip_grad",
        ):
            self.require(getattr(self, name) >= 0, name, "a number from 0")
        for name in ("adam_beta1", "adam_beta2"):
            self.require(0 <= getattr(self, name) < 1, name, "0 to below 1")
        self.require(0 < self.max_angle <= 90, "max_angle", "degrees above 0, at most 90")
        self.require(0 < self.mofo_fraction <= 1, "mofo_fraction", "a share above 0, at most 1")
        qk_clip = self.qk_clip_threshold
        self.require(qk_clip is None or qk_clip > 0, "qk_clip_threshold", "a number above 0")
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Refuse settings that exclude each other, with the reason."""
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
