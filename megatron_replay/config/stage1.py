"""What Stage 1 can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_replay.config.optimizer import OptimizerConfig
from megatron_replay.config.section import Section, option
from megatron_replay.config.shared import (
    DataConfig,
    ModelConfigSource,
    ParallelConfig,
    ProgressConfig,
)
from megatron_replay.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    """What Stage 1 minimises."""

    loss: str = option(
        "over the candidates only, or full softmax", "restricted", ("restricted", "full")
    )
    store: str | None = option(
        "candidate store of this corpus; with --loss full, for the probe", None
    )
    refresh_store: bool = option(
        "the run that goes on may have another --store: Stage 0 was rerun on its checkpoint", False
    )
    candidate_scope: str = option(
        "compete over a position's own set, or a union: of its document's sets, of those of its "
        "document's neighbouring 128 positions (tile), or of every document in its micro-batch, "
        "which alone depends on --micro-batch-size and packing",
        "position",
        ("position", "tile", "document", "micro-batch"),
    )
    full_loss_every: int = option(
        "every n-th iteration by full softmax at the recorded positions; 0: never", 0
    )
    tail: str = option(
        "what the set leaves out. ghost: one extra term for the base model's mass there; sampled: "
        "an unbiased estimate of the model's own",
        "none",
        ("none", "ghost", "sampled"),
    )
    tail_samples: int = option("--tail sampled: ids drawn for a micro-batch", 256)
    kl_weight: float = option(
        "add this times the divergence from the base model's stored logits (Stage 0 "
        "--store-logits); the loss that is logged has it",
        0.0,
    )
    vocab_sharding: str = option(
        "ids of a TP rank: a piece of the vocabulary, or every TP-th id, which evens out the "
        "restricted head's work (frequent tokens have low ids); not with ZeRO-1",
        "contiguous",
        ("contiguous", "interleaved"),
    )
    head_backend: str = option(
        "form of the restricted head: the device's compiled one, union (dense products over unions "
        "of sets) or torch (the definition, as costly as full softmax)",
        "auto",
        ("auto", "torch", "union", "cpu", "triton", "ascend"),
    )

    def form_of_step(self, iteration: int) -> str:
        """What step ``iteration``, counted from 1, minimises: "restricted" or "full"."""
        is_full = self.full_loss_every > 0 and iteration % self.full_loss_every == 0
        return "full" if is_full else self.loss

    def _check(self) -> None:
        restricted = self.loss == "restricted"
        self.require(
            not restricted or self.store is not None, "store", "a store for --loss restricted"
        )
        neutral = {
            "candidate_scope": "position",
            "refresh_store": False,
            "full_loss_every": 0,
            "tail": "none",
            "kl_weight": 0.0,
            "head_backend": "auto",
        }
        for name, value in neutral.items():
            self.require(
                restricted or getattr(self, name) == value, name, f"{value} under --loss full"
            )
        self.require(self.full_loss_every >= 0, "full_loss_every", "a number from 0")
        self.require_positive("tail_samples")
        default = type(self).__dataclass_fields__["tail_samples"].default
        self.require(
            self.tail == "sampled" or self.tail_samples == default,
            "tail_samples",
            f"{default} without --tail sampled",
        )
        self.require(0 <= self.kl_weight < math.inf, "kl_weight", "a finite number from 0")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Section):
    """How long, in what batches, and what is kept."""

    save: str = option("directory for checkpoints, metrics.jsonl and the resolved configuration")
    global_batch_size: int = option("packs in one optimizer step, over all devices", 16)
    train_epochs: int = option("passes over the corpus", 1)
    last_layer_at_selected: bool = option(
        "the last layer's queries, attention and MLP at positions with a loss only: exact", True
    )
    drop_unread_tokens: bool = option(
        "leave out what follows a document's last recorded position: exact", True
    )
    overlap_grad_reduce: bool = option(
        "sum gradients over data parallel ranks beside backward, bucket by bucket", False
    )
    prefetch_batches: int = option("global batches made ahead of the step; 0: none", 2)
    train_iters: int | None = option("iterations; default: what --train-epochs needs", None)
    seed: int = option("seed of the order of documents", 1234)
    save_interval: int = option("iterations between checkpoints; 0: at the end only", 0)
    keep_last: int = option("checkpoints kept, the newest ones; 0: all", 0)
    keep_best: str = option(
        "also keep the best: by mean training loss since the checkpoint before, by the probe's "
        "full-softmax loss, or by general perplexity",
        "none",
        ("none", "loss", "probe", "general"),
    )
    exit_interval: int | None = option("save and leave after this iteration (a time slice)", None)
    max_skipped_steps: int = option(
        "steps with a non-finite loss or gradient to skip before giving up", 10
    )
    recompute_granularity: str = option(
        "full: keep only layer inputs and recompute in backward", "none", ("none", "full")
    )
    profile: bool = option("trace some steps into --save/profile, a file a rank", False)
    profile_start: int = option("--profile: steps of this process before the first traced", 3)
    profile_steps: int = option("--profile: steps traced", 3)
    log_interval: int = option("iterations between lines of metrics.jsonl and TensorBoard", 1)
    tensorboard_dir: str | None = option("TensorBoard events; default: under --save", None)
    stability_interval: int = option(
        "iterations between readings of the stability metrics; 0: at the end only", 50
    )
    distance_interval: int = option(
        "iterations between readings of the weights' distance from --load; 0: at the end only", 0
    )

    def _check(self) -> None:
        self.require_positive("global_batch_size", "train_epochs", "log_interval", "profile_steps")
        for name in ("train_iters", "exit_interval"):
            value = getattr(self, name)
            self.require(value is None or value > 0, name, "a number above 0")
        for name in (
            "prefetch_batches",
            "profile_start",
            "seed",
            "save_interval",
            "keep_last",
            "max_skipped_steps",
            "stability_interval",
            "distance_interval",
        ):
            self.require(getattr(self, name) >= 0, name, "a number from 0")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(Section):
    """The fixed samples on which Stage 1 watches mass leave the candidate sets, and forgetting."""

    probe_interval: int = option("iterations between probes; 0: never", 50)
    probe_documents: int = option("documents of the sample", 64)
    general_data_path: str | None = option(
        "prefix of a corpus of general text: logs its perplexity against that of --load", None
    )
    general_documents: int = option("documents of the sample of general text", 64)

    def _check(self) -> None:
        self.require_positive("probe_documents", "general_documents")
        self.require(self.probe_interval >= 0, "probe_interval", "a number from 0")
        self.require(
            self.general_data_path is None or self.probe_interval > 0,
            "general_data_path",
            "nothing under --probe-interval 0",
        )


@dataclass(frozen=True, kw_only=True)
class Stage1Config:
    """Everything ``python -m megatron_replay.stage1`` can be told."""

    parallel: ParallelConfig
    model: ModelConfigSource
    data: DataConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    probe: ProbeConfig
    progress: ProgressConfig

    def __post_init__(self) -> None:
        """Check what two branches must agree on."""
        if self.loss.vocab_sharding == "interleaved":
            self.optimizer.require(
                not self.optimizer.use_distributed_optimizer,
                "use_distributed_optimizer",
                "False under --vocab-sharding interleaved: ZeRO-1's checkpoints cut the "
                "parameters as they lie in memory",
            )
        gbs, mbs = self.training.global_batch_size, self.data.micro_batch_size
        if gbs % mbs:
            raise ConfigError(
                "the global batch is not a whole number of micro-batches",
                where="--global-batch-size",
                expected=f"a multiple of --micro-batch-size {mbs}",
                found=gbs,
            )
        every, interval = self.loss.full_loss_every, self.training.log_interval
        self.training.require(
            every < 2 or interval % every != 0,
            "log_interval",
            f"no multiple of --full-loss-every {every}: only its steps would be logged",
        )
        self._check_keep_best()

    def _check_keep_best(self) -> None:
        """What --keep-best judges by must be measured."""
        needs = {
            "probe": (
                self.loss.store is not None and self.probe.probe_interval > 0,
                "--store and --probe-interval above 0",
            ),
            "general": (self.probe.general_data_path is not None, "--general-data-path"),
        }
        given, flags = needs.get(self.training.keep_best, (True, ""))
        self.training.require(given, "keep_best", f"another without {flags}, which measures it")
