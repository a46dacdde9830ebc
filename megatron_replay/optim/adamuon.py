"""AdaMuon (Si et al., arXiv 2507.11005): orthogonalised momentum, rescaled element by element.

    M <- momentum M + (1 - momentum) G
    O  = NewtonSchulz(sign(M))
    V <- momentum V + (1 - momentum) O^2
    W <- (1 - lr wd) W - lr 0.2 sqrt(rows columns) U / |U|        U = O / (sqrt(V) + eps)

for matrices inside layers; 0.2 is AdamW's usual root mean square, so that learning rates compare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay.optim.batch import Scalars
from megatron_replay.optim.muon import Matrix, MatrixRule

_RMS = 0.2


class AdaMuon(MatrixRule):
    """A step adds to MatrixRule's communication one all-reduce of [matrices] fp32 over TP."""

    def _matrix_updates(self, matrices: Sequence[Matrix], scalars: Scalars) -> list[Tensor]:
        updates = []
        orthogonals = self._orthogonalized(matrices, torch.sign)
        for (batch, item, piece), orthogonal in zip(matrices, orthogonals, strict=True):
            stored = item.state["exp_avg_sq"]
            variance = piece.gather(stored)
            weight = scalars.if_proceeding(1 - self.momentum).to(variance)
            variance = torch.lerp(variance, orthogonal.square(), weight)
            piece.scatter(variance, stored)
            updates.append(orthogonal / variance.sqrt().add_(batch.group["eps"]))
        if not updates:
            return []
        # Each rank has its part of |U|^2 of the whole matrix.
        squares = torch.stack([update.square().sum() for update in updates])
        if self._placement is not None:
            squares = squares.float()
            dist.all_reduce(squares, group=self._placement.tp_group)
        norms = squares.sqrt().clamp(min=torch.finfo(squares.dtype).tiny)
        return [
            update * (_RMS * math.sqrt(piece.numel) / norm)
            for update, norm, (_, _, piece) in zip(updates, norms, matrices, strict=True)
        ]
