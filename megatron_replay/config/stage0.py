"""The settings of Stage 0."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_replay.config.shared import Section, Settings, option


@dataclass(frozen=True, kw_only=True)
class CandidatesConfig(Section):
    """What Stage 0 records: which positions, and which tokens at each (Eq. 1 and 2)."""

    store: str = option("directory of the candidate store to write")
    coverage: float = option(
        "probability mass tau that a candidate set reaches, unless it is cut at the cap",
        0.95,
        within="(0, 1]",
    )
    max_candidates: int = option(
        "cap K_max on the size of a candidate set, before the label is added",
        200,
        within="[1, 255]",
    )
    position_strategy: str = option(
        "which answer positions to record", "bucket", ("bucket", "random", "last-token", "all")
    )
    position_fraction: float = option(
        "share of the answer positions to record",
        0.5,
        within="(0, 1]",
        used_with={"position_strategy": ("bucket", "random")},
    )
    last_n: int = option(
        "how many positions to record, counted from a document's end",
        1,
        within="[1, inf)",
        used_with={"position_strategy": ("last-token",)},
    )
    seed: int = option(
        "seed for drawing positions",
        1234,
        within="[0, inf)",
        used_with={"position_strategy": ("bucket", "random")},
    )
    store_logits: str = option(
        "also record the candidates' logits, in this precision", "none", ("none", "fp16", "bf16")
    )
    documents_per_shard: int = option(
        "documents in a shard file; a killed run loses at most the shards it was writing",
        1024,
        within="[1, inf)",
    )
    shards: str | None = option(
        "FIRST:STOP: write only these shards; tools/inspect_store.py merge joins the parts",
        None,
    )


@dataclass(frozen=True, kw_only=True)
class Stage0Config(Settings):
    """All settings of python -m megatron_replay.stage0."""

    candidates: CandidatesConfig
