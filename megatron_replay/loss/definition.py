"""Defines the loss: cross-entropy over candidate sets (arXiv 2510.09152, Eq. 3), in dense torch.

For a position with hidden state h, logits z = W h over the vocabulary, label x and a candidate set
S that holds x:

    L         = -z[x] + log Z,            Z = sum_{j in S} exp z[j] + exp t
    p~[j]     = exp(z[j]) / Z
    dL/dz[j]  = p~[j] - [j = x]           for j in S, and exactly 0 outside

t is the logit of one more term, a constant: -inf (the paper's loss), or with ``--tail ghost`` that
of the base model's mass outside S, t = lse_base + log rho_base. ``--kl-weight`` beta adds a
divergence from the base model's distribution q over the position's own set:

    L + beta KL(q || p~),                 d/dz[j] = (1 + beta) p~[j] - [j = x] - beta q[j]

The probability that the trained model moves out of S is the outside mass,
rho = 1 - sum_{j in S} softmax(z)[j]; with t = -inf, rho = 1 - exp(L - L_full).

Everything else in this package computes the same numbers without forming [T, V]: ``candidate_sets``
holds S, ``sharded`` sums over tensor-parallel ranks, ``backends`` defines what runs on one rank.
Tests compare them with these functions in float64.

Shapes: T positions, V vocabulary.
"""

from __future__ import annotations

import math

from torch import Tensor


def restricted_cross_entropy_dense(
    logits_TV: Tensor,
    candidate_mask_TV: Tensor,
    labels_T: Tensor,
    tail_logit_T: Tensor | None = None,
) -> Tensor:
    """L of each position.

    Args:
        logits_TV: [T, V] over the whole vocabulary.
        candidate_mask_TV: bool [T, V], True inside S; the label must be inside.
        labels_T: int64 [T].
        tail_logit_T: t, -inf for none.

    Returns:
        Loss [T], nats, in the dtype of the logits.
    """
    lse_T = logits_TV.masked_fill(~candidate_mask_TV, -math.inf).logsumexp(1)
    if tail_logit_T is not None:
        lse_T = lse_T.logaddexp(tail_logit_T)
    return lse_T - logits_TV.gather(1, labels_T[:, None]).squeeze(1)
