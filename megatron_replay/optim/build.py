"""A megatron-core optimizer around one of our update rules, and its learning rate.

megatron-core has no registry of optimizers: its own factory builds Adam and SGD. Here is the same
assembly (parameter groups with Megatron's weight-decay exclusions, fp32 masters for bf16, state
sharded over data parallel ranks) around any of ours, and what each updated tensor is of the model.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import optimizer as mcore
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from megatron_replay.checkpoint.load import LoadedModel
from megatron_replay.checkpoint.names import Mapping, hf_tensor_shapes, mapping_of
from megatron_replay.config import OptimizerConfig
from megatron_replay.errors import ConfigError
from megatron_replay.optim import TAM, AdaMuon, AdamW, MoClip, MoFO, MuonClip
from megatron_replay.optim.batch import Piece, Place, Placement
from megatron_replay.optim.momentum_step import OPTIMIZER
from megatron_replay.optim.rule import UpdateRule
from megatron_replay.parallel import Parallel
from megatron_replay.platform.megatron_core import torch_optimizer_state

#: Each rule, and its own settings: attribute of ``OptimizerConfig`` by argument.
_RULES: dict[str, tuple[type[UpdateRule], dict[str, str]]] = {
    "adamw": (AdamW, {}),
    "moclip": (MoClip, {name: name for name in ("max_angle", "obtuse", "angle_scope")}),
    "mofo": (MoFO, {"fraction": "mofo_fraction"}),
    "tam": (TAM, {"angle_scope": "angle_scope"}),
    "adamuon": (AdaMuon, {}),
    "muonclip": (MuonClip, {}),
}
_ATTENTION = re.compile(r"model\.layers\.(\d+)\.self_attn\.[qkvo]_proj\.")


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
    settings = mcore.OptimizerConfig(
        optimizer="adam",  # read by megatron-core for defaults only; the rule is ours
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        clip_grad=config.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=config.use_distributed_optimizer,
    )
    overrides = mcore.get_standard_config_overrides(settings)
    rule_class, own = _RULES[config.optimizer]
    rule = rule_class(
        mcore._get_param_groups([wrapped], settings, overrides),
        lr=config.lr,
        clip_grad=config.clip_grad,  # decay and betas: apply_hyperparameters below
        **{argument: getattr(config, name) for argument, name in own.items()},
    )
    optimizer: MegatronOptimizer
    if config.use_distributed_optimizer:
        optimizer = Sharded(
            rule,
            settings,
            None,
            _create_states,
            model_chunks=[wrapped],
            per_model_buffers={0: wrapped.buffers},
            data_parallel_group=parallel.dp_group,
            data_parallel_group_gloo=None,
            data_parallel_group_idx=dist.get_rank(parallel.model_group),
            distributed_optimizer_instance_id=0,
        )
    elif bf16:
        optimizer = MixedPrecision(rule, settings, None, _create_states)
    else:
        optimizer = FP32Optimizer(rule, settings, _create_states)
    placement, copies = _place_model(optimizer, model, parallel)
    optimizer.grad_stats_parallel_group = placement.model_group
    optimizer.tp_group = parallel.tp_group
    rule.distribute(placement, copies)
    apply_hyperparameters(optimizer, config)
    rule.create_states()
    return optimizer


def _create_states(rule: UpdateRule, _: Any = None) -> None:
    rule.create_states()


def _place_model(
    optimizer: MegatronOptimizer, model: LoadedModel, parallel: Parallel
) -> tuple[Placement, dict[Tensor, Tensor]]:
    """The placement of what ``optimizer`` updates, and its tensors' bf16 copies in the model."""
    sharded = isinstance(optimizer, DistributedOptimizer)
    shapes = hf_tensor_shapes(model.shape)
    row_of = {name: row for row, name in enumerate(shapes)}
    pieces: dict[Tensor, list[Piece]] = {}
    names: dict[Tensor, str] = {}
    sizes: list[int] = []
    for name, param in model.module.named_parameters():
        mapping = mapping_of(name, model.shape, model.layer_offset)
        names[param] = mapping.names[0]
        if param.dim() == 2:
            wholes = [math.prod(shapes[name]) for name in mapping.names]
            pieces[param] = _pieces(param, mapping, parallel.tp_size, wholes, first=len(sizes))
            sizes += wholes
    places, copies = {}, {}
    for param, tensor, start, copy in _updated(optimizer, model):
        attention = _ATTENTION.match(names[param])
        places[tensor] = Place(
            row=row_of[names[param]],
            counts=counts_once(tensor, tp_group=parallel.tp_group),
            pieces=tuple(
                _within(piece, start, start + tensor.numel()) for piece in pieces.get(param, [])
            ),
            orthogonal=param.dim() == 2 and names[param].startswith("model.layers."),
            attention_layer=int(attention[1]) if attention else None,
        )
        if copy is not None:
            copies[tensor] = copy
    world = dist.group.WORLD
    assert world is not None
    placement = Placement(
        places=places,
        model_group=world if sharded else parallel.model_group,
        tensor_group=parallel.tp_dp_group if sharded else parallel.tp_group,
        tp_group=parallel.tp_group,
        num_tensors=len(shapes),
        piece_sizes=tuple(sizes),
        num_layers=model.shape.num_layers,
    )
    return placement, copies


def counts_once(param: Tensor, *, tp_group: Any) -> bool:
    """Whether ``param`` enters this rank's share of a sum over the whole model.

    A weight that every TP rank holds whole (a norm) counts on TP rank 0; the last stage's copy of a
    tied embedding does not count, since the first stage's does.
    """
    whole_once = param_is_not_tensor_parallel_duplicate(param, tp_group=tp_group)
    return bool(param_is_not_shared(param) and whole_once)


def _pieces(
    param: Tensor, mapping: Mapping, tp_size: int, wholes: list[int], *, first: int
) -> list[Piece]:
    """The Hugging Face matrices in a parameter, of ``wholes`` elements over all ranks."""
    rows, columns = param.shape
    return [
        Piece(
            index=first + i,
            numel=whole,
            columns=columns,
            ranges=tuple((r.start * columns, r.stop * columns) for r in ranges),
            split_dim=mapping.dim,
        )
        for i, (whole, ranges) in enumerate(zip(wholes, mapping.rows(rows, tp_size), strict=True))
    ]


def _within(piece: Piece, start: int, stop: int) -> Piece:
    """The piece as seen from a flat part [start, stop) of its parameter."""
    ranges = tuple(
        (max(a, start) - start, min(b, stop) - start)
        for a, b in piece.ranges
        if a < stop and b > start
    )
    return dataclasses.replace(piece, ranges=ranges)


def _updated(
    optimizer: MegatronOptimizer, model: LoadedModel
) -> Iterator[tuple[Tensor, Tensor, int, Tensor | None]]:
    """(model parameter, the tensor updated for it, where that starts in it, its bf16 copy)."""
    if not isinstance(optimizer, DistributedOptimizer):
        for param in model.module.parameters():
            master = getattr(param, "main_param", None)
            if master is None:
                yield param, param, 0, None
            else:
                yield param, master, 0, param.data
        return
    groups = (
        (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
        (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
    )
    for models, shards in groups:
        for param, shard in (
            pair for ours in zip(models, shards, strict=True) for pair in zip(*ours, strict=True)
        ):
            start = optimizer._get_model_param_range_map(param)["param"].start
            view = param.data.view(-1)[start : start + shard.numel()]
            # In fp32 the shard is part of the model's own buffer; nothing to copy.
            yield param, shard, start, None if view.dtype == shard.dtype else view


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
