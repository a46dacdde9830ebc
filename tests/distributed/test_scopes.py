"""Sets of positions and of documents: losses and gradients by definition.

The reference runs transformers on each document alone, in float64, and takes the loss over [T, V]
with the sets as masks, which it makes from the store's records by their documents and positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_replay import flags
from megatron_replay.config import Stage1Config
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.packing import fit_documents, without_unread
from megatron_replay.data.sampler import GlobalBatches
from megatron_replay.forward import forward_backward
from megatron_replay.functional import restricted_cross_entropy_dense
from megatron_replay.store import CandidateReader
from megatron_replay.training.build import build_run
from tests import pool, tiny
from tests.distributed.layouts import Layout, join_groups, worst_gradient
from tests.e2e import stages

SEQ_LENGTH, GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE = 64, 4, 2
#: By case: flags, and the layout of the two ranks.
CASES: dict[str, tuple[list[str], Layout]] = {
    "position": (["--tail", "ghost"], Layout(tp=2)),
    "document": (["--tail", "ghost"], Layout(tp=2, sequence_parallel=True)),
    "document PP2": ([], Layout(pp=2)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint, corpus and store."""
    folder = tmp_path_factory.mktemp("scopes")
    tiny.save_corpus(folder / "corpus", num_documents=12, longest=32)
    tiny.save_qwen3(folder / "model", tied=False, num_hidden_layers=2)
    flags = ["--position-strategy", "random", "--coverage", 0.3]
    stages.succeed("stage0", *stages.inputs(folder), "--store", folder / "store", *flags)
    return folder


def first_micro_batches(corpus: Corpus, reader: CandidateReader) -> list[set[int]]:
    """Documents of each micro-batch of the first global batch."""
    lengths = fit_documents(corpus.lengths, SEQ_LENGTH, "error").lengths
    batches = GlobalBatches(
        without_unread(lengths, reader.stops()), seq_length=SEQ_LENGTH,
        global_batch_size=GLOBAL_BATCH_SIZE, micro_batch_size=MICRO_BATCH_SIZE,
        seed=1234, epochs=1, dp_rank=0, dp_size=1,
    )  # fmt: skip
    return [{int(i) for pack in packs for i in pack} for packs in batches.micro_batches(0)]


def masks(reader: CandidateReader, documents: set[int], scope: str) -> dict[int, Tensor]:
    """By document of a micro-batch: bool [N, V], the set of each recorded position."""
    found = {}
    for i in documents:
        record = reader[i]
        found[i] = torch.zeros(len(record.positions), tiny.VOCAB_SIZE, dtype=torch.bool)
        for n in range(len(record.positions)):
            first, last = (n, n + 1) if scope == "position" else (0, len(record.positions))
            ids = record.ids[record.offsets[first] : record.offsets[last]]
            found[i][n, torch.tensor(ids).long()] = True
    return found


def save_reference(folder: Path, case: str) -> dict[str, Any]:
    """Loss and number of positions of the first global batch; its gradients go to a file."""
    scope, has_tail = case.split()[0], "ghost" in CASES[case][0]
    corpus, reader = Corpus(folder / "corpus"), CandidateReader(folder / "store")
    model, losses = tiny.load_reference(folder / "model").double(), []
    for documents in first_micro_batches(corpus, reader):
        for i, mask_NV in masks(reader, documents, scope).items():
            tokens, at = torch.tensor(corpus[i].tokens).long(), torch.tensor(reader[i].positions)
            logits_NV = model(tokens[None, :-1]).logits[0][at.long()]
            tail_N = torch.tensor(reader[i].lse).double()
            tail_N = tail_N + torch.tensor(reader[i].tail_mass).double().log()
            labels_N = tokens[at.long() + 1]
            tail = tail_N if has_tail else None
            losses.append(restricted_cross_entropy_dense(logits_NV, mask_NV, labels_N, tail))
    loss = torch.cat(losses).mean()
    loss.backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters()}
    directory = folder / case
    directory.mkdir()
    save_file(gradients, directory / "model.safetensors")
    (directory / "config.json").write_bytes((folder / "model" / "config.json").read_bytes())
    return {"loss": loss.item(), "positions": len(torch.cat(losses))}


def compare(rank: int, world_size: int, folder: Path, save: Path) -> dict[str, dict[str, Any]]:
    return {case: run(case, folder, save / case) for case in CASES}


def run(case: str, folder: Path, save: Path) -> dict[str, Any]:
    extra, layout = CASES[case]
    groups = join_groups(layout)
    argv = [
        *stages.inputs(folder), "--store", folder / "store", "--save", save, "--lr", 1e-3,
        "--optimizer", "adamw", "--probe-interval", 0, "--global-batch-size", GLOBAL_BATCH_SIZE,
        "--micro-batch-size", MICRO_BATCH_SIZE, *extra,
        "--candidate-scope", case.split()[0],
        "--tensor-model-parallel-size", layout.tp, "--pipeline-model-parallel-size", layout.pp,
        *["--sequence-parallel"] * layout.sequence_parallel,
    ]  # fmt: skip
    config = flags.parse(Stage1Config, list(map(str, argv)), program="stage1").config
    built = build_run(config, groups)
    made = built.make_batch(0)
    sums = forward_backward(built.wrapped, made.micro_batches)
    return {
        "sums": None if sums is None else sums.tolist(),
        "gradient": worst_gradient(built.model, built.wrapped, groups, folder / case),
    }


@pytest.mark.distributed
def test_loss_and_gradients_are_those_of_the_definition(folder, tmp_path):
    references = {case: save_reference(folder, case) for case in CASES}
    assert len({round(r["loss"], 4) for r in references.values()}) == len(CASES)
    per_rank = pool.run(2, compare, folder, tmp_path)
    for case, reference in references.items():
        reports = [ranks[case] for ranks in per_rank]
        total, count = next(r["sums"] for r in reports if r["sums"] is not None)
        assert count == reference["positions"], case
        assert total / count == pytest.approx(reference["loss"], rel=2e-6), case
        assert max(r["gradient"] for r in reports) <= (5e-6, "~"), case
