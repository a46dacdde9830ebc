"""The settings of both stages: one frozen tree of dataclasses, checked when it is built.

A field is at once a YAML key (``optimizer: {lr: 1.0e-5}``), a flag (``--lr 1e-5``) and an attribute
(``config.optimizer.lr``); ``flags.py`` derives the first two from the third. Training fields carry
Megatron's names. Nothing here needs torch, a device or a process group.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_replay.errors import ConfigError


def option(
    help_text: str,
    default: Any = dataclasses.MISSING,
    choices: tuple[str, ...] | None = None,
    only: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field with its help; without ``default`` the user must give it.

    ``only`` names the values of the branch's ``SWITCH`` under which the field means something;
    under another it must keep its default.
    """
    metadata = {"help": help_text, "choices": choices, "only": only}
    return dataclasses.field(default=default, metadata=metadata)


def flag_name(field_name: str) -> str:
    """``micro_batch_size`` -> ``--micro-batch-size``."""
    return "--" + field_name.replace("_", "-")


class Section:
    """Base of the tree's branches: checks ``choices`` and ``only``, and offers ``require``."""

    #: The field that decides which of the others mean something.
    SWITCH: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check every choice, then what the branch itself demands."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            choices, value = field.metadata.get("choices"), getattr(self, field.name)
            if choices is not None and value not in choices:
                self.require(False, field.name, "one of " + ", ".join(choices))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            only = field.metadata.get("only")
            if only is not None and getattr(self, self.SWITCH) not in only:
                unused = getattr(self, field.name) == field.default
                users = f"{flag_name(self.SWITCH)} {' or '.join(only)}"
                self.require(unused, field.name, f"{field.default}, as only {users} uses it")
        self._check()

    def _check(self) -> None:
        """Raise ConfigError where values cannot work; branches override it."""

    def require(self, condition: bool, field_name: str, expected: str) -> None:
        """Raise a ConfigError for ``field_name`` unless ``condition`` holds."""
        if not condition:
            raise ConfigError(
                "unusable value",
                where=flag_name(field_name),
                expected=expected,
                found=repr(getattr(self, field_name)),
            )

    def require_positive(self, *field_names: str) -> None:
        """Raise a ConfigError for the first named field that is not above zero."""
        for name in field_names:
            self.require(getattr(self, name) > 0, name, "a number above 0")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """How the model lies on the devices."""

    tensor_model_parallel_size: int = option("tensor parallel size (TP)", 1)
    pipeline_model_parallel_size: int = option("pipeline parallel size (PP)", 1)
    sequence_parallel: bool = option("shard activations along the sequence over TP", False)
    platform: str = option("auto, or the name of a platform (cpu, ...)", "auto")
    distributed_timeout_minutes: float = option("minutes a collective may wait for a rank", 10.0)
    device_memory_gib: float | None = option(
        "--dry-run: memory of a device; names the largest micro-batch that fits", None
    )

    def _check(self) -> None:
        self.require_positive(
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "distributed_timeout_minutes",
        )
        memory = self.device_memory_gib
        self.require(memory is None or memory > 0, "device_memory_gib", "a number above 0")
        self.require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "sequence_parallel",
            "--tensor-model-parallel-size above 1, over which it shards",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfigSource(Section):
    """Which weights, and in what precision."""

    load: str = option("Hugging Face directory, or a directory that --save wrote")
    bf16: bool = option("compute in bfloat16 (the optimizer keeps fp32 master weights)", False)


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Which corpus, and how its documents are packed."""

    data_path: str = option("prefix of a corpus that tools/preprocess_data.py wrote")
    seq_length: int = option("positions in a pack of documents", 4096)
    long_documents: str = option(
        "what to do with documents longer than --seq-length",
        "error",
        ("error", "drop", "truncate"),
    )
    micro_batch_size: int = option("packs in one forward pass on one device", 1)
    pack_documents: bool = option(
        "as many documents in a pack as fit, kept apart by attention; off: one, and padding", True
    )

    def _check(self) -> None:
        self.require_positive("seq_length", "micro_batch_size")


@dataclass(frozen=True, kw_only=True)
class CandidatesConfig(Section):
    """What Stage 0 records: which positions, and which tokens at each (Eq. 1 and 2)."""

    store: str = option("directory of the candidate store to write")
    coverage: float = option("probability mass tau that a candidate set must reach", 0.95)
    max_candidates: int = option("cap K_max on a candidate set, before the gold token", 200)
    position_strategy: str = option(
        "which answer positions to record", "bucket", ("bucket", "random", "last-token", "all")
    )
    position_fraction: float = option("share of positions for bucket and random", 0.5)
    num_buckets: int = option("confidence buckets of the bucket strategy", 5)
    confidence: str = option(
        "what the bucket strategy sorts by", "max-prob", ("max-prob", "gold-prob")
    )
    last_n: int = option("positions a document gives under last-token", 1)
    position_seed: int = option("seed of the positions drawn", 1234)
    store_codec: str = option(
        "how ids are written: planar is read fastest, archive is smallest",
        "planar",
        ("planar", "archive"),
    )
    store_logits: str = option(
        "also record the candidates' logits, in this precision", "none", ("none", "fp16", "bf16")
    )
    documents_per_shard: int = option("documents in a shard file, the unit of resuming", 1024)
    shards: str | None = option(
        "FIRST:STOP, to write these shards only (tools/inspect_store.py merge puts parts together)",
        None,
    )
    logits_chunk_size: int = option("positions whose logits exist at one time", 1024)
    write_buffer_mib: int = option("MiB of candidate sets that may wait for the disk", 64)
    tensorboard_dir: str | None = option("TensorBoard events of the report; default: none", None)
    selection_backend: str = option(
        "form of candidate selection: the device's compiled one, or torch's; all give the same",
        "auto",
        ("auto", "torch", "cpu", "triton"),
    )

    def _check(self) -> None:
        self.require(0 < self.coverage <= 1, "coverage", "a share above 0, at most 1")
        self.require(1 <= self.max_candidates <= 255, "max_candidates", "1 to 255")
        self.require(
            0 < self.position_fraction <= 1, "position_fraction", "a share above 0, at most 1"
        )
        self.require(self.position_seed >= 0, "position_seed", "a number from 0")
        self.require_positive(
            "num_buckets", "last_n", "documents_per_shard", "logits_chunk_size", "write_buffer_mib"
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    """What Stage 1 minimises."""

    loss: str = option(
        "over the candidates only, or full softmax", "restricted", ("restricted", "full")
    )
    store: str | None = option(
        "candidate store of this corpus; with --loss full, for the probe", None
    )
    candidate_scope: str = option(
        "compete over a position's own set, or the union of its document's",
        "position",
        ("position", "document"),
    )
    tail: str = option(
        "ghost: one extra term for the base model's mass outside the set", "none", ("none", "ghost")
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

    def _check(self) -> None:
        restricted = self.loss == "restricted"
        self.require(
            not restricted or self.store is not None, "store", "a store for --loss restricted"
        )
        neutral = {"candidate_scope": "position", "tail": "none", "head_backend": "auto"}
        for name, value in neutral.items():
            self.require(
                restricted or getattr(self, name) == value, name, f"{value} under --loss full"
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """The update rule and its schedule."""

    SWITCH: ClassVar[str] = "optimizer"

    optimizer: str = option(
        "update rule", "moclip", ("moclip", "adamw", "mofo", "tam", "adamuon", "muonclip")
    )
    lr: float = option("peak learning rate")
    min_lr: float = option("learning rate at the end of the decay", 0.0)
    lr_decay_style: str = option("shape of the decay", "cosine", ("cosine", "linear", "constant"))
    lr_warmup_iters: int = option("iterations of linear warm-up", 0)
    weight_decay: float = option("decoupled weight decay", 0.1)
    clip_grad: float = option("global gradient norm to clip at; 0: never", 1.0)
    adam_beta1: float = option("decay of the first moment", 0.9)
    adam_beta2: float = option("decay of the second moment", 0.95)
    adam_eps: float = option(
        "epsilon; MoClip has none", 1e-8, only=("adamw", "mofo", "tam", "adamuon", "muonclip")
    )
    use_distributed_optimizer: bool = option(
        "shard the optimizer's state over data parallel ranks (ZeRO-1)", False
    )
    optimizer_backend: str = option(
        "form of the update's passes: the device's compiled one, or torch's",
        "auto",
        ("auto", "torch", "cpu", "triton"),
    )
    angle_scope: str = option(
        "one angle for the whole model, or one for each parameter",
        "model",
        ("model", "tensor"),
        only=("moclip", "tam"),
    )
    max_angle: float = option("degrees between gradient and momentum", 45.0, only=("moclip",))
    obtuse: str = option(
        "reading of Eq. 5 beyond 90 degrees (docs/method.md)",
        "line",
        ("line", "zero", "reflect", "project", "rotate"),
        only=("moclip",),
    )
    obtuse_patience: int = option(
        "--obtuse zero: obtuse steps in a row before one passes unturned", 3, only=("moclip",)
    )
    second_moment: str = option(
        "gradient that feeds v", "raw", ("raw", "clipped"), only=("moclip",)
    )
    atan_a: float = option("A in lr A atan2(m, B sqrt v)", 1.0, only=("moclip",))
    atan_b: float = option("B in lr A atan2(m, B sqrt v)", 1.0, only=("moclip",))
    mofo_fraction: float = option("share of each matrix that moves", 0.2, only=("mofo",))
    torque: str = option(
        "cosine: damp the step (the paper's); smoothed: damp what enters the momentum",
        "cosine",
        ("cosine", "smoothed"),
        only=("tam",),
    )
    muon_momentum: float = option(
        "decay of the momentum that is orthogonalised", 0.95, only=("adamuon", "muonclip")
    )
    newton_schulz_dtype: str = option(
        "precision of the orthogonalisation",
        "float32",
        ("float32", "bfloat16"),
        only=("adamuon", "muonclip"),
    )
    attention_clip_grad: float = option(
        "norm to clip each attention layer's gradient at; 0: never", 1.0, only=("muonclip",)
    )
    qk_clip_threshold: float | None = option(
        "largest attention logit (QK-Clip); for models without QK-norm", None, only=("muonclip",)
    )

    def _check(self) -> None:
        self.require_positive("lr", "atan_a", "atan_b")
        self.require(0 <= self.min_lr <= self.lr, "min_lr", "0 to --lr")
        self.require(self.obtuse_patience >= 0, "obtuse_patience", "a number from 0")
        for name in (
            "lr_warmup_iters",
            "weight_decay",
            "clip_grad",
            "adam_eps",
            "attention_clip_grad",
        ):
            self.require(getattr(self, name) >= 0, name, "a number from 0")
        for name in ("adam_beta1", "adam_beta2", "muon_momentum"):
            self.require(0 <= getattr(self, name) < 1, name, "0 to below 1")
        self.require(0 < self.max_angle <= 90, "max_angle", "degrees above 0, at most 90")
        self.require(0 < self.mofo_fraction <= 1, "mofo_fraction", "a share above 0, at most 1")
        qk_clip = self.qk_clip_threshold
        self.require(qk_clip is None or qk_clip > 0, "qk_clip_threshold", "a number above 0")
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Refuse what cannot be had together, with the reason."""
        if self.angle_scope == "tensor":
            self.require(
                self.obtuse != "zero", "obtuse", "another: zero counts obtuse steps of the model"
            )
            self.require(
                self.torque == "cosine", "torque", "cosine: smoothed averages the model's angle"
            )
        if self.optimizer in ("adamuon", "muonclip"):
            self.require(
                not self.use_distributed_optimizer,
                "use_distributed_optimizer",
                f"False under --optimizer {self.optimizer}, which orthogonalises whole matrices: "
                "sharding over data parallel ranks cuts them anywhere",
            )


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
class ProgressConfig(Section):
    """What is shown while it runs."""

    progress_interval: float = option("seconds between progress lines without a terminal", 10.0)

    def _check(self) -> None:
        self.require_positive("progress_interval")


@dataclass(frozen=True, kw_only=True)
class Stage0Config:
    """Everything ``python -m megatron_replay.stage0`` can be told."""

    parallel: ParallelConfig
    model: ModelConfigSource
    data: DataConfig
    candidates: CandidatesConfig
    progress: ProgressConfig


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
