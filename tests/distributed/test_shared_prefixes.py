"""Prefixes computed once change nothing: random forests against transformers, and whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from megatron_replay.data.forest import Forest, plant, without_sharing
from megatron_replay.data.packing import pack_batch
from megatron_replay.forward import forward_backward
from megatron_replay.training.step import wrap_for_training
from tests import pool, tiny
from tests.distributed.layouts import Layout, build, full_loss_work, join_groups
from tests.e2e import stages
from tests.forests import Documents, documents

LAYOUTS = [Layout(), Layout(tp=2, sequence_parallel=True), Layout(pp=2)]
#: Positions of a micro-batch: some forests are cut.
CAPACITY = 40


def reference_gradients(
    corpus: Documents, checkpoint: Path
) -> tuple[float, int, dict[str, torch.Tensor]]:
    """Mean loss, number of labels, and gradients by Hugging Face's names, a document at a time."""
    model = tiny.load_reference(checkpoint).double()
    losses = []
    for number in corpus.numbers.tolist():
        document = corpus[number]
        tokens = torch.from_numpy(document.tokens).long()
        label_N = torch.from_numpy(document.loss_mask[1:]).nonzero().squeeze(1)
        logits = model(tokens[None, :-1]).logits[0, label_N]
        losses.append(
            torch.nn.functional.cross_entropy(logits, tokens[label_N + 1], reduction="none")
        )
    loss_N = torch.cat(losses)
    if not len(loss_N):
        return 0.0, 0, {}
    loss_N.mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss_N.mean().item(), len(loss_N), gradients


def require_reference(
    layout: Layout,
    parts: tuple[Any, Any, Any],
    corpus: Documents,
    reference: tuple[float, int, dict[str, torch.Tensor]],
    forest: Forest,
) -> None:
    """Loss and gradients of ``forest``, in micro-batches, are those of each document alone."""
    (model, wrapped, groups), (loss, count, gradients) = parts, reference
    wrapped.zero_grad_buffer()
    packs = forest.balanced_cut(max(CAPACITY, int(forest.positions_D.max())), 1)
    batches = [pack_batch(corpus, p, corpus.lengths, multiple=groups.tp_size) for p in packs]
    sums = forward_backward(wrapped, full_loss_work(layout, groups, batches))
    if sums is not None:
        assert sums[1].item() == count
        assert sums[0].item() == pytest.approx(count * loss, abs=2e-6 * max(count, 1))
    largest = max((gradient.abs().max().item() for gradient in gradients.values()), default=1.0)
    for name, parameter in model.module.named_parameters():
        expected = torch.zeros(parameter.shape, dtype=torch.float64)
        if gradients:
            mapping = model.mapping(name)
            whole = [gradients[hf_name] for hf_name in mapping.names]
            mapping.fill(expected, whole, groups.tp_rank, groups.tp_size)
        error = (parameter.main_grad - expected).abs().max().item()
        # Where the terms of a gradient cancel, their rounding stays.
        assert error <= 5e-6 * max(expected.abs().max().item(), largest / 50), name


def check_forests(rank: int, world_size: int, layout: Layout, checkpoint: Path) -> float:
    """The mean share of computed positions over the forests that were checked."""
    groups = join_groups(layout)
    model = build(layout, groups, checkpoint)
    parts, shares = (model, wrap_for_training(model), groups), []

    # Not shrunk: all ranks must see the same forests.
    @settings(
        max_examples=20, derandomize=True, deadline=None, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(documents())
    def holds(corpus: Documents) -> None:
        reference = reference_gradients(corpus, checkpoint)
        forest = plant(corpus, corpus.numbers, corpus.lengths)
        require_reference(layout, parts, corpus, reference, forest)
        alone = without_sharing(corpus.numbers, corpus.lengths)
        require_reference(layout, parts, corpus, reference, alone)
        shares.append(forest.computed / forest.positions)

    holds()
    return sum(shares) / len(shares)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_random_forests_give_each_documents_loss_and_gradient(layout, tmp_path):
    checkpoint = tiny.save_qwen3(tmp_path / "model", tied=layout.tp == 2, num_hidden_layers=2)
    shares = pool.run(layout.world_size, check_forests, layout, checkpoint)
    assert max(shares) < 0.9


#: Flags and layout of a run, and how far a loss may be from the run without shared prefixes. A
#: first step of every loss in every layout is in test_stage1_definition.py.
RUNS: list[tuple[str, dict[str, int], float]] = [
    ("--sequence-parallel --micro-batch-size 2", {"tp": 2, "dp": 2}, 5e-6),
    ("--loss full --optimizer muonclip", {"pp": 2, "dp": 2}, 5e-6),
    ("--bf16 --use-distributed-optimizer", {"dp": 2}, 5e-3),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    tiny.save_corpus(folder / "corpus", num_documents=60, stems=4)
    tiny.save_qwen3(folder / "model", tied=True, num_hidden_layers=2)
    store = ["--store", folder / "store", "--store-logits", "bf16"]
    stages.succeed("stage0", *stages.inputs(folder), *store)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize(("flags", "layout", "near"), RUNS, ids=lambda x: str(x))
def test_a_run_is_the_same_with_and_without(folder, tmp_path, flags, layout, near):
    runs = {}
    for name in ("share-prefixes", "no-share-prefixes"):
        save = tmp_path / name
        common = ["--train-iters", 10, "--probe-interval", 5, "--global-batch-size", 4]
        argv = stages.argv(folder, save, *common, f"--{name}", *flags.split())
        stages.succeed("stage1", *argv, **layout)
        runs[name] = stages.metrics(save)
    shared, alone = ([x for x in run if "loss" in x] for run in runs.values())
    assert [x["positions"] for x in shared] == [x["positions"] for x in alone]
    assert [x["tokens"] for x in shared] == [x["tokens"] for x in alone]
    assert [x["computed_tokens"] for x in alone] == [x["tokens"] for x in alone]
    assert sum(x["computed_tokens"] for x in shared) < 0.9 * sum(x["tokens"] for x in shared)
    losses = [x["loss"] for x in alone]
    assert len(losses) == 10
    assert [x["loss"] for x in shared] == pytest.approx(losses, abs=near)
    ours, theirs = ([x["probe"]["full_loss"] for x in run if "probe" in x] for run in runs.values())
    assert len(theirs) == 3
    assert ours == pytest.approx(theirs, abs=near)
