"""Takes one optimizer step: micro-batches, gradients, update, and its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.profiler import record_function

from megatron_replay.checkpoint.load import LoadedModel
from megatron_replay.forward import MicroBatch, forward_backward
from megatron_replay.model.attention import take_max_logits
from megatron_replay.optim.build import set_learning_rate
from megatron_replay.optim.muonclip import max_over_replicas, qk_clip_factors, scale_query_key_
from megatron_replay.optim.rule import UpdateRule
from megatron_replay.parallel import Parallel


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The result of a step.

    Attributes:
        loss: mean over the global batch's positions; None before the last pipeline stage, and where
            the batch has no label.
        positions: their number.
        grad_norm: of the whole gradient before clipping.
        skipped: a loss or gradient was not finite, and nothing was updated.
        update: ``UpdateRule.report``, or {} if ``report`` was False.
        own_sums: sum of losses and positions of this rank's share, on the device; None before the
            last pipeline stage.
    """

    loss: float | None
    positions: int
    grad_norm: float
    skipped: bool
    update: dict[str, float]
    own_sums: torch.Tensor | None = None


class GradientBuffers(DistributedDataParallel):  # type: ignore[misc]
    """megatron-core's buffers, also for weights whose gradient is added to ``main_grad`` by rows.

    These are the head's and the embeddings'. Autograd gives them no ``grad``, without which
    megatron-core's hook refuses to overlap; but it still calls the hook once backward has passed
    all uses of the weight, tied or not.
    """

    def _make_backward_post_hook(self, param: torch.nn.Parameter) -> Callable[..., None]:
        hook: Callable[..., None] = super()._make_backward_post_hook(param)
        if not self.ddp_config.overlap_grad_reduce:
            return hook

        def add_if_any(*_: Any) -> None:
            if param.grad is not None:
                hook()
            else:
                group = self.param_to_bucket_group[param]
                group.register_grad_ready(param, self.force_all_reduce)

        return add_if_any


def wrap_for_training(
    model: LoadedModel,
    *,
    use_distributed_optimizer: bool = False,
    overlap_grad_reduce: bool = False,
    bucket_size: int | None = None,
) -> DistributedDataParallel:
    """Give the model fp32 main gradients, summed over DP when a step's last micro-batch is done.

    ``overlap_grad_reduce``: in buckets of ``bucket_size`` numbers or more (None: megatron-core's
    40 million), each as soon as backward has passed its weights, on the first stage; the other
    stages have one bucket. A run's first step does not overlap: it counts the weights' uses.
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=use_distributed_optimizer,
        overlap_grad_reduce=overlap_grad_reduce,
        bucket_size=bucket_size,
    )
    wrapped = GradientBuffers(model.config, config, model.module)
    model.config.finalize_model_grads_func = finalize_model_grads
    # The schedule leaves this context before the last micro-batch.
    model.config.no_sync_func = wrapped.no_sync if overlap_grad_reduce else None
    return wrapped


def train_step(
    model: DistributedDataParallel,
    optimizer: MegatronOptimizer,
    micro_batches: list[MicroBatch],
    parallel: Parallel,
    *,
    lr: float,
    report: bool = True,
    qk_clip_threshold: float | None = None,
) -> StepResult:
    """Take one step on the global batch of which ``micro_batches`` is this rank's share.

    ``qk_clip_threshold``: apply QK-Clip after the step, from the logits that ``record_max_logits``
    recorded; None: no QK-Clip.
    """
    rule: UpdateRule = optimizer.optimizer
    set_learning_rate(optimizer, lr)
    model.zero_grad_buffer()
    optimizer.zero_grad()
    sums = forward_backward(model, micro_batches)
    # The rule clips and checks for non-finite values, over the whole model's sums and with
    # gradients reduced over DP, so every rank takes the same branch.
    skipped_before = rule.skipped_steps
    with record_function("optimizer"):
        optimizer.prepare_grads()
        optimizer.step_with_ready_grads()
    skipped = rule.skipped_steps > skipped_before
    if qk_clip_threshold is not None:
        # Taken after a skipped step too, so that its logits do not count for the next one.
        measured = take_max_logits(model)
        if not skipped:
            _clip_attention(measured, model, parallel, threshold=qk_clip_threshold)
    own_sums = None if sums is None else sums.clone()
    loss, positions = _global_mean(sums, parallel)
    assert rule.grad_norm is not None
    return StepResult(
        loss=loss,
        positions=positions,
        grad_norm=rule.grad_norm,
        skipped=skipped,
        update=rule.report() if report else {},
        own_sums=own_sums,
    )


def _global_mean(sums: torch.Tensor | None, parallel: Parallel) -> tuple[float | None, int]:
    if sums is None:
        return None, 0
    dist.all_reduce(sums, group=parallel.dp_group)
    total, count = sums.tolist()
    return (total / count if count else None), int(count)


def _clip_attention(
    measured: list[tuple[list[torch.Tensor], torch.Tensor]],
    model: DistributedDataParallel,
    parallel: Parallel,
    *,
    threshold: float,
) -> None:
    """QK-Clip of every layer of this stage, on its fp32 masters. One all-reduce over DP."""
    projections, logits = zip(*measured, strict=True)
    groups = model.config.num_query_groups // parallel.tp_size
    for tensors, logits_N in zip(
        projections, max_over_replicas(logits, parallel.dp_group), strict=True
    ):
        factors = qk_clip_factors(logits_N, threshold=threshold, num_query_groups=groups)
        for tensor in tensors:
            master = getattr(tensor, "main_param", tensor)
            scale_query_key_(master, *factors)
            if master is not tensor:
                tensor.data.copy_(master)
