"""The learning rate by hand."""

from __future__ import annotations

import math

import pytest

from megatron_replay.config import OptimizerConfig
from megatron_replay.optim.build import learning_rate


def rates(train_iters: int = 6, **settings: object) -> list[float]:
    config = OptimizerConfig(lr=1.0, **settings)
    return [learning_rate(k, config, train_iters) for k in range(train_iters)]


def test_linear_with_warm_up():
    found = rates(lr_warmup_iters=2, lr_decay_style="linear", min_lr=0.2)
    assert found == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4])


def test_cosine():
    half = math.sqrt(0.5)
    found = rates(train_iters=4, lr_decay_style="cosine", min_lr=0.2)
    shape = [1.0, (1 + half) / 2, 0.5, (1 - half) / 2]
    assert found == pytest.approx([0.2 + 0.8 * x for x in shape])


def test_constant_after_warm_up():
    found = rates(lr_warmup_iters=4, lr_decay_style="constant")
    assert found == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_the_minimum_is_reached_after_the_last_iteration(style):
    config = OptimizerConfig(lr=1.0, min_lr=0.2, lr_decay_style=style, lr_warmup_iters=1)
    assert learning_rate(4, config, 5) > 0.2
    assert learning_rate(5, config, 5) == pytest.approx(0.2)


def test_a_run_no_longer_than_its_warm_up():
    assert rates(train_iters=2, lr_warmup_iters=4) == pytest.approx([0.25, 0.5])
    assert rates(train_iters=3, lr_warmup_iters=3) == pytest.approx([1 / 3, 2 / 3, 1.0])
