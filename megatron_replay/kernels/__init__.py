"""Compiled forms of the maths in ``functional``, and which of them runs for a tensor."""

from megatron_replay.kernels.registry import (
    ATTENTION,
    HEAD,
    OPTIMIZER,
    SELECTION,
    Forms,
    OptimizerKernels,
)

__all__ = ["ATTENTION", "HEAD", "OPTIMIZER", "SELECTION", "Forms", "OptimizerKernels"]
