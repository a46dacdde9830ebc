"""The learning rate as a pure function of the iteration: nothing to save, nothing to resume."""

from __future__ import annotations

import math

from megatron_replay.config import OptimizerConfig


def learning_rate(iteration: int, config: OptimizerConfig, train_iters: int) -> float:
    """Learning rate of ``iteration`` (from 0), in the shapes of Megatron's scheduler.

    With w = ``lr_warmup_iters``: lr (k + 1) / w for k < w, so that the first iteration moves too
    (Megatron's stands still); then from ``lr`` at k = w along ``lr_decay_style`` to ``min_lr`` at
    k = ``train_iters``, one after the last. ``constant`` stays at ``lr``.
    """
    warmup = config.lr_warmup_iters
    if iteration < warmup:
        return config.lr * (iteration + 1) / warmup
    if config.lr_decay_style == "constant":
        return config.lr
    done = (iteration - warmup) / max(1, train_iters - warmup)
    left = 1 - done if config.lr_decay_style == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.min_lr + (config.lr - config.min_lr) * max(0.0, left)
