"""Every exact saving of Stage 1 at once: loss and gradients are those of transformers.

The reference runs each document alone, with every token of it, and takes the restricted loss by its
definition.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_replay import flags
from megatron_replay.config import Stage1Config
from megatron_replay.data.corpus import Corpus
from megatron_replay.forward import forward_backward
from megatron_replay.store import CandidateReader
from megatron_replay.training.build import build_run
from tests import pool, tiny
from tests.distributed.layouts import Layout, join_groups, worst_gradient
from tests.e2e import stages

LAYOUTS = {
    1: [Layout()],
    2: [Layout(tp=2), Layout(tp=2, sequence_parallel=True)],
    8: [Layout(tp=4, pp=2), Layout(tp=4, pp=2, sequence_parallel=True)],
}
NUM_DOCUMENTS = 10
#: Flags; a global batch holds all documents, one a pack, or in six packs, some of them empty.
ARMS = {
    "unpacked": [
        "--no-pack-documents", "--recompute-granularity", "full", "--head-backend", "torch",
        "--global-batch-size", str(NUM_DOCUMENTS),
    ],
    "packed": ["--micro-batch-size", "2", "--global-batch-size", "6"],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint, corpus, a store of a share of the positions, and the reference."""
    folder = tmp_path_factory.mktemp("savings")
    corpus = tiny.save_corpus(folder / "corpus", num_documents=NUM_DOCUMENTS, longest=32)
    tiny.save_qwen3(folder / "model", tied=True, num_hidden_layers=2)
    strategy = ["--position-strategy", "random", "--position-fraction", 0.3]
    stages.succeed("stage0", *stages.inputs(folder), "--store", folder / "store", *strategy)
    save_reference(folder, corpus, CandidateReader(folder / "store"))
    return folder


def save_reference(folder: Path, corpus: Corpus, reader: CandidateReader) -> None:
    """Mean over the recorded positions of logsumexp(z[S]) - z[label], and its gradients."""
    model = tiny.load_reference(folder / "model")
    losses, tokens_read, unread = [], 0, 0
    for number, recorded in enumerate(reader):
        tokens = torch.tensor(corpus[number].tokens).long()
        logits_TV = model(tokens[None, :-1]).logits[0]
        for n, position in enumerate(recorded.positions.tolist()):
            candidates = recorded.ids[recorded.offsets[n] : recorded.offsets[n + 1]]
            z = logits_TV[position]
            losses.append(z[torch.tensor(candidates).long()].logsumexp(0) - z[tokens[position + 1]])
        tokens_read += int(recorded.positions[-1]) + 1
        unread += len(tokens) - 2 - int(recorded.positions[-1])
    loss = torch.stack(losses).mean()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    (folder / "gradients").mkdir()
    save_file(gradients, folder / "gradients" / "model.safetensors")
    (folder / "gradients" / "config.json").write_bytes(
        (folder / "model" / "config.json").read_bytes()
    )
    counts = {"positions": len(losses), "tokens": tokens_read, "unread": unread}
    numbers = {"loss": loss.item(), **counts}
    (folder / "reference.json").write_text(json.dumps(numbers))


def compare(
    rank: int, world_size: int, folder: Path, save: Path
) -> dict[str, dict[str, dict[str, Any]]]:
    """By layout and arm: loss, worst gradient, and what shows that savings are on, or off."""
    return {
        str(layout): {arm: run(layout, arm, folder, save / f"{layout}{arm}") for arm in ARMS}
        for layout in LAYOUTS[world_size]
    }


def run(layout: Layout, arm: str, folder: Path, save: Path) -> dict[str, Any]:
    groups = join_groups(layout)
    argv = [
        *stages.inputs(folder), "--store", folder / "store", "--save", save, "--lr", 1e-3,
        "--optimizer", "adamw", "--probe-interval", 0, *ARMS[arm],
        "--tensor-model-parallel-size", layout.tp, "--pipeline-model-parallel-size", layout.pp,
        *["--sequence-parallel"] * layout.sequence_parallel,
    ]  # fmt: skip
    config = flags.parse(Stage1Config, list(map(str, argv)), program="stage1").config
    built = build_run(config, groups)
    made = built.make_batch(0)
    sums = forward_backward(built.wrapped, made.micro_batches)
    return {
        "sums": None if sums is None else sums.tolist(),
        "gradient": worst_gradient(built.model, built.wrapped, groups, folder / "gradients"),
        "tokens": made.tokens,
        "steps": built.train_iters,
        "rows": [work.rows is not None for work in made.micro_batches],
        "recompute": built.model.config.recompute_granularity,
    }


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", list(LAYOUTS))
def test_all_savings_together_change_nothing(world_size, folder, tmp_path):
    reference = json.loads((folder / "reference.json").read_text())
    assert reference["unread"] >= NUM_DOCUMENTS, "few tokens lie behind what is recorded"
    per_rank = pool.run(world_size, compare, folder, tmp_path)
    for layout in per_rank[0]:
        reports = {arm: [ranks[layout][arm] for ranks in per_rank] for arm in ARMS}
        for arm, of_ranks in reports.items():
            where = f"{layout}, {arm}"
            total, count = next(r["sums"] for r in of_ranks if r["sums"] is not None)
            assert count == reference["positions"], where
            assert total / count == pytest.approx(reference["loss"], rel=5e-6), where
            assert max(r["gradient"] for r in of_ranks) <= (5e-6, "~"), where
            assert {r["steps"] for r in of_ranks} == {1}, where
            assert {r["tokens"] for r in of_ranks} == {reference["tokens"]}, where
        unpacked, packed = reports["unpacked"][0], reports["packed"][0]
        assert (unpacked["rows"], packed["rows"]) == ([True] * NUM_DOCUMENTS, [True] * 3)
        assert (unpacked["recompute"], packed["recompute"]) == ("full", None)
