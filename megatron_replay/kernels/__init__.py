"""Compiled forms of the maths in ``functional``, and which of them runs for a tensor."""

from megatron_replay.kernels.registry import OptimizerKernels, describe, optimizer_kernels, why_not

__all__ = ["OptimizerKernels", "describe", "optimizer_kernels", "why_not"]
