"""From settings to a megatron-core optimizer around one of our update rules.

megatron-core has no registry of optimizers: its own factory knows Adam and SGD. Here is the same
assembly (parameter groups with Megatron's weight-decay exclusions, fp32 masters for bf16, state
sharded over data parallel ranks) around any of ours.
"""

from __future__ import annotations

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
from megatron_replay.optim.adamuon import AdaMuon
from megatron_replay.optim.adamw import AdamW
from megatron_replay.optim.base import UpdateRule
from megatron_replay.optim.moclip import MoClip
from megatron_replay.optim.model_placement import place_model
from megatron_replay.optim.mofo import MoFO
from megatron_replay.optim.momentum_step import OPTIMIZER
from megatron_replay.optim.muonclip import MuonClip
from megatron_replay.optim.tam import TAM
from megatron_replay.parallel import Parallel
from megatron_replay.platform.megatron_core import torch_optimizer_state


class MixedPrecision(Float16OptimizerWithFloat16Params):
    """bf16 weights under fp32 masters; the update's pass over memory writes both."""

    def _copy_main_params_to_model_params(self) -> None: ...


class Sharded(DistributedOptimizer):
    """State sharded over data parallel ranks; the update's pass over memory writes both weights."""

    def _copy_main_params_to_model_params(self) -> None: ...

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients; megatron-core's asks for those of views first, which warns."""
        for groups in (
            self.model_float16_groups,
            self.model_fp32_groups,
            self.shard_fp32_groups,
            self.shard_fp32_from_float16_groups,
        ):
            for param in (param for group in groups for param in group):
                param.grad = None

    def state_dict(self) -> Any:
        """As megatron-core's, with our rules' state, which is torch's, also beside apex."""
        with torch_optimizer_state():
            return super().state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """The counterpart of ``state_dict``."""
        with torch_optimizer_state():
            super().load_state_dict(state_dict)

    def _set_main_param_and_optimizer_states(self, model_param: Any, tensors: Any) -> None:
        # megatron-core asks for every state, yet loads the count of steps elsewhere.
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
    groups = _get_param_groups([wrapped], settings, get_standard_config_overrides(settings))
    rule = _update_rule(config, groups)
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


def _update_rule(config: OptimizerConfig, groups: list[dict[str, Any]]) -> UpdateRule:
    common: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.weight_decay,
        "clip_grad": config.clip_grad,
    }
    if config.optimizer == "moclip":
        return MoClip(
            groups,
            max_angle=config.max_angle,
            obtuse=config.obtuse,
            angle_scope=config.angle_scope,
            **common,
        )
    if config.optimizer == "adamw":
        return AdamW(groups, **common)
    if config.optimizer == "mofo":
        return MoFO(groups, fraction=config.mofo_fraction, **common)
    if config.optimizer == "tam":
        return TAM(groups, angle_scope=config.angle_scope, **common)
    if config.optimizer == "adamuon":
        return AdaMuon(groups, **common)
    return MuonClip(groups, **common)


def kernels_of(optimizer: MegatronOptimizer) -> str:
    """Which form of the update's passes runs, for a log."""
    param = next(p for group in optimizer.param_groups for p in group["params"])
    return OPTIMIZER.describe(optimizer.optimizer.backend, param)


def state_kind(config: OptimizerConfig) -> str:
    """Optimizers of one kind go on with each other's checkpoints; others have other state."""
    return config.optimizer if config.optimizer in ("adamuon", "muonclip") else "adam"


def apply_hyperparameters(optimizer: MegatronOptimizer, config: OptimizerConfig) -> None:
    """Set decay and betas: what a resumed run is given wins over what was stored."""
    for group in optimizer.param_groups:
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
        group["betas"] = (config.adam_beta1, config.adam_beta2)


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]


def _create_state(rule: UpdateRule, _: Any = None) -> None:
    """Create every parameter's state, so that a checkpoint can be loaded into it."""
    for group in rule.param_groups:
        for param in group["params"]:
            if not rule.state[param]:
                rule.create_state(param, group)
