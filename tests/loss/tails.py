"""The divergence from stored logits, by its definition in float64.

Shapes: T positions, V vocabulary, H hidden channels, C candidates of all positions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatron_replay.loss.backends import HeadBackend
from megatron_replay.loss.blocks import UNION
from megatron_replay.loss.candidate_sets import CandidateSets
from megatron_replay.loss.divergence import SoftTargets, with_divergence
from megatron_replay.loss.sharded import restricted_cross_entropy
from tests.loss.references import HeadCase


def own_sets(case: HeadCase, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, offsets and stored logits of sets inside ``case``'s, each with its label."""
    generator = torch.Generator().manual_seed(seed)
    mask_TV = case.mask_TV & (torch.rand(case.mask_TV.shape, generator=generator) < 0.7)
    mask_TV[torch.arange(len(mask_TV)), case.labels_T] = True
    offsets = torch.nn.functional.pad(mask_TV.sum(1).cumsum(0), (1, 0))
    ids = mask_TV.nonzero()[:, 1].int()
    return ids, offsets, torch.randn(len(ids), generator=generator) * 3


def soft_targets(
    labels_T: Tensor, ids: Tensor, offsets: Tensor, logits: Tensor, start: int, num_rows: int
) -> SoftTargets:
    sets = CandidateSets.of(
        ids.numpy(), offsets.numpy(), labels_T.numpy(), vocab_size=start + num_rows,
        values=logits.numpy(),
    )  # fmt: skip
    return SoftTargets.of(sets, start, num_rows)


def run(
    case: HeadCase,
    *,
    own: tuple[Tensor, Tensor, Tensor] | None = None,
    kl_weight: float = 0.0,
    backend: HeadBackend = UNION,
    vocab_start: int = 0,
    weight_VH: Tensor | None = None,
    tp_group: Any = None,
    out: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Loss, dH and dW of a shard; ``out``: dW by way of ``weight_grad_out``."""
    hidden_TH = case.hidden_TH.detach().to(dtype).requires_grad_()
    weight_VH = case.weight_VH if weight_VH is None else weight_VH
    weight_VH = weight_VH.detach().to(dtype).clone().requires_grad_()
    weight_grad_out = torch.zeros(weight_VH.shape) if out else None
    sets = (case.ids, case.offsets, case.labels_T)
    options: dict[str, Any] = {"tp_group": tp_group, "weight_grad_out": weight_grad_out}
    loss_T = restricted_cross_entropy(
        hidden_TH, weight_VH, *sets, vocab_start=vocab_start, backend=backend,
        group_offsets=case.group_offsets, **options,
    )  # fmt: skip
    if own is not None:
        targets = soft_targets(case.labels_T, *own, vocab_start, len(weight_VH))
        loss_T = with_divergence(
            loss_T, hidden_TH, weight_VH, targets, kl_weight=kl_weight, **options
        )
    (loss_T * case.upstream_T).sum().backward()
    weight_grad = weight_grad_out if out else weight_VH.grad
    assert hidden_TH.grad is not None
    assert weight_grad is not None
    return [loss_T.detach(), hidden_TH.grad, weight_grad]


def dense(
    case: HeadCase,
    *,
    own: tuple[Tensor, Tensor, Tensor] | None = None,
    kl_weight: float = 0.0,
) -> list[Tensor]:
    """The same through [T, V]: log p~ of every id that counts."""

    def loss(z_TV: Tensor) -> Tensor:
        log_p_TV = z_TV - z_TV.masked_fill(~case.mask_TV, -math.inf).logsumexp(1, keepdim=True)
        loss_T = -log_p_TV.gather(1, case.labels_T[:, None]).squeeze(1)
        if own is None:
            return loss_T
        ids, offsets, logits = own
        divergences = []
        for t in range(len(loss_T)):
            span = slice(int(offsets[t]), int(offsets[t + 1]))
            log_q = logits[span].double().log_softmax(0)
            divergences.append((log_q.exp() * (log_q - log_p_TV[t, ids[span].long()])).sum())
        return loss_T + kl_weight * torch.stack(divergences)

    return case.through(loss)
