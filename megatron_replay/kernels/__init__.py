"""Compiled forms of the maths in ``functional``, and which of them runs for a tensor."""

from megatron_replay.kernels.registry import (
    HEAD,
    OPTIMIZER,
    SELECTION,
    Forms,
    OptimizerKernels,
)

__all__ = ["HEAD", "OPTIMIZER", "SELECTION", "Forms", "OptimizerKernels"]
