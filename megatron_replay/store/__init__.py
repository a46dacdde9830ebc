"""The candidate store: what Stage 0 writes and Stage 1 reads. Numpy only; never torch.

A store is a directory: ``store.json`` describes it, ``NNNN/shard-NNNNNNN.bin`` and ``.idx``
hold the candidate sets, ``manifest.json`` marks it complete. ``docs/store_format.md`` has every
byte.
"""

from megatron_replay.store.document import (
    CandidateBatch,
    DocumentCandidates,
    no_candidates,
    offsets_of_counts,
    require_labels,
)
from megatron_replay.store.manifest import StoreDescription
from megatron_replay.store.reader import CandidateReader
from megatron_replay.store.writer import CandidateWriter

__all__ = [
    "CandidateBatch", "CandidateReader", "CandidateWriter", "DocumentCandidates",
    "StoreDescription", "no_candidates", "offsets_of_counts", "require_labels",
]  # fmt: skip
