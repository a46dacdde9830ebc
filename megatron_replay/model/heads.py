"""The heads of Stage 1, applied to the last hidden states: the losses and the probe.

Each function binds a micro-batch's positions and sets, on the device, to a ``Head``.

Shapes: N selected positions, H hidden channels, V rows of this rank's shard of the output layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_replay.loss.backends import HeadBackend
from megatron_replay.loss.candidate_sets import CandidateSets
from megatron_replay.loss.divergence import Divergence, with_divergence
from megatron_replay.loss.sharded import (
    cross_entropy_of_sets,
    outside_mass,
    vocab_parallel_cross_entropy,
)
from megatron_replay.model.gpt import Head
from megatron_replay.model.selected_rows import HiddenStates
from megatron_replay.parallel import Parallel


def restricted_loss(
    rows_N: Tensor,
    sets: CandidateSets,
    parallel: Parallel,
    *,
    backend: HeadBackend,
    tail_logit_N: Tensor | None = None,
    divergence: Divergence | None = None,
) -> Head:
    """Loss [N] of each position over its candidates (``loss.definition``).

    Args:
        sets: cut to this rank's rows.
        tail_logit_N: the ghost term's logit, if there is one.
        divergence: what is added to the loss, if anything.
    """

    def head(hidden: HiddenStates, weight_VH: Tensor) -> Tensor:
        hidden_NH = hidden[rows_N]
        loss_N = cross_entropy_of_sets(
            hidden_NH,
            weight_VH,
            sets,
            backend=backend,
            tail_logit_N=tail_logit_N,
            tp_group=parallel.tp_group,
            reduce_hidden_grad=False,  # HiddenStates does it
            weight_grad_out=_main_grad(weight_VH),
        )
        return _with(divergence, loss_N, hidden_NH, weight_VH, parallel)

    return head


def full_loss(
    rows_N: Tensor,
    labels_N: Tensor,
    parallel: Parallel,
    *,
    vocab_size: int,
    divergence: Divergence | None = None,
) -> Head:
    """Loss [N] of the full softmax at ``rows_N``, and the divergence, if there is one."""

    def head(hidden: HiddenStates, weight_VH: Tensor) -> Tensor:
        hidden_NH = hidden[rows_N]
        loss_N = vocab_parallel_cross_entropy(
            hidden_NH,
            weight_VH,
            labels_N,
            vocab_start=parallel.vocabulary_shard(vocab_size).start,
            tp_group=parallel.tp_group,
            weight_grad_out=_main_grad(weight_VH),
            reduce_hidden_grad=False,
        )
        return _with(divergence, loss_N, hidden_NH, weight_VH, parallel)

    return head


def _with(
    divergence: Divergence | None,
    loss_N: Tensor,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    parallel: Parallel,
) -> Tensor:
    """The loss and the divergence, if there is one."""
    if divergence is None:
        return loss_N
    return with_divergence(
        loss_N,
        hidden_NH,
        weight_VH,
        divergence.targets,
        kl_weight=divergence.weight,
        tp_group=parallel.tp_group,
        reduce_hidden_grad=False,
        weight_grad_out=_main_grad(weight_VH),
    )


def probe(rows_N: Tensor, sets: CandidateSets, parallel: Parallel) -> Head:
    """Sums over the N positions: outside mass, restricted loss, full-softmax loss, and N. fp32 [4].

    The restricted loss is the full one plus log(1 - outside mass), so one pass over the vocabulary
    gives all three.
    """

    def head(hidden: HiddenStates, weight_VH: Tensor) -> Tensor:
        outside_N, full_loss_N = outside_mass(
            hidden[rows_N], weight_VH, sets, tp_group=parallel.tp_group
        )
        # Clamped below one: where rounding puts all mass outside, the loss is large, not -inf.
        restricted_N = full_loss_N + torch.log1p(-outside_N.clamp(max=1 - 2**-24))
        count = torch.tensor(float(outside_N.numel()), device=outside_N.device)
        return torch.stack([outside_N.sum(), restricted_N.sum(), full_loss_N.sum(), count])

    return head


def _main_grad(weight_VH: Tensor) -> Tensor | None:
    """The fp32 sum of the weight's gradient over micro-batches; None outside of training.

    A tied embedding adds to the same tensor.
    """
    return getattr(weight_VH, "main_grad", None)
