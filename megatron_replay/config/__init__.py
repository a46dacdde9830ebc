"""The settings of both stages: one frozen tree of dataclasses, checked when it is built.

A field is at once a YAML key (``optimizer: {lr: 1.0e-5}``), a flag (``--lr 1e-5``) and an attribute
(``config.optimizer.lr``); ``flags.py`` derives the first two from the third. Training fields have
Megatron's names. Nothing here needs torch, a device or a process group.
"""

from megatron_replay.config.shared import (
    DataConfig,
    ModelConfigSource,
    ParallelConfig,
    Section,
    Settings,
    flag_name,
    option,
)
from megatron_replay.config.stage0 import CandidatesConfig, Stage0Config
from megatron_replay.config.stage1 import (
    LossConfig,
    OptimizerConfig,
    ProbeConfig,
    Stage1Config,
    TrainingConfig,
)

__all__ = [
    "CandidatesConfig",
    "DataConfig",
    "LossConfig",
    "ModelConfigSource",
    "OptimizerConfig",
    "ParallelConfig",
    "ProbeConfig",
    "Section",
    "Settings",
    "Stage0Config",
    "Stage1Config",
    "TrainingConfig",
    "flag_name",
    "option",
]
