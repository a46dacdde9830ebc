"""What Stage 1 does with the last hidden states: the losses, and the probe beside them.

Each function binds a micro-batch's targets to a ``Head``. N selected positions, H hidden channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_replay.data.replay import ReplayTargets
from megatron_replay.functional.full_cross_entropy import (
    outside_mass,
    vocab_parallel_cross_entropy,
)
from megatron_replay.functional.restricted_cross_entropy import (
    cross_entropy_of_shard,
    restricted_cross_entropy,
)
from megatron_replay.functional.shard_head import HeadForm, ShardSets, VocabShard
from megatron_replay.functional.soft_targets import SoftTargets, with_divergence
from megatron_replay.functional.tiled_head import union_head
from megatron_replay.model.gpt import Head
from megatron_replay.model.rows import HiddenStates
from megatron_replay.parallel import Parallel


def restricted_loss(
    targets: ReplayTargets, parallel: Parallel, *, ghost: bool, form: HeadForm = union_head
) -> Head:
    """Loss [N] over the candidates of each position (Eq. 3), with the ghost term if asked for."""

    def head(hidden: HiddenStates, weight_VH: Tensor) -> Tensor:
        return restricted_cross_entropy(
            hidden[targets.rows_N],
            weight_VH,
            targets.candidate_ids,
            targets.candidate_offsets,
            targets.labels_N,
            group_offsets=targets.group_offsets,
            tail_logit_T=targets.tail_logit_N if ghost else None,
            vocab_start=parallel.tp_rank * len(weight_VH),
            tp_group=parallel.tp_group,
            form=form,
            weight_grad_out=_main_grad(weight_VH),
            reduce_hidden_grad=False,  # done where the rows came from
            validate=False,  # the reader and the join have checked every set
        )

    return head


def shard_loss(
    rows_N: Tensor,
    labels_N: Tensor,
    sets: ShardSets,
    shard: VocabShard,
    parallel: Parallel,
    *,
    tail_logit_N: Tensor | None,
    form: HeadForm,
    soft_targets: SoftTargets | None = None,
    kl_weight: float = 0.0,
) -> Head:
    """``restricted_loss`` of sets that the loader has cut to this rank's ``shard``.

    With ``soft_targets``, ``kl_weight`` times the divergence from them is added.
    """

    def head(hidden: HiddenStates, weight_VH: Tensor) -> Tensor:
        hidden_NH, weight_grad_out = hidden[rows_N], _main_grad(weight_VH)
        loss_N = cross_entropy_of_shard(
            hidden_NH,
            weight_VH,
            sets,
            labels_N,
            shard,
            form=form,
            tail_logit_T=tail_logit_N,
            tp_group=parallel.tp_group,
            reduce_hidden_grad=False,
            weight_grad_out=weight_grad_out,
        )
        if soft_targets is None:
            return loss_N
        return with_divergence(
            loss_N,
            hidden_NH,
            weight_VH,
            soft_targets,
            kl_weight=kl_weight,
            tp_group=parallel.tp_group,
            reduce_hidden_grad=False,
            weight_grad_out=weight_grad_out,
        )

    return head


def full_loss(rows_N: Tensor, labels_N: Tensor, parallel: Parallel) -> Head:
    """Loss [N] of the full softmax at ``rows_N``."""

    def head(hidden: HiddenStates, weight_VH: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(
            hidden[rows_N],
            weight_VH,
            labels_N,
            vocab_start=parallel.tp_rank * len(weight_VH),
            tp_group=parallel.tp_group,
            weight_grad_out=_main_grad(weight_VH),
            reduce_hidden_grad=False,
        )

    return head


def probe(targets: ReplayTargets, parallel: Parallel) -> Head:
    """Sums over the N positions: outside mass, restricted loss, full-softmax loss, and N. fp32 [4].

    With z the current logits: outside mass = 1 - sum_S p; the restricted loss is the full one plus
    log(1 - outside mass), so one pass over the vocabulary gives all three.
    """

    def head(hidden: HiddenStates, weight_VH: Tensor) -> Tensor:
        outside_N, full_loss_N = outside_mass(
            hidden[targets.rows_N],
            weight_VH,
            targets.candidate_ids,
            targets.candidate_offsets,
            targets.labels_N,
            group_offsets=targets.group_offsets,
            vocab_start=parallel.tp_rank * len(weight_VH),
            tp_group=parallel.tp_group,
        )
        # Below one: where rounding puts all mass outside, the loss is large, not -inf.
        restricted_N = full_loss_N + torch.log1p(-outside_N.clamp(max=1 - 2**-24))
        count = torch.tensor(float(outside_N.numel()), device=outside_N.device)
        return torch.stack([outside_N.sum(), restricted_N.sum(), full_loss_N.sum(), count])

    return head


def _main_grad(weight_VH: Tensor) -> Tensor | None:
    """Where the weight's gradient is summed in fp32 over micro-batches; None outside of training.

    Tied embeddings add to the same rows.
    """
    return getattr(weight_VH, "main_grad", None)
