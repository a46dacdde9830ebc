"""The optimizer that Stage 1 builds: what decays, what a resume changes, the learning rate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_replay.config import OptimizerConfig
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.replay import full_targets
from megatron_replay.forward import MicroBatch
from megatron_replay.model import heads
from megatron_replay.optim.build import (
    apply_hyperparameters,
    build_optimizer,
    learning_rate,
    set_learning_rate,
)
from megatron_replay.training.step import train_step, wrap_for_training
from tests import pool, tiny
from tests.distributed import layouts
from tests.distributed.layouts import Layout

#: Rule: settings of Stage 1, and what of them the rule must know by its own names.
RULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "moclip": ({"max_angle": 30.0, "obtuse": "zero"}, {"max_angle": 30.0, "obtuse": "zero"}),
    "adamw": ({}, {"clip_grad": 0.9}),
    "mofo": ({"mofo_fraction": 0.3}, {"fraction": 0.3}),
    "tam": ({"angle_scope": "tensor"}, {"angle_scope": "tensor"}),
    "adamuon": ({}, {"momentum": 0.95}),
    "muonclip": ({}, {"momentum": 0.95, "attention_clip_grad": 1.0}),
}


def moved(after: torch.Tensor, before: torch.Tensor) -> float:
    return (after - before).abs().max().item()


def describe(_: int, __: int, checkpoint: Path, corpus_prefix: Path) -> dict[Any, Any]:
    """Facts about the built optimizers, plain enough to leave the process."""
    groups = layouts.join_groups(Layout())
    facts: dict[Any, Any] = {}
    for rule, (settings, arrived) in RULES.items():
        for bf16 in (False, True):
            model = layouts.build(Layout(bf16=bf16), groups, checkpoint)
            wrapped = wrap_for_training(model)
            config = OptimizerConfig(
                optimizer=rule, lr=0.01, weight_decay=0.0, clip_grad=0.9, **settings
            )
            optimizer = build_optimizer(config, model, wrapped, groups)
            masters = [p for g in optimizer.optimizer.param_groups for p in g["params"]]
            before = [p.detach().clone() for p in masters]
            batches = layouts.micro_batches(groups, Corpus(corpus_prefix))
            work = [
                MicroBatch(
                    batch, heads.full_loss(*full_targets(batch), groups, vocab_size=tiny.VOCAB_SIZE)
                )
                for batch in batches
            ]
            result = train_step(wrapped, optimizer, work, groups, lr=0.01)
            facts[rule, bf16] = {
                "settings": {name: getattr(optimizer.optimizer, name) for name in arrived},
                "update": result.update,
                "move": max(
                    (p - b).abs().max().item() for p, b in zip(masters, before, strict=True)
                ),
                "followed": all(
                    torch.equal(p, getattr(p, "main_param", p).to(p.dtype))
                    for p in wrapped.parameters()
                ),
            }
    set_learning_rate(optimizer, 0.5)
    changed = OptimizerConfig(optimizer="adamw", lr=1.0, weight_decay=0.7, adam_beta1=0.1)
    apply_hyperparameters(optimizer, changed)
    facts["changed"] = {
        (g["lr"], g["weight_decay"], g["betas"]) for g in optimizer.optimizer.param_groups
    }
    return facts


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> dict[Any, Any]:
    folder = tmp_path_factory.mktemp("build")
    tiny.save_qwen3(folder / "model", tied=True, num_hidden_layers=2)
    tiny.save_corpus(folder / "corpus", num_documents=20)
    [result] = pool.run(1, describe, folder / "model", folder / "corpus")
    return result


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_settings_arrive_and_the_models_weights_follow_their_masters(facts, rule, bf16):
    built = facts[rule, bf16]
    assert built["settings"] == RULES[rule][1]
    assert built["followed"]
    assert built["move"] > 1e-3


@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_of_stage_1_obeys_moclips_settings(facts, bf16):
    step = facts["moclip", bf16]
    # m_hat = g and v_hat = g^2: every coordinate with a gradient moves lr atan(1).
    assert step["move"] == pytest.approx(0.01 * math.pi / 4, rel=1e-3)
    assert step["update"]["clipped_grad_norm"] == 0.9
    assert step["update"]["grad_norm"] > 0.9
    assert step["update"]["momentum_over_grad_norm"] == 0.0


def test_what_a_resumed_run_is_given_wins(facts):
    assert facts["changed"] == {
        (0.5, 0.7, (0.1, 0.95)), (0.5, 0.0, (0.1, 0.95))
    }  # fmt: skip


HALF = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("train_iters", "settings", "expected"),
    [
        (6, {"lr_warmup_iters": 2, "lr_decay_style": "linear", "min_lr": 0.2},
         [0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]),
        (4, {"lr_decay_style": "cosine"}, [1.0, (1 + HALF) / 2, 0.5, (1 - HALF) / 2, 0.0]),
        (2, {"lr_decay_style": "cosine", "min_lr": 0.2}, [1.0, 0.6, 0.2]),
        (6, {"lr_warmup_iters": 4, "lr_decay_style": "constant"}, [0.25, 0.5, 0.75] + [1.0] * 4),
        (2, {"lr_warmup_iters": 4, "lr_decay_style": "constant"}, [0.25, 0.5, 0.75]),
        (3, {"lr_warmup_iters": 3, "min_lr": 0.2}, [1 / 3, 2 / 3, 1.0, 1.0]),
    ],
)  # fmt: skip
def test_the_learning_rate_of_each_iteration_and_one_after_the_last(
    train_iters, settings, expected
):
    config = OptimizerConfig(lr=1.0, **settings)
    found = [learning_rate(k, config, train_iters) for k in range(train_iters + 1)]
    assert found == pytest.approx(expected)
