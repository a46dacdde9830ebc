"""The settings of both stages: layout, model, data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_replay.config.section import ABOVE_ONE, Section, option, require_used


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """How the model is placed on the devices."""

    tensor_model_parallel_size: int = option("tensor parallel size (TP)", 1, within="[1, inf)")
    pipeline_model_parallel_size: int = option("pipeline parallel size (PP)", 1, within="[1, inf)")
    sequence_parallel: bool = option(
        "shard activations along the sequence over TP",
        False,
        used_with={"tensor_model_parallel_size": ABOVE_ONE},
    )
    platform: str = option("auto, or the name of a platform (cpu, ...)", "auto")
    distributed_timeout_minutes: float = option(
        "minutes a collective waits for a rank before the run fails", 10.0, within="[0.01, 10080]"
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
    seq_length: int = option("positions in a pack of documents", 4096, within="[1, 4194304]")
    long_documents: str = option(
        "what to do with documents longer than --seq-length",
        "error",
        ("error", "drop", "truncate"),
    )
    micro_batch_size: int = option(
        "packs in one forward pass on one device", 1, within="[1, 65536]"
    )
    pack_documents: bool = option(
        "pack as many documents as fit, which attention keeps apart; off: one document and padding",
        True,
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of both stages."""

    parallel: ParallelConfig
    model: ModelConfigSource
    data: DataConfig

    def __post_init__(self) -> None:
        """Check the branches against each other."""
        require_used([getattr(self, field.name) for field in dataclasses.fields(self)])
        tp = self.parallel.tensor_model_parallel_size
        self.data.require(
            not self.parallel.sequence_parallel or self.data.seq_length % tp == 0,
            "seq_length",
            f"a multiple of --tensor-model-parallel-size {tp} under --sequence-parallel",
        )
