"""Compiled backends, and the choice of the one that runs for a tensor."""

from megatron_replay.kernels.registry import (
    ATTENTION,
    HEAD,
    SELECTION,
    Backends,
)

__all__ = ["ATTENTION", "HEAD", "SELECTION", "Backends"]
