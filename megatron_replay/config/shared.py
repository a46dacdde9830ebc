"""The settings of both stages: layout, model, data."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_replay.config.section import Section, option


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """How the model is placed on the devices."""

    tensor_model_parallel_size: int = option("tensor parallel size (TP)", 1)
    pipeline_model_parallel_size: int = option("pipeline parallel size (PP)", 1)
    sequence_parallel: bool = option("shard activations along the sequence over TP", False)
    platform: str = option("auto, or the name of a platform (cpu, ...)", "auto")
    distributed_timeout_minutes: float = option(
        "minutes a collective waits for a rank before the run fails", 10.0
    )

    def _check(self) -> None:
        self.require_positive("tensor_model_parallel_size", "pipeline_model_parallel_size")
        self.require_between(0.01, 7 * 24 * 60, "distributed_timeout_minutes")
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
        "pack as many documents as fit, which attention keeps apart; off: one document and padding",
        True,
    )

    def _check(self) -> None:
        self.require_between(1, 1 << 22, "seq_length")
        self.require_between(1, 1 << 16, "micro_batch_size")


def require_even_sequence(parallel: ParallelConfig, data: DataConfig) -> None:
    """Raise ConfigError where sequence parallelism cannot cut a pack into equal parts."""
    tp = parallel.tensor_model_parallel_size
    data.require(
        not parallel.sequence_parallel or data.seq_length % tp == 0,
        "seq_length",
        f"a multiple of --tensor-model-parallel-size {tp} under --sequence-parallel",
    )
