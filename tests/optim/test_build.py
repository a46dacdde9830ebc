"""The optimizer that Stage 1 builds: which weights decay, what is stored, what a resume changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_replay.config import OptimizerConfig
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.replay import full_targets
from megatron_replay.model import heads
from megatron_replay.optim import MoClip
from megatron_replay.optim.build import apply_hyperparameters, build_optimizer, set_learning_rate
from megatron_replay.training.step import train_step, wrap_for_training
from tests import pool, tiny
from tests.distributed import layouts
from tests.distributed.layouts import Layout


def describe(_: int, __: int, checkpoint: Path, corpus_prefix: Path) -> dict[str, Any]:
    """Facts about the built optimizers, plain enough to leave the process."""
    groups = layouts.join_groups(Layout())
    facts: dict[str, Any] = {}
    for rule in ("moclip", "adamw"):
        for bf16 in (False, True):
            model = wrap_for_training(layouts.build(Layout(bf16=bf16), groups, checkpoint))
            config = OptimizerConfig(
                optimizer=rule, lr=0.01, weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.9,
                adam_eps=1e-6, max_angle=30.0, obtuse="project", second_moment="clipped",
                atan_a=1.25, atan_b=0.5,
            )  # fmt: skip
            optimizer = build_optimizer(config, model, groups, bf16=bf16)
            facts[rule, bf16] = {
                "class": type(optimizer.optimizer).__name__,
                "decay": sorted(
                    {(p.dim() > 1, g["weight_decay"]) for g in optimizer.param_groups
                     for p in g["params"]}
                ),
                "betas": {g["betas"] for g in optimizer.param_groups},
                "dtypes": {p.dtype for g in optimizer.optimizer.param_groups for p in g["params"]},
            }  # fmt: skip
            inner = optimizer.optimizer
            if isinstance(inner, MoClip):
                facts["settings"] = (
                    inner.max_angle, inner.obtuse, inner.second_moment, inner.atan_a, inner.atan_b
                )  # fmt: skip
                facts["step", bf16] = one_step(model, optimizer, groups, corpus_prefix)
    set_learning_rate(optimizer, 0.5)
    changed = OptimizerConfig(optimizer="adamw", lr=1.0, weight_decay=0.7, adam_beta1=0.1)
    apply_hyperparameters(optimizer, changed)
    facts["changed"] = {
        (g["lr"], g["weight_decay"], g["betas"]) for g in optimizer.optimizer.param_groups
    }
    return facts


def one_step(model: Any, optimizer: Any, groups: Any, corpus_prefix: Path) -> dict[str, Any]:
    """How far Stage 1's step moves the masters: at the first one, lr A atan(1 / B) at most."""
    masters = [p for g in optimizer.optimizer.param_groups for p in g["params"]]
    before = [p.detach().clone() for p in masters]
    decay = [g["weight_decay"] for g in optimizer.optimizer.param_groups for _ in g["params"]]
    batches = layouts.micro_batches(groups, Corpus(corpus_prefix))
    work = [(batch, heads.full_loss(*full_targets(batch), groups)) for batch in batches]
    result = train_step(model, optimizer, work, groups, lr=0.01, clip_grad=1.0)
    moves = [
        (p.detach() - (1 - 0.01 * wd) * b).abs().max().item()
        for p, b, wd in zip(masters, before, decay, strict=True)
    ]
    return {"move": max(moves), "angle": result.angle}


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("build")
    tiny.save_qwen3(folder / "model", tied=True, num_hidden_layers=2)
    tiny.save_corpus(folder / "corpus", num_documents=20)
    [result] = pool.run(1, describe, folder / "model", folder / "corpus")
    return result


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("rule", "name"), [("moclip", "MoClip"), ("adamw", "AdamW")])
def test_matrices_decay_and_vectors_do_not(facts, rule, name, bf16):
    built = facts[rule, bf16]
    assert built["class"] == name
    assert built["decay"] == [(False, 0.0), (True, 0.3)]
    assert built["betas"] == {(0.8, 0.9)}


@pytest.mark.parametrize("bf16", [False, True])
def test_the_rule_updates_fp32_masters(facts, bf16):
    assert facts["moclip", bf16]["dtypes"] == {torch.float32}


def test_moclips_settings_arrive(facts):
    assert facts["settings"] == (30.0, "project", "clipped", 1.25, 0.5)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_of_stage_1_obeys_the_settings(facts, bf16):
    step = facts["step", bf16]
    # m_hat = g and v_hat = g^2: every coordinate with a gradient moves lr A atan(1 / B).
    assert step["move"] == pytest.approx(
        0.01 * 1.25 * torch.atan(torch.tensor(2.0)).item(), rel=1e-3
    )
    assert step["angle"]["grad_norm"] <= 1.0 + 1e-4
    assert step["angle"]["momentum_norm"] == 0.0


def test_what_a_resumed_run_is_given_wins(facts):
    assert facts["changed"] == {(0.5, 0.7, (0.1, 0.95)), (0.5, 0.0, (0.1, 0.95))}
