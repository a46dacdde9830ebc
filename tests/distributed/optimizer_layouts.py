"""What a set of ranks does for the optimizer tests: steps on given gradients, and real training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_replay.checkpoint.load import LoadedModel
from megatron_replay.checkpoint.names import mapping_of
from megatron_replay.config import OptimizerConfig
from megatron_replay.data.corpus import Corpus
from megatron_replay.optim.build import build_optimizer, set_learning_rate
from megatron_replay.training.step import train_step, wrap_for_training
from tests.distributed import layouts
from tests.distributed.layouts import Layout
from tests.optim import reference_rules

STEPS, LR, WEIGHT_DECAY, CLIP = 5, 0.01, 0.1, 1.0
TRAINING_LR = 1e-3


def save_gradients(checkpoint: Path, folder: Path) -> None:
    """A gradient for each step, in Hugging Face's names: a drift that turns, and noise."""
    start = load_file(checkpoint / "model.safetensors")
    for step in range(1, STEPS + 1):
        rng = np.random.default_rng(step)
        gradients = {}
        for number, (name, tensor) in enumerate(start.items()):
            drift = np.random.default_rng(1000 + number).standard_normal(tensor.shape)
            noise = rng.standard_normal(tensor.shape)
            # What TP ranks hold whole weighs much, so that counting it twice shows.
            size = 0.05 if tensor.dim() > 1 else 1.0
            values = size * (np.cos(1.1 * step) * drift + 0.7 * noise)
            gradients[name] = torch.from_numpy(values.astype(np.float32))
        layouts.save_tensors(gradients, checkpoint, folder / str(step))


def save_expected(checkpoint: Path, gradients: Path, folder: Path) -> None:
    """Where the float64 reference of each rule ends, as a Hugging Face directory of float64."""
    start = {n: t.numpy() for n, t in load_file(checkpoint / "model.safetensors").items()}
    gradients_by_step = [
        {n: t.numpy() for n, t in load_file(gradients / str(s) / "model.safetensors").items()}
        for s in range(1, STEPS + 1)
    ]
    for rule in reference_rules.RULES:
        theta = reference_rules.run(
            rule, start, gradients_by_step, lr=LR, weight_decay=WEIGHT_DECAY, clip=CLIP
        )
        ends = {n: torch.from_numpy(p.astype(np.float32)) for n, p in theta.items()}
        layouts.save_tensors(ends, checkpoint, folder / rule)


def weights(model: LoadedModel) -> dict[str, Tensor]:
    return dict(model.module.named_parameters())


def prepare(
    rule: str, model: LoadedModel, groups: Any, folder: Path, lr: float, **changes: Any
) -> tuple[Any, Any]:
    """The model, at its first weights again, wrapped, and an optimizer for it."""
    settings = {**reference_rules.RULES[rule][0], **changes}
    config = OptimizerConfig(lr=lr, weight_decay=WEIGHT_DECAY, clip_grad=CLIP, **settings)
    with torch.no_grad():
        layouts.fill(weights(model), model, groups, folder / "model")
    wrapped = wrap_for_training(model, use_distributed_optimizer=config.use_distributed_optimizer)
    return wrapped, build_optimizer(config, model, wrapped, groups)


def step_on_given_gradients(
    rule: str, model: LoadedModel, groups: Any, folder: Path, **changes: Any
) -> float:
    """Largest error of any of this rank's weights after STEPS steps."""
    _, optimizer = prepare(rule, model, groups, folder, LR, **changes)
    if rule == "muonclip":  # low enough to clip gradients whose norm is at most 1
        optimizer.optimizer.attention_clip_grad = reference_rules.Muon.attention_clip
    set_learning_rate(optimizer, LR)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        gradients = {name: p.main_grad for name, p in weights(model).items()}
        layouts.fill(gradients, model, groups, folder / "gradients" / str(step))
        optimizer.prepare_grads()
        optimizer.step_with_ready_grads()
    expected = {n: torch.empty_like(p, dtype=torch.float32) for n, p in weights(model).items()}
    layouts.fill(expected, model, groups, folder / "expected" / rule)
    errors = []
    for name, param in weights(model).items():
        found = getattr(param, "main_param", None)
        if found is None or found.shape != param.shape:
            found = param
        errors.append((found.detach().float() - expected[name]).abs().max().item())
    return max(errors)


def train(
    rule: str, model: LoadedModel, groups: Any, folder: Path, layout: Layout, **changes: Any
) -> tuple[list[float | None], dict[str, Tensor]]:
    """Losses of STEPS steps of Stage 1's loop, and this rank's weights after them."""
    wrapped, optimizer = prepare(rule, model, groups, folder, TRAINING_LR, **changes)
    corpus, losses = Corpus(folder / "corpus"), []
    for k in range(STEPS):
        batches = layouts.micro_batches(groups, corpus, k)
        work = layouts.full_loss_work(layout, groups, batches, last_layer_at_selected=False)
        losses.append(train_step(wrapped, optimizer, work, groups, lr=TRAINING_LR).loss)
    return losses, {name: p.detach().clone() for name, p in weights(model).items()}


def save_hf(model: LoadedModel, tensors: dict[str, Tensor], like: Path, directory: Path) -> None:
    """Write one process's parameters under Hugging Face's names."""
    out = {}
    for name, tensor in tensors.items():
        mapping = mapping_of(name, model.shape, model.layer_offset)
        parts = mapping.layout.join([tensor.float()])
        out |= {n: p.contiguous() for n, p in zip(mapping.names, parts, strict=True)}
    layouts.save_tensors(out, like, directory)


def distance(model: LoadedModel, tensors: dict[str, Tensor], groups: Any, directory: Path) -> float:
    """Root mean square difference of this rank's weights from a directory's."""
    expected = {name: torch.empty_like(p, dtype=torch.float32) for name, p in tensors.items()}
    layouts.fill(expected, model, groups, directory)
    parts = [(tensors[name].float() - expected[name]).flatten() for name in tensors]
    return torch.cat(parts).square().mean().sqrt().item()
