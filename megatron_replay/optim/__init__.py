"""Update rules: one file each with its equation, and one loop (``rule.py``) that all share."""

from megatron_replay.optim.adamuon import AdaMuon
from megatron_replay.optim.adamw import AdamW
from megatron_replay.optim.moclip import MoClip
from megatron_replay.optim.mofo import MoFO
from megatron_replay.optim.muonclip import MuonClip
from megatron_replay.optim.tam import TAM

__all__ = ["TAM", "AdaMuon", "AdamW", "MoClip", "MoFO", "MuonClip"]
