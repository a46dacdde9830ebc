"""What AdaMuon and MuonClip share: matrices inside layers are orthogonalised, the rest is AdamW's.

Embeddings, the output layer and vectors take AdamW's step (Jordan et al., 2024). A matrix means one
of the model, never a process's block of it nor megatron-core's fusions: q, k, v, gate and up are
matrices of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_replay.optim.adamw import coefficients_of
from megatron_replay.optim.base import UpdateRule
from megatron_replay.optim.batch import Batch, Scalars
from megatron_replay.optim.newton_schulz import newton_schulz, on_whole_matrices
from megatron_replay.optim.placement import Piece, Place


class MatrixRule(UpdateRule):
    """Base of the rules that orthogonalise.

    A step adds two all-to-alls for as many matrices as there are tensor parallel ranks
    (``on_whole_matrices``). Every data parallel replica does the same work.

    Args:
        momentum: decay of the momentum of matrices; ``betas`` are AdamW's, for the rest.
        newton_schulz_steps: iterations of the quintic.
        Others: as in UpdateRule. A group with ``orthogonalize=False`` keeps its matrices from it:
        embeddings and output layers belong there.
    """

    own: ClassVar[tuple[str, ...]] = (
        *UpdateRule.own,
        *"momentum newton_schulz_steps".split(),
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.95,
        newton_schulz_steps: int = 5,
        **settings: Any,
    ) -> None:
        self._require("momentum", 0 <= momentum < 1, "0 to below 1", momentum)
        self._require(
            "newton_schulz_steps", newton_schulz_steps > 0, "above 0", newton_schulz_steps
        )
        self.momentum, self.newton_schulz_steps = momentum, newton_schulz_steps
        super().__init__(params, lr, betas, eps, weight_decay, **settings)

    def _kind(self, place: Place) -> object:
        return place.orthogonal

    def _move(self, batch: Batch, scalars: Scalars) -> Tensor:
        if not batch.places[0].orthogonal:
            return batch.take_step(coefficients_of(batch, scalars), bounded=False)
        for i, (grad, state) in enumerate(zip(batch.grads, batch.states, strict=True)):
            clipped = scalars.if_proceeding(grad) * self._clip(batch.places[i], scalars)
            weight = scalars.if_proceeding(1 - self.momentum).to(grad)
            state["exp_avg"].lerp_(clipped, weight)
        return torch.zeros(len(batch.params), device=scalars.grad_sq.device)

    def _clip(self, place: Place, scalars: Scalars) -> Tensor:
        """What the gradient is multiplied by."""
        return scalars.if_proceeding(scalars.clip)

    def _complete(self, batches: Sequence[Batch], scalars: Scalars) -> Tensor:
        batches = [batch for batch in batches if batch.places[0].orthogonal]
        pieces = [
            (batch, i, piece)
            for batch in batches
            for i, place in enumerate(batch.places)
            for piece in place.pieces
        ]
        total = torch.zeros_like(scalars.grad_sq)
        for (batch, i, piece), update in zip(pieces, self._updates(pieces, scalars), strict=True):
            lr, decay = batch.group["lr"], batch.group["weight_decay"]
            param = piece.gather(batch.params[i])
            moved = param * (1 - scalars.if_proceeding(lr * decay)) - update * (
                scalars.if_proceeding(lr)
            )
            piece.scatter(moved, batch.params[i])
            total += update.square().sum() * batch.places[i].counts
        for batch in batches:
            batch.write_copies()
        return total

    def _updates(
        self, pieces: Sequence[tuple[Batch, int, Piece]], scalars: Scalars
    ) -> list[Tensor]:
        """What each matrix moves by at a learning rate of 1."""
        raise NotImplementedError

    def _orthogonalized(
        self,
        pieces: Sequence[tuple[Batch, int, Piece]],
        prepare: Callable[[Tensor], Tensor] = lambda momentum: momentum,
    ) -> list[Tensor]:
        """U V^T of ``prepare(m)`` of each whole matrix, as far as it is held here."""
        group = self._placement.tp_group if self._placement is not None else None
        return on_whole_matrices(
            lambda matrix: newton_schulz(matrix, steps=self.newton_schulz_steps),
            [prepare(piece.gather(batch.states[i]["exp_avg"])) for batch, i, piece in pieces],
            [piece.split_dim for _, _, piece in pieces],
            group=group,
        )
