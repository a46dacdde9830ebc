"""A megatron-core optimizer around one of our update rules, and its learning rate.

megatron-core has no registry of optimizers: its own factory builds Adam and SGD. Here is the same
assembly (parameter groups with Megatron's weight-decay exclusions, fp32 masters for bf16, state
sharded over data parallel ranks) around any of ours.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    OptimizerConfig as MegatronOptimizerConfig,
)
from megatron.core.optimizer import (
    _get_param_groups,
    get_standard_config_overrides,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)

from megatron_replay.checkpoint.load import LoadedModel
from megatron_replay.config import OptimizerConfig
from megatron_replay.errors import ConfigError
from megatron_replay.optim import TAM, AdaMuon, AdamW, MoClip, MoFO, MuonClip
from megatron_replay.optim.model_placement import place_model
from megatron_replay.optim.momentum_step import OPTIMIZER
from megatron_replay.optim.rule import UpdateRule
from megatron_replay.parallel import Parallel
from megatron_replay.platform.megatron_core import torch_optimizer_state

#: Each rule, and its own settings: attribute of ``OptimizerConfig`` by argument.
_RULES: dict[str, tuple[type[UpdateRule], dict[str, str]]] = {
    "adamw": (AdamW, {}),
    "moclip": (
        MoClip,
        {"max_angle": "max_angle", "obtuse": "obtuse", "angle_scope": "angle_scope"},
    ),
    "mofo": (MoFO, {"fraction": "mofo_fraction"}),
    "tam": (TAM, {"angle_scope": "angle_scope"}),
    "adamuon": (AdaMuon, {}),
    "muonclip": (MuonClip, {}),
}


class MixedPrecision(Float16OptimizerWithFloat16Params):
    """bf16 weights under fp32 masters; the update's pass over memory writes both."""

    def _copy_main_params_to_model_params(self) -> None: ...


class Sharded(DistributedOptimizer):
    """State sharded over data parallel ranks; the update's pass over memory writes both weights."""

    def _copy_main_params_to_model_params(self) -> None: ...

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients. megatron-core's reads those of views first, which warns."""
        for groups in (
            self.model_float16_groups,
            self.model_fp32_groups,
            self.shard_fp32_groups,
            self.shard_fp32_from_float16_groups,
        ):
            for param in (param for group in groups for param in group):
                param.grad = None

    def state_dict(self) -> Any:
        """As megatron-core's, with our rules' state, which is torch's, even with apex installed."""
        with torch_optimizer_state():
            return super().state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """The counterpart of ``state_dict``."""
        with torch_optimizer_state():
            super().load_state_dict(state_dict)

    def _set_main_param_and_optimizer_states(self, model_param: Any, tensors: Any) -> None:
        # megatron-core expects every state here, yet loads the count of steps elsewhere.
        step = self._get_main_param_and_optimizer_states(model_param)["step"]
        super()._set_main_param_and_optimizer_states(model_param, {"step": step, **tensors})


def build_optimizer(
    config: OptimizerConfig,
    model: LoadedModel,
    wrapped: DistributedDataParallel,
    parallel: Parallel,
) -> MegatronOptimizer:
    """The optimizer of ``model``, which is ``wrapped`` for training.

    Raises:
        ConfigError: QK-Clip for a model whose QK-norm undoes it.
    """
    if config.qk_clip_threshold is not None and model.shape.qk_layernorm:
        raise ConfigError(
            "QK-Clip would do nothing: this model's QK-norm undoes any scaling of its projections",
            where="--qk-clip-threshold",
            fix="Leave it out; MuonClip clips each attention layer's gradient instead",
        )
    bf16 = model.config.bf16
    settings = MegatronOptimizerConfig(
        optimizer="adam",  # read by megatron-core for defaults only; the rule is ours
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        clip_grad=config.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=config.use_distributed_optimizer,
    )
    rule_class, own = _RULES[config.optimizer]
    rule = rule_class(
        _get_param_groups([wrapped], settings, get_standard_config_overrides(settings)),
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        clip_grad=config.clip_grad,
        **{argument: getattr(config, name) for argument, name in own.items()},
    )
    optimizer: MegatronOptimizer
    if config.use_distributed_optimizer:
        optimizer = Sharded(
            rule,
            settings,
            None,
            _create_state,
            model_chunks=[wrapped],
            per_model_buffers={0: wrapped.buffers},
            data_parallel_group=parallel.dp_group,
            data_parallel_group_gloo=None,
            data_parallel_group_idx=torch.distributed.get_rank(parallel.model_group),
            distributed_optimizer_instance_id=0,
        )
    elif bf16:
        optimizer = MixedPrecision(rule, settings, None, _create_state)
    else:
        optimizer = FP32Optimizer(rule, settings, _create_state)
    placement, copies = place_model(optimizer, model, parallel)
    optimizer.grad_stats_parallel_group = placement.model_group
    optimizer.tp_group = parallel.tp_group
    rule.distribute(placement, copies)
    apply_hyperparameters(optimizer, config)
    # A checkpoint is loaded into state that exists.
    _create_state(rule)
    return optimizer


def kernels_of(optimizer: MegatronOptimizer) -> str:
    """Which backend runs the update's passes, for a log."""
    param = next(p for group in optimizer.param_groups for p in group["params"])
    return OPTIMIZER.describe(optimizer.optimizer.backend, param)


def state_kind(config: OptimizerConfig) -> str:
    """Optimizers of one kind can resume from each other's checkpoints; others cannot."""
    return config.optimizer if config.optimizer in ("adamuon", "muonclip") else "adam"


def apply_hyperparameters(optimizer: MegatronOptimizer, config: OptimizerConfig) -> None:
    """Set decay and betas: a resumed run's settings replace those in the checkpoint."""
    for group in optimizer.param_groups:
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
        group["betas"] = (config.adam_beta1, config.adam_beta2)


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]


def learning_rate(iteration: int, config: OptimizerConfig, train_iters: int) -> float:
    """Learning rate of ``iteration`` (from 0), in the shapes of Megatron's scheduler.

    A pure function of the iteration, so there is nothing to save. With w = ``lr_warmup_iters``:
    lr (k + 1) / w for k < w, so that the first iteration moves too (Megatron's does not); then from
    ``lr`` at k = w along ``lr_decay_style`` to ``min_lr`` at k = ``train_iters``, one after the
    last. ``constant`` stays at ``lr``.
    """
    warmup = config.lr_warmup_iters
    if iteration < warmup:
        return config.lr * (iteration + 1) / warmup
    if config.lr_decay_style == "constant":
        return config.lr
    done = (iteration - warmup) / max(1, train_iters - warmup)
    left = 1 - done if config.lr_decay_style == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.min_lr + (config.lr - config.min_lr) * max(0.0, left)


def _create_state(rule: UpdateRule, _: Any = None) -> None:
    """Create every parameter's state, so that a checkpoint can be loaded into it."""
    for group in rule.param_groups:
        for param in group["params"]:
            if not rule.state[param]:
                rule.create_state(param, group)
