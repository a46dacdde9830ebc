"""Loops of one's own take the steps of Stage 1: the first one's gradients, and the last weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import RandomSampler

from examples import any_loop, any_trainer
from megatron_replay import flags
from megatron_replay.config import Stage1Config
from megatron_replay.data.packing import document_order
from megatron_replay.data.tokenizer import load_tokenizer
from megatron_replay.forward import forward_backward
from megatron_replay.training.build import build_run
from tests import pool, same_weights, tiny
from tests.distributed.layouts import Layout, join_groups, save_tensors, worst_gradient
from tests.e2e import stages
from tests.evaluation.site import save_tokenizer

pytestmark = pytest.mark.distributed
NUM_DOCUMENTS = 40  # three steps, the last of 8
STAGE1 = ["--no-pack-documents", "--global-batch-size", 16, "--probe-interval", 0]


@pytest.fixture(scope="module", params=[tiny.save_qwen3, tiny.save_llama])
def folder(request, tmp_path_factory) -> Path:
    """A tied checkpoint, a corpus, a store, and what Stage 1 makes of them."""
    folder = tmp_path_factory.mktemp("any_loop")
    request.param(folder / "model", tied=True, num_hidden_layers=2)
    save_tokenizer(folder / "model")
    tiny.save_corpus(folder / "corpus", num_documents=NUM_DOCUMENTS)
    stages.succeed("stage0", *stages.inputs(folder), "--store", folder / "store")
    stages.succeed("stage1", *stages.argv(folder, folder / "run", *STAGE1))
    stages.convert(folder / "run", folder / "stage1")
    return folder


def gradient_error(rank: int, world_size: int, folder: Path, save: Path) -> tuple[float, str]:
    """Largest difference of the gradients in ``save`` from those of Stage 1's first step."""
    groups = join_groups(Layout())
    argv = [str(flag) for flag in stages.argv(folder, save / "run", *STAGE1)]
    built = build_run(flags.parse(Stage1Config, argv, program="stage1").config, groups)
    forward_backward(built.wrapped, built.make_batch(0).micro_batches)
    return worst_gradient(built.model, built.wrapped, groups, save / "gradients")


@pytest.mark.parametrize("example", [any_loop, any_trainer])
def test_a_loop_of_ones_own_takes_the_steps_of_stage1(example, folder, tmp_path, monkeypatch):
    order = document_order(NUM_DOCUMENTS, seed=1234, epoch=0).tolist()
    for sampler in (RandomSampler, SeedableRandomSampler):
        monkeypatch.setattr(sampler, "__iter__", lambda self: iter(order))
    gradients: list[list[torch.Tensor]] = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        gradients.append([p.grad.clone() for p in params])

    hook = register_optimizer_step_pre_hook(keep)
    files = {"--model": "model", "--data-path": "corpus", "--store": "store"}
    argv = [text for flag, name in files.items() for text in (flag, str(folder / name))]
    example.main([*argv, "--lr", "1e-3", "--save", str(tmp_path / "tuned")])
    assert load_tokenizer(tmp_path / "tuned").decode([64, 30]) == "a?"
    hook.remove()
    assert len(gradients) == 3
    assert len(Path(example.__file__).read_text().splitlines()) <= 60  # shown as a short example
    named = dict(tiny.load_reference(folder / "model").named_parameters())
    names = sorted(named, key=lambda name: named[name].dim() == 1)  # matrices first, as in groups
    first = dict(zip(names, gradients[0], strict=True))
    save_tensors(first, folder / "model", tmp_path / "gradients")
    [error] = pool.run(1, gradient_error, folder, tmp_path)
    assert error <= (5e-6, "~")
    # A weight whose gradient is nothing but rounding moves by the learning rate either way.
    expected = same_weights.weights(folder / "stage1")
    found = same_weights.weights(tmp_path / "tuned")
    apart = torch.cat([(found[name] - x).abs().flatten() for name, x in expected.items()])
    assert (apart > 2e-6).double().mean() < 1e-4
