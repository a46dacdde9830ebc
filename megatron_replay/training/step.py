"""One optimizer step: micro-batches, gradients, clipping, the finite check, the update."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_replay.checkpoint.load import LoadedModel
from megatron_replay.forward import Work, forward_backward
from megatron_replay.optim import MoClip
from megatron_replay.optim.build import set_learning_rate
from megatron_replay.parallel import Parallel


@dataclass(frozen=True)
class StepResult:
    """What a step did. ``loss`` is the mean over the global batch's positions, None before the
    last pipeline stage; ``skipped`` says that the gradient was not finite and nothing moved."""

    loss: float | None
    positions: int
    grad_norm: float
    skipped: bool
    angle: dict[str, float] | None


def wrap_for_training(model: LoadedModel) -> DistributedDataParallel:
    """Give the model fp32 main gradients, summed over DP when a step's last micro-batch is done."""
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(model.config, config, model.module)
    model.config.finalize_model_grads_func = finalize_model_grads
    return wrapped


def train_step(
    model: DistributedDataParallel,
    optimizer: MegatronOptimizer,
    work: list[Work],
    parallel: Parallel,
    *,
    lr: float,
    clip_grad: float,
) -> StepResult:
    """Take one step on the global batch of which ``work`` is this rank's share."""
    set_learning_rate(optimizer, lr)
    model.zero_grad_buffer()
    optimizer.zero_grad()
    sums = forward_backward(model, work)
    optimizer.prepare_grads()
    grad_norm = optimizer.clip_grad_norm(clip_grad) if clip_grad else optimizer.get_grad_norm()
    # The norm is reduced over TP x PP and the gradients over DP, so every rank sees the same
    # number and takes the same branch.
    skipped = not math.isfinite(grad_norm)
    if not skipped:
        optimizer.step_with_ready_grads()
    loss, positions = _global_mean(sums, parallel)
    rule = optimizer.optimizer
    angle = rule.last_angle if isinstance(rule, MoClip) and not skipped else None
    return StepResult(loss, positions, grad_norm, skipped, angle.as_floats() if angle else None)


def _global_mean(sums: torch.Tensor | None, parallel: Parallel) -> tuple[float | None, int]:
    if sums is None:
        return None, 0
    dist.all_reduce(sums, group=parallel.dp_group)
    total, count = sums.tolist()
    return (total / count if count else 0.0), int(count)
