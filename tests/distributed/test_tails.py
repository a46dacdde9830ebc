"""The ghost term and the divergence on shards of the vocabulary, and in Stage 1 on any layout.

Shapes: T positions, V vocabulary, H hidden channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay.data.corpus import Corpus
from megatron_replay.data.sampler import GlobalBatches
from megatron_replay.kernels import HEAD
from megatron_replay.store import CandidateReader
from tests import pool, tiny
from tests.e2e import stages
from tests.loss import tails
from tests.loss.references import error, head_case

pytestmark = pytest.mark.distributed

DOCUMENTS = 10


def cases() -> list[tuple[Any, dict[str, Any]]]:
    """Own sets and shared ones, with a divergence and without."""
    found = []
    for groups in (0, 4):
        case = head_case(T=140, V=64, H=16, seed=groups, groups=groups, share=0.1, scale=0.3)
        for own in (None, tails.own_sets(case, seed=2)):
            found.append((case, {"own": own, "kl_weight": 0.5}))
    return found


def run_on(rank: int, world_size: int) -> list[list[Tensor]]:
    """Loss, dH and dW of each case on this rank's shard; with the form for CPUs."""
    rows = 64 // world_size
    ids = rank * rows + torch.arange(rows)
    backend = HEAD.choose("cpu", torch.empty(0))
    return [
        tails.run(
            case, **options, backend=backend, vocab_start=rank * rows,
            weight_VH=case.weight_VH[ids], tp_group=dist.group.WORLD,
        )
        for case, options in cases()
    ]  # fmt: skip


def test_losses_and_gradients_equal_dense() -> None:
    ranks = pool.run(2, run_on)
    for number, (case, options) in enumerate(cases()):
        loss_T, dH_TH, _ = ranks[0][number]
        shards = [rank[number][2] for rank in ranks]
        dW_VH = torch.cat(shards)
        for ours, exact in zip((loss_T, dH_TH, dW_VH), tails.dense(case, **options), strict=True):
            assert error(ours, exact) < 2e-6, number


def steps(folder: Path, save: Path, stop: int, *flags: object, **layout: int) -> list[float]:
    """The losses of a run up to iteration ``stop``: every document a micro-batch, twice."""
    stages.succeed(
        "stage1", *stages.argv(folder, save, "--probe-interval", 0), "--tail", "ghost",
        "--kl-weight", 0.5, "--global-batch-size", DOCUMENTS,
        "--no-pack-documents", "--train-epochs", 2, "--exit-interval", stop, *flags, **layout,
    )  # fmt: skip
    return stages.losses(save)


def first_loss(folder: Path) -> float:
    """By the definitions, in transformers' logits."""
    corpus, reader = Corpus(folder / "corpus"), CandidateReader(folder / "store")
    model = tiny.load_reference(folder / "model")
    batches = GlobalBatches(
        corpus.lengths, seq_length=64, global_batch_size=DOCUMENTS, micro_batch_size=1, seed=1234,
        epochs=2, pack_documents=False, dp_rank=0, dp_size=1,
    )  # fmt: skip
    losses = []
    for (document,) in batches.global_batch(0):
        recorded, tokens = reader[document], torch.tensor(corpus[document].tokens).long()
        logits_TV = model(tokens[None, :-1]).logits[0].detach().double()
        for n, position in enumerate(recorded.positions.tolist()):
            span = slice(*recorded.offsets[n : n + 2])
            ids, z = torch.from_numpy(recorded.ids[span]).long(), logits_TV[position]
            ghost = np.exp(np.float64(recorded.lse[n])) * recorded.tail_mass[n]
            log_Z = (z[ids].exp().sum() + ghost).log()
            log_q = torch.from_numpy(recorded.logits[span]).double().log_softmax(0)
            divergence = (log_q.exp() * (log_q - z[ids] + log_Z)).sum()
            losses.append(log_Z - z[tokens[position + 1]] + 0.5 * divergence)
    return float(torch.stack(losses).mean())


def test_stage_1_by_the_definitions_and_the_same_on_any_layout(tmp_path: Path) -> None:
    """A run that resumes on other layouts goes on as the whole one."""
    corpus = tiny.save_corpus(tmp_path / "corpus", num_documents=DOCUMENTS)
    tiny.save_qwen3(tmp_path / "model", tied=True, num_hidden_layers=2)
    strategy = ["--coverage", 0.3, "--store-logits", "fp16", "--store", tmp_path / "store"]
    stages.succeed("stage0", *stages.inputs(tmp_path), *strategy)
    whole = steps(tmp_path, tmp_path / "whole", 2)
    assert whole[0] == pytest.approx(first_loss(tmp_path), rel=1e-5)
    assert len(whole) == 2
    assert len(corpus) == DOCUMENTS
    steps(tmp_path, tmp_path / "cut", 1, "--sequence-parallel", tp=2)
    cut = steps(tmp_path, tmp_path / "cut", 2, dp=2)  # with the gradients of shards in its weights
    assert cut == pytest.approx(whole, rel=1e-5)
