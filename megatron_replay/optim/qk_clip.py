"""QK-Clip (Kimi K2, arXiv 2507.20534, Sec. 2.1): after a step, shrink heads with too large logits.

With S_h the largest attention logit of query head h in the step's batch, g the head's query group:

    gamma_h = min(1, tau / S_h)              by how much the logits of h shall shrink
    kappa_g = sqrt(max_{h in g} gamma_h)     what its key head takes
    W_q^h <- gamma_h / kappa_g W_q^h,  W_k^g <- kappa_g W_k^g

Logits are bilinear in the two, so each head's shrink by gamma_h, and no other head's change. With
one query head a group, both sides take sqrt(gamma_h), as in Kimi K2. A shared key takes only what
all its heads ask for, and the rest falls to the queries, as Kimi K2 does with its shared rotary
key. (megatron-core's clip_qk takes the group's smallest gamma for all: one hot head flattens the
attention of its calm neighbours.) A norm behind the projections, as in Qwen3, undoes any scaling:
there is nothing to clip.

Shapes: N query heads and G key heads on this rank, D channels, H hidden channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def qk_clip_factors(
    max_logits_N: Tensor, *, threshold: float, num_query_groups: int
) -> tuple[Tensor, Tensor]:
    """The factors of the query heads [N] and of the key heads [G]; exactly 1 where none is due.

    A logit that is not finite tells of a broken step, not of a large head: it clips nothing.

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
def scale_query_key_(weight: Tensor, query_N: Tensor, key_G: Tensor) -> None:
    """Scale a fused projection in place; value heads keep every bit.

    Args:
        weight: [(N + 2 G) D, H], per group its query heads, key head, value head: one TP rank's
            shard of megatron-core's ``linear_qkv``, or its fp32 master.
        query_N, key_G: of ``qk_clip_factors``.
    """
    assert weight.dim() == 2, "a whole projection, not ZeRO-1's flat part of a master"
    groups, heads_of_a_group = len(key_G), len(query_N) // len(key_G)
    heads = weight.unflatten(0, (groups, heads_of_a_group + 2, -1))  # [G, N / G + 2, D, H], a view
    heads[:, :-2].mul_(query_N.view(groups, -1, 1, 1))
    heads[:, -2].mul_(key_G.view(-1, 1, 1))


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
