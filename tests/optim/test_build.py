"""The optimizer that Stage 1 builds: which weights decay, what is stored, what a resume changes."""

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
from megatron_replay.optim.build import apply_hyperparameters, build_optimizer, set_learning_rate
from megatron_replay.training.step import train_step, wrap_for_training
from tests import pool, tiny
from tests.distributed import layouts
from tests.distributed.layouts import Layout

SETTINGS: dict[str, dict[str, Any]] = {
    "moclip": {
        "max_angle": 30.0, "obtuse": "zero",
    },
    "adamw": {},
    "mofo": {"mofo_fraction": 0.3},
    "tam": {"angle_scope": "tensor"},
    "adamuon": {},
    "muonclip": {},
}  # fmt: skip
#: What of it the rule must know, by the rule's own names.
ARRIVED: dict[str, dict[str, Any]] = {
    "moclip": SETTINGS["moclip"],
    "adamw": {},
    "mofo": {"fraction": 0.3},
    "tam": {"angle_scope": "tensor"},
    "adamuon": {"momentum": 0.95},
    "muonclip": {"momentum": 0.95, "attention_clip_grad": 1.0},
}
NAMES = {
    "moclip": "MoClip", "adamw": "AdamW", "mofo": "MoFO", "tam": "TAM", "adamuon": "AdaMuon",
    "muonclip": "MuonClip",
}  # fmt: skip


def describe(_: int, __: int, checkpoint: Path, corpus_prefix: Path) -> dict[str, Any]:
    """Facts about the built optimizers, plain enough to leave the process."""
    groups = layouts.join_groups(Layout())
    facts: dict[str, Any] = {}
    for rule, settings in SETTINGS.items():
        for bf16 in (False, True):
            model = layouts.build(Layout(bf16=bf16), groups, checkpoint)
            wrapped = wrap_for_training(model)
            config = OptimizerConfig(
                optimizer=rule, lr=0.01, weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.9,
                clip_grad=0.9, **settings,
            )  # fmt: skip
            optimizer = build_optimizer(config, model, wrapped, groups)
            inner = optimizer.optimizer
            facts[rule, bf16] = {
                "class": type(inner).__name__,
                "decay": sorted(
                    {(p.dim() > 1, g["weight_decay"]) for g in optimizer.param_groups
                     for p in g["params"]}
                ),
                "betas": {g["betas"] for g in optimizer.param_groups},
                "eps": {g["eps"] for g in optimizer.param_groups},
                "dtypes": {p.dtype for g in inner.param_groups for p in g["params"]},
                "settings": {name: getattr(inner, name) for name in ARRIVED[rule]},
                "clip_grad": inner.clip_grad,
            }  # fmt: skip
            facts["step", rule, bf16] = one_step(wrapped, optimizer, groups, corpus_prefix)
    set_learning_rate(optimizer, 0.5)
    changed = OptimizerConfig(optimizer="adamw", lr=1.0, weight_decay=0.7, adam_beta1=0.1)
    apply_hyperparameters(optimizer, changed)
    facts["changed"] = {
        (g["lr"], g["weight_decay"], g["betas"]) for g in optimizer.optimizer.param_groups
    }
    return facts


def one_step(model: Any, optimizer: Any, groups: Any, corpus_prefix: Path) -> dict[str, Any]:
    """How far Stage 1's step moves the masters, and whether the model's weights follow."""
    masters = [p for g in optimizer.optimizer.param_groups for p in g["params"]]
    before = [p.detach().clone() for p in masters]
    decay = [g["weight_decay"] for g in optimizer.optimizer.param_groups for _ in g["params"]]
    batches = layouts.micro_batches(groups, Corpus(corpus_prefix))
    work = [MicroBatch(batch, heads.full_loss(*full_targets(batch), groups)) for batch in batches]
    result = train_step(model, optimizer, work, groups, lr=0.01)
    moves = [
        (p.detach() - (1 - 0.01 * wd) * b).abs().max().item()
        for p, b, wd in zip(masters, before, decay, strict=True)
    ]
    followed = all(
        torch.equal(p, getattr(p, "main_param", p).to(p.dtype)) for p in model.parameters()
    )
    return {"move": max(moves), "update": result.update, "followed": followed}


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("build")
    tiny.save_qwen3(folder / "model", tied=True, num_hidden_layers=2)
    tiny.save_corpus(folder / "corpus", num_documents=20)
    [result] = pool.run(1, describe, folder / "model", folder / "corpus")
    return result


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("rule", NAMES)
def test_settings_arrive(facts, rule, bf16):
    built = facts[rule, bf16]
    assert built["class"] == NAMES[rule]
    assert built["decay"] == [(False, 0.0), (True, 0.3)]  # matrices decay, vectors do not
    assert built["betas"] == {(0.8, 0.9)}
    assert built["eps"] == {1e-8}
    assert built["dtypes"] == {torch.float32}  # masters
    assert built["settings"] == ARRIVED[rule]
    assert built["clip_grad"] == 0.9


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("rule", NAMES)
def test_the_models_weights_follow_their_masters(facts, rule, bf16):
    assert facts["step", rule, bf16]["followed"]
    assert facts["step", rule, bf16]["move"] > 1e-3


@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_of_stage_1_obeys_moclips_settings(facts, bf16):
    step = facts["step", "moclip", bf16]
    # m_hat = g and v_hat = g^2: every coordinate with a gradient moves lr atan(1).
    assert step["move"] == pytest.approx(0.01 * math.pi / 4, rel=1e-3)
    assert step["update"]["clipped_grad_norm"] == 0.9
    assert step["update"]["grad_norm"] > 0.9
    assert step["update"]["momentum_over_grad_norm"] == 0.0


def test_what_a_resumed_run_is_given_wins(facts):
    assert facts["changed"] == {
        (0.5, 0.7, (0.1, 0.95)), (0.5, 0.0, (0.1, 0.95))
    }  # fmt: skip
