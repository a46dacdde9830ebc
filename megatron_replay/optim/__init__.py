"""Update rules: one file each, a pure function of scalars or matrices, and one loop for all."""

from megatron_replay.optim.adamuon import AdaMuon
from megatron_replay.optim.adamw import AdamW
from megatron_replay.optim.moclip import MoClip
from megatron_replay.optim.mofo import MoFO
from megatron_replay.optim.muonclip import MuonClip
from megatron_replay.optim.tam import TAM

__all__ = ["TAM", "AdaMuon", "AdamW", "MoClip", "MoFO", "MuonClip"]
