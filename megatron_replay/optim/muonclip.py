"""MuonClip (Kimi K2, 2025): Muon whose attention is kept from growing.

    M <- momentum M + (1 - momentum) G
    W <- (1 - lr wd) W - lr 0.2 sqrt(max(rows, columns)) NewtonSchulz(M)

for matrices inside layers; 0.2 sqrt(max) is AdamW's usual root mean square. What keeps attention
in check is QK-Clip (``qk_clip.py``) for models without QK-norm. With QK-norm the logits are bounded
and QK-Clip does nothing: the paper clips the gradient of the attention layers instead; here that is
each layer's own, over its query, key, value and output projections, at a norm of 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from megatron_replay.optim.batch import Batch, Scalars
from megatron_replay.optim.muon import MatrixRule
from megatron_replay.optim.placement import Piece, Place

_RMS = 0.2


class MuonClip(MatrixRule):
    """Muon with a clip for attention.

    Attention is clipped where the model was placed (``distribute``): a list of tensors does not say
    which of them are a layer's attention. The layers' norms travel in the all-reduce of the step.
    """

    own: ClassVar[tuple[str, ...]] = (*MatrixRule.own, "attention_clip_grad", "_attention_sq")
    #: Norm to clip each attention layer's gradient at, after the whole gradient's clipping.
    attention_clip_grad = 1.0
    _attention_sq = torch.zeros(0)

    def _state_keys(self, place: Place) -> tuple[str, ...]:
        return ("exp_avg",) if place.orthogonal else super()._state_keys(place)

    def _sums(self, batches: Sequence[Batch]) -> Tensor:
        """[1 + layers]: |g|^2 of the whole, and of each layer's attention."""
        values, places = self._counted_values(batches)
        layers = self._placement.num_layers if self._placement is not None else 0
        sums = values.new_zeros(1 + layers)
        sums[0] = values.sum()
        for place, value in zip(places, values[:, 0], strict=True):
            if place.attention_layer is not None:
                sums[1 + place.attention_layer] += value
        return sums

    def _scalars(self, sums: Tensor) -> Scalars:
        self._attention_sq = sums[1:]
        return super()._scalars(sums[:1])

    def _clip(self, place: Place, scalars: Scalars) -> Tensor:
        clip = super()._clip(place, scalars)
        if place.attention_layer is None:
            return clip
        norm = self._attention_sq[place.attention_layer].sqrt() * clip
        return clip * (self.attention_clip_grad / (norm + 1e-6)).clamp(max=1.0)

    def _updates(
        self, pieces: Sequence[tuple[Batch, int, Piece]], scalars: Scalars
    ) -> list[Tensor]:
        return [
            orthogonal * (_RMS * math.sqrt(max(self._shape(piece, orthogonal))))
            for (_, _, piece), orthogonal in zip(pieces, self._orthogonalized(pieces), strict=True)
        ]

    @staticmethod
    def _shape(piece: Piece, part: Tensor) -> tuple[int, int]:
        """(rows, columns) of the whole matrix of which ``part`` is held here."""
        if piece.split_dim == 1:
            return part.shape[0], piece.numel // part.shape[0]
        return piece.numel // part.shape[1], part.shape[1]
