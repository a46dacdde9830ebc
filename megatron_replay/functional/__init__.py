"""The mathematics: torch and explicit process groups, nothing of Megatron.

Works on one process without any group; a vocabulary shard enters as ``vocab_start``, ``tp_group``.
"""

from megatron_replay.functional.candidates import CandidateSets, select_candidates
from megatron_replay.functional.full_cross_entropy import (
    outside_mass,
    vocab_parallel_cross_entropy,
)
from megatron_replay.functional.positions import select_positions
from megatron_replay.functional.restricted_cross_entropy import (
    restricted_cross_entropy,
    restricted_cross_entropy_dense,
)
from megatron_replay.functional.stability import (
    Spikes,
    gradient_norm_cv,
    loss_std,
    loss_variance,
    spikes,
)

__all__ = [
    "CandidateSets",
    "Spikes",
    "gradient_norm_cv",
    "loss_std",
    "loss_variance",
    "outside_mass",
    "restricted_cross_entropy",
    "restricted_cross_entropy_dense",
    "select_candidates",
    "select_positions",
    "spikes",
    "vocab_parallel_cross_entropy",
]
