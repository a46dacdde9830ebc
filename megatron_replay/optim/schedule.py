"""The learning rate as a pure function of the iteration: nothing to save, nothing to resume."""

from __future__ import annotations

import math

from megatron_replay.config import OptimizerConfig


def learning_rate(iteration: int, config: OptimizerConfig, train_iters: int) -> float:
    """Learning rate of ``iteration`` (from 0), as Megatron's scheduler defines it.

    Linear warm-up to ``lr`` over ``lr_warmup_iters`` (the first iteration already takes a step),
    then ``lr_decay_style`` down to ``min_lr``, reached after the last iteration.
    """
    warmup = config.lr_warmup_iters
    if iteration < warmup:
        return config.lr * (iteration + 1) / warmup
    if config.lr_decay_style == "constant":
        return config.lr
    done = (iteration - warmup) / max(1, train_iters - warmup)
    left = 1 - done if config.lr_decay_style == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.min_lr + (config.lr - config.min_lr) * max(0.0, left)
