"""The settings of Stage 0."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_replay.config.section import Section, option
from megatron_replay.config.shared import (
    DataConfig,
    ModelConfigSource,
    ParallelConfig,
    require_even_sequence,
)


@dataclass(frozen=True, kw_only=True)
class CandidatesConfig(Section):
    """What Stage 0 records: which positions, and which tokens at each (Eq. 1 and 2)."""

    store: str = option("directory of the candidate store to write")
    coverage: float = option(
        "probability mass tau that a candidate set reaches, unless it is cut at the cap", 0.95
    )
    max_candidates: int = option(
        "cap K_max on the size of a candidate set, before the label is added", 200
    )
    position_strategy: str = option(
        "which answer positions to record", "bucket", ("bucket", "random", "last-token", "all")
    )
    position_fraction: float = option(
        "share of the answer positions to record",
        0.5,
        used_with={"position_strategy": ("bucket", "random")},
    )
    last_n: int = option(
        "how many positions to record, from the end of a document",
        1,
        used_with={"position_strategy": ("last-token",)},
    )
    seed: int = option(
        "seed for drawing positions", 1234, used_with={"position_strategy": ("bucket", "random")}
    )
    store_logits: str = option(
        "also record the candidates' logits, in this precision", "none", ("none", "fp16", "bf16")
    )
    documents_per_shard: int = option(
        "documents in a shard file; a killed run loses at most the shards it was writing", 1024
    )
    shards: str | None = option(
        "FIRST:STOP: write only these shards; tools/inspect_store.py merge joins the parts",
        None,
    )

    def _check(self) -> None:
        self.require(0 < self.coverage <= 1, "coverage", "a share above 0, at most 1")
        self.require(1 <= self.max_candidates <= 255, "max_candidates", "1 to 255")
        self.require(
            0 < self.position_fraction <= 1, "position_fraction", "a share above 0, at most 1"
        )
        self.require(self.seed >= 0, "seed", "a number from 0")
        self.require_positive("last_n", "documents_per_shard")


@dataclass(frozen=True, kw_only=True)
class Stage0Config:
    """All settings of python -m megatron_replay.stage0."""

    parallel: ParallelConfig
    model: ModelConfigSource
    data: DataConfig
    candidates: CandidatesConfig

    def __post_init__(self) -> None:
        """Check what two branches must agree on."""
        require_even_sequence(self.parallel, self.data)
