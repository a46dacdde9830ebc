"""What Stage 1 trains on, on any layout: losses and gradients by definition, in float64.

The reference runs transformers on each document alone, with every token of it, and takes the loss
over [N, V] with the sets as masks, which it makes from the store's records. It reads no packs, and
has none of Stage 1's savings: padding and unread tokens left out, and the last layer, the head and
the gradient of the output weight computed where they count.

Shapes: N recorded positions of a document, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_replay import flags
from megatron_replay.config import Stage1Config
from megatron_replay.data.corpus import Corpus
from megatron_replay.forward import forward_backward
from megatron_replay.store import CandidateReader, DocumentCandidates
from megatron_replay.training.build import build_run
from tests import pool, tiny
from tests.distributed.layouts import Layout, join_groups, save_tensors, worst_gradient
from tests.e2e import stages

NUM_DOCUMENTS = 10
#: By loss: flags of Stage 1.
LOSSES = {
    "position": "",
    "ghost": "--tail ghost",
    "ghost and divergence": "--tail ghost --kl-weight 0.5",
    "document": "--candidate-scope document",
    "document ghost": "--candidate-scope document --tail ghost",
}
#: A global batch holds all documents, one a pack, or in six packs, some of them empty.
PACKING = {
    "unpacked": f"--no-pack-documents --recompute-granularity full --head-backend torch "
    f"--global-batch-size {NUM_DOCUMENTS}",
    "packed": "--micro-batch-size 2 --global-batch-size 6",
}
TP2, TP2SP, PP2 = Layout(tp=2), Layout(tp=2, sequence_parallel=True), Layout(pp=2)
CASES: dict[int, list[tuple[Layout, str, str]]] = {
    1: [(Layout(), packing, loss) for packing in PACKING for loss in ("position", "document")]
    + [(Layout(), "unpacked", "ghost and divergence")],
    2: [(layout, packing, "position") for layout in (TP2, TP2SP) for packing in PACKING]
    + [(TP2, "packed", "ghost"), (TP2SP, "packed", "document ghost")]
    + [(TP2SP, "unpacked", "ghost and divergence"), (PP2, "packed", "document")],
    8: [
        (Layout(tp=4, pp=2, sequence_parallel=sequence_parallel), packing, "position")
        for sequence_parallel in (False, True)
        for packing in PACKING
    ],
}


def document_loss(
    logits_NV: Tensor, labels_N: Tensor, record: DocumentCandidates, loss: str
) -> Any:
    """[N], from float64 logits at the recorded positions."""
    N, offsets = len(labels_N), record.offsets.tolist()
    mask_NV = torch.zeros(logits_NV.shape, dtype=torch.bool)
    spans = [slice(a, b) for a, b in itertools.pairwise(offsets)]
    for n, span in enumerate(spans):
        span = slice(0, offsets[-1]) if "document" in loss else span
        mask_NV[n, torch.tensor(record.ids[span]).long()] = True
    tail_N = torch.tensor(record.lse).double() + torch.tensor(record.tail_mass).double().log()
    tail_N = tail_N if "ghost" in loss else torch.full((N,), -math.inf)
    inside_NV = logits_NV.masked_fill(~mask_NV, -math.inf)
    log_Z_N = torch.cat([inside_NV, tail_N[:, None]], 1).logsumexp(1)
    losses_N = log_Z_N - logits_NV[torch.arange(N), labels_N]
    if "divergence" in loss:
        divergences = []
        for n, span in enumerate(spans):
            log_q = torch.tensor(record.logits[span]).double().log_softmax(0)
            log_p = logits_NV[n, torch.tensor(record.ids[span]).long()] - log_Z_N[n]
            divergences.append((log_q.exp() * (log_q - log_p)).sum())
        losses_N = losses_N + 0.5 * torch.stack(divergences)
    return losses_N


def save_reference(folder: Path, loss: str) -> dict[str, Any]:
    """Mean loss, counts of positions and of tokens; the gradients go to ``folder / loss``."""
    model = tiny.load_reference(folder / "model").double()
    losses, read, unread = [], 0, 0
    corpus = Corpus(folder / "corpus")
    for number, record in enumerate(CandidateReader(folder / "store")):
        tokens = torch.tensor(corpus[number].tokens).long()
        positions_N = torch.tensor(record.positions)
        logits_NV = model(tokens[None, :-1]).logits[0][positions_N.long()]
        losses.append(document_loss(logits_NV, tokens[positions_N.long() + 1], record, loss))
        read += int(positions_N[-1]) + 1
        unread += len(tokens) - 2 - int(positions_N[-1])
    assert unread >= NUM_DOCUMENTS, "too few tokens follow the last recorded position"
    mean = torch.cat(losses).mean()
    mean.backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters()}
    save_tensors(gradients, folder / "model", folder / loss)
    return {"loss": mean.item(), "positions": len(torch.cat(losses)), "tokens": read}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint, corpus, and a store of a share of the positions."""
    some = "--position-strategy random --position-fraction 0.3 --coverage 0.3 --store-logits fp16"
    folder = tmp_path_factory.mktemp("definition")
    return stages.prepare(folder, *some.split(), documents=NUM_DOCUMENTS, longest=32)


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str, dict[str, Any]]:
    return {loss: save_reference(folder, loss) for loss in LOSSES}


def run_all(rank: int, world_size: int, folder: Path, save: Path) -> list[dict[str, Any]]:
    reports = []
    for number, (layout, packing, loss) in enumerate(CASES[world_size]):
        groups = join_groups(layout)
        argv = [
            *stages.argv(folder, save / str(number), "--probe-interval", 0),
            *LOSSES[loss].split(), *PACKING[packing].split(),
            "--tensor-model-parallel-size", layout.tp, "--pipeline-model-parallel-size", layout.pp,
            *["--sequence-parallel"] * layout.sequence_parallel,
        ]  # fmt: skip
        config = flags.parse(Stage1Config, list(map(str, argv)), program="stage1").config
        built = build_run(config, groups)
        batch = built.make_batch(0)
        sums = forward_backward(built.wrapped, batch.micro_batches)
        reports.append({
            "sums": None if sums is None else sums.tolist(),
            "gradient": worst_gradient(built.model, built.wrapped, groups, folder / loss),
            "tokens": batch.tokens,
            "steps": built.train_iters,
            "rows": [work.rows is not None for work in batch.micro_batches],
            "recompute": built.model.config.recompute_granularity,
        })  # fmt: skip
    return reports


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", list(CASES))
def test_losses_and_gradients_are_those_of_the_definition(world_size, folder, references, tmp_path):
    assert len({round(reference["loss"], 4) for reference in references.values()}) == len(LOSSES)
    per_rank = pool.run(world_size, run_all, folder, tmp_path)
    for number, case in enumerate(CASES[world_size]):
        _, packing, loss = case
        reports, expected = [ranks[number] for ranks in per_rank], references[loss]
        total, count = next(r["sums"] for r in reports if r["sums"] is not None)
        assert count == expected["positions"], case
        assert total / count == pytest.approx(expected["loss"], rel=5e-6), case
        assert max(r["gradient"] for r in reports) <= (5e-6, "~"), case
        assert {(r["steps"], r["tokens"]) for r in reports} == {(1, expected["tokens"])}, case
        unpacked = packing == "unpacked"
        assert reports[0]["rows"] == [True] * (NUM_DOCUMENTS if unpacked else 3)
        assert reports[0]["recompute"] == ("full" if unpacked else None)
