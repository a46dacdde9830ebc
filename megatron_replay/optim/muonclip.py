"""MuonClip (Kimi K2, arXiv 2507.20534): Muon whose attention is kept from growing.

    M <- momentum M + (1 - momentum) G
    W <- (1 - lr wd) W - lr 0.2 sqrt(max(rows, columns)) NewtonSchulz(M)

for matrices inside layers; 0.2 sqrt(max) is AdamW's usual root mean square.

QK-Clip (Sec. 2.1 there) bounds the attention of models without QK-norm after a step. With S_h the
largest attention logit of query head h in the step's batch, and g the head's query group:

    gamma_h = min(1, tau / S_h)              the factor due to the logits of h
    kappa_g = sqrt(max_{h in g} gamma_h)     the factor of the group's key head
    W_q^h <- gamma_h / kappa_g W_q^h,  W_k^g <- kappa_g W_k^g    and their biases alike

Logits are bilinear in the two, so each head's shrink by gamma_h, and no other head's change. With
one query head a group, both sides take sqrt(gamma_h), as in Kimi K2. A shared key takes only what
is due to all its heads, and the queries take the rest, as with Kimi K2's shared rotary key.
(megatron-core's clip_qk takes the group's smallest gamma for all: one hot head flattens the
attention of its calm neighbours.)

A norm behind the projections, as in Qwen3, undoes any scaling. There the paper clips the gradient
of the attention layers instead; here that is each layer's own, over its query, key, value and
output projections, at a norm of 1.

Shapes: N query heads and G key heads on this rank, D channels, H hidden channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay.optim.batch import Place, Scalars
from megatron_replay.optim.muon import Matrix, MatrixRule

_RMS = 0.2


class MuonClip(MatrixRule):
    """Muon with a clip for attention.

    Attention is clipped where the model was placed (``distribute``): a list of tensors does not
    show which of them are a layer's attention. The layers' norms travel in the all-reduce of the
    step.
    """

    #: Norm to clip each attention layer's gradient at, after the whole gradient's clipping.
    attention_clip_grad = 1.0
    _attention_sq = torch.zeros(0)

    def _state_keys(self, place: Place) -> tuple[str, ...]:
        return ("exp_avg",) if place.orthogonal else super()._state_keys(place)

    def _sums(self, values: Tensor, places: Sequence[Place]) -> Tensor:
        """[1 + layers]: |g|^2 of the whole, and of each layer's attention."""
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

    def _matrix_updates(self, matrices: Sequence[Matrix], scalars: Scalars) -> list[Tensor]:
        updates = []
        for matrix, orthogonal in zip(matrices, self._orthogonalized(matrices), strict=True):
            rows, columns = orthogonal.shape
            numel, split_dim = matrix.piece.numel, matrix.piece.split_dim
            longer = max(rows, numel // rows) if split_dim == 1 else max(numel // columns, columns)
            updates.append(orthogonal * (_RMS * math.sqrt(longer)))
        return updates


def qk_clip_factors(
    max_logits_N: Tensor, *, threshold: float, num_query_groups: int
) -> tuple[Tensor, Tensor]:
    """The factors of the query heads [N] and of the key heads [G]; exactly 1 where none is due.

    A logit that is not finite comes from a broken step, not from a large head: it clips nothing.

    Args:
        max_logits_N: S_h; heads of a group side by side.
        threshold: tau > 0; Kimi K2 took 100.
        num_query_groups: G.
    """
    clips_N = (max_logits_N > threshold) & max_logits_N.isfinite()
    gamma_GR = torch.where(clips_N, threshold / max_logits_N, 1.0).unflatten(
        0, (num_query_groups, -1)
    )
    key_G = gamma_GR.amax(1).sqrt()
    return (gamma_GR / key_G[:, None]).flatten(), key_G


@torch.no_grad()
def scale_query_key_(fused: Tensor, query_N: Tensor, key_G: Tensor) -> None:
    """Scale a fused projection in place; value heads keep every bit.

    Args:
        fused: [(N + 2 G) D, H], or a bias without H; per group its query heads, key head, value
            head: one TP rank's shard of megatron-core's ``linear_qkv``, or its fp32 master, whole.
        query_N, key_G: of ``qk_clip_factors``.
    """
    groups, heads_of_a_group = len(key_G), len(query_N) // len(key_G)
    heads = fused.unflatten(0, (groups, heads_of_a_group + 2, -1))  # [G, N / G + 2, D, ...], a view
    channels = [1] * fused.dim()
    heads[:, :-2].mul_(query_N.view(groups, -1, *channels))
    heads[:, -2].mul_(key_G.view(-1, *channels))


def max_over_replicas(
    max_logits: Sequence[Tensor], group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Each layer's S_h over the batches of all data-parallel ranks, from this rank's [N] each.

    ``group``: the ranks that hold the same heads. Communication: one MAX all-reduce of layers x N
    fp32; none without a group.
    """
    stacked_LN = torch.stack(list(max_logits))
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(stacked_LN, op=dist.ReduceOp.MAX, group=group)
    return list(stacked_LN.unbind())
