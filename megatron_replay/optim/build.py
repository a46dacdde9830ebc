"""From settings to a megatron-core optimizer around one of our update rules.

megatron-core has no registry of optimizers: its own factory knows Adam and SGD. Here is the same
assembly (parameter groups with Megatron's weight-decay exclusions, fp32 masters for bf16, gradient
statistics over the model-parallel group) around any torch optimizer.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.optimizer import (
    OptimizerConfig as MegatronOptimizerConfig,
)
from megatron.core.optimizer import (
    _get_param_groups,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_replay.config import OptimizerConfig
from megatron_replay.optim.moclip import MoClip
from megatron_replay.parallel import Parallel


def build_optimizer(
    config: OptimizerConfig, model: torch.nn.Module, parallel: Parallel, *, bf16: bool
) -> MegatronOptimizer:
    """The optimizer of ``model`` (wrapped in megatron-core's DistributedDataParallel)."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    settings = MegatronOptimizerConfig(
        optimizer="adam",  # read by megatron-core for defaults only; the rule is ours
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        clip_grad=config.clip_grad,
        bf16=bf16,
        params_dtype=dtype,
    )
    groups = _get_param_groups([model], settings, get_standard_config_overrides(settings))
    rule = _update_rule(config, groups)
    if bf16:
        wrapped = Float16OptimizerWithFloat16Params(rule, settings, None, _create_state)
    else:
        wrapped = FP32Optimizer(rule, settings, _create_state)
    wrapped.grad_stats_parallel_group = parallel.model_group
    wrapped.tp_group = parallel.tp_group
    if isinstance(rule, MoClip):
        counts = functools.partial(counts_once, tp_group=parallel.tp_group)
        rule.reduce_angle_over(parallel.model_group, counts)
    apply_hyperparameters(wrapped, config)
    return wrapped


def _update_rule(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    common: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, eps=config.adam_eps, **common)
    return MoClip(
        groups,
        max_angle=config.max_angle,
        obtuse=config.obtuse,
        obtuse_patience=config.obtuse_patience,
        second_moment=config.second_moment,
        atan_a=config.atan_a,
        atan_b=config.atan_b,
        **common,
    )


def counts_once(param: torch.Tensor, *, tp_group: Any) -> bool:
    """Whether ``param`` enters this rank's share of a sum over the whole model.

    A weight that every TP rank holds whole (a norm) counts on TP rank 0; the last stage's copy of a
    tied embedding does not count, since the first stage's does.
    """
    return bool(
        param_is_not_shared(param)
        and param_is_not_tensor_parallel_duplicate(param, tp_group=tp_group)
    )


def apply_hyperparameters(optimizer: MegatronOptimizer, config: OptimizerConfig) -> None:
    """Set decay and betas: what a resumed run is given wins over what was stored."""
    for group in optimizer.param_groups:
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
        group["betas"] = (config.adam_beta1, config.adam_beta2)


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]


def _create_state(optimizer: torch.optim.Optimizer, _: Any = None) -> None:
    """Create AdamW's state for every parameter, so that a checkpoint can be loaded into it."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if not optimizer.state[param]:
                optimizer.state[param] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }
