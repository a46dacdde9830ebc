"""Compiled forms of the maths in ``functional``, and which of them runs for a tensor."""

from megatron_replay.kernels.registry import HEAD, OPTIMIZER, Forms, OptimizerKernels

__all__ = ["HEAD", "OPTIMIZER", "Forms", "OptimizerKernels"]
