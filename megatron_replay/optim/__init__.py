"""Update rules: one file each, a pure function first, then the torch optimizer around it."""

from megatron_replay.optim.moclip import MoClip

__all__ = ["MoClip"]
