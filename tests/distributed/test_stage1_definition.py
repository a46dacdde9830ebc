"""What Stage 1 trains on, on any layout: logits, losses and gradients by definition, in float64.

The reference runs transformers on each document alone, with every token of it, and takes the loss
over [N, V] with the sets as masks, which it makes from the store's records. It reads no packs, and
has none of Stage 1's savings: shared prefixes computed once, unread tokens left out, and the last
layer, the head and the gradient of the output weight computed where they count. Qwen3 has two
layers, so that a stage of a pipeline has one; Llama, which has no QK-norm, has four. The others
have a number of layers and of tokens that no layout divides.

Shapes: N recorded positions of a document, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay import flags
from megatron_replay.config import Stage1Config
from megatron_replay.data.corpus import Corpus
from megatron_replay.forward import MicroBatch, forward_backward, forward_only
from megatron_replay.store import CandidateReader, DocumentCandidates
from megatron_replay.training.build import build_run
from tests import pool, tiny
from tests.distributed.layouts import Layout, join_groups, save_tensors, worst_gradient
from tests.e2e import stages
from tests.npu_stub import fused

NUM_DOCUMENTS, SEQ_LENGTH = 10, 64
ODD = {"num_hidden_layers": 3, "vocab_size": 513}
LLAMA3 = {
    "rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
#: How each is saved; the first two are those of most cases.
MODELS: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "tied": (tiny.save_qwen3, {"tied": True, "num_hidden_layers": 2}),
    "untied": (tiny.save_qwen3, {"tied": False, "num_hidden_layers": 2}),
    "tied llama": (tiny.save_llama, {"tied": True}),
    "llama": (tiny.save_llama, {"tied": False}),
    "qwen2": (tiny.save_qwen2, {"tied": True, **ODD}),
    "llama 3": (tiny.save_llama, {"tied": False, "rope_parameters": LLAMA3, **ODD}),
}
#: By loss: flags of Stage 1.
LOSSES = {
    "position": "",
    "ghost": "--tail ghost",
    "ghost and divergence": "--tail ghost --kl-weight 0.5",
    "document": "--candidate-scope document",
    "document ghost": "--candidate-scope document --tail ghost",
    "document ghost and divergence": "--candidate-scope document --tail ghost --kl-weight 0.5",
    "full": "--loss full",
    "full and divergence": "--loss full --kl-weight 0.5",
}
#: A global batch holds all documents, one a pack or in eight packs; they are computed together,
#: with shared prefixes or without.
PACKING = {
    "unpacked": "--no-pack-documents --recompute-granularity full "
    f"--global-batch-size {NUM_DOCUMENTS}",
    "packed": "--micro-batch-size 2 --global-batch-size 8",
    "unshared": "--no-share-prefixes --global-batch-size 8",
}
TP2, TP2SP, PP2 = Layout(tp=2), Layout(tp=2, sequence_parallel=True), Layout(pp=2)
GRIDS = {
    1: [Layout()],
    2: [TP2, TP2SP, PP2],
    4: [
        Layout(tp=4),
        Layout(tp=4, sequence_parallel=True),
        Layout(tp=2, dp=2),
        Layout(tp=2, dp=2, sequence_parallel=True),
    ],
    8: [Layout(tp=4, pp=2), Layout(tp=4, pp=2, sequence_parallel=True)],
}
Case = tuple[Layout, str, str, str]
RESTRICTED: dict[int, list[Case]] = {
    1: [
        (Layout(), "tied", packing, loss)
        for packing in PACKING
        for loss in ("position", "document")
    ]
    + [(Layout(), "tied", "unpacked", "ghost and divergence")]
    + [(Layout(), "tied", "packed", "full and divergence")]
    + [(Layout(), "untied", "unshared", "full")],
    2: [(layout, "tied", packing, "position") for layout in (TP2, TP2SP) for packing in PACKING]
    + [(TP2, "tied", "packed", "ghost"), (TP2SP, "tied", "packed", "document ghost")]
    + [(TP2SP, "tied", "unpacked", "ghost and divergence"), (PP2, "tied", "packed", "document")],
    4: [(Layout(tp=2, dp=2), "untied", "packed", "position")],
    8: [(GRIDS[8][1], "tied", packing, "position") for packing in PACKING]
    + [
        (GRIDS[8][1], "tied", "packed", f"{loss} and divergence")
        for loss in ("document ghost", "full")
    ],
}
OTHERS: dict[int, list[Case]] = {
    1: [(Layout(), model, "packed", "full") for model in [*MODELS][2:]],
    2: [
        (TP2, "tied llama", "packed", "position"), (TP2SP, "llama", "packed", "full"),
        (PP2, "tied llama", "packed", "full"), (PP2, "llama", "unpacked", "position"),
        (Layout(tp=2, bf16=True), "llama", "packed", "full"),
        (TP2, "qwen2", "packed", "position"), (TP2SP, "qwen2", "unpacked", "full"),
        (PP2, "qwen2", "packed", "full"), (TP2SP, "llama 3", "packed", "ghost and divergence"),
        (TP2, "llama 3", "packed", "full"), (PP2, "llama 3", "packed", "position"),
    ],
    4: [(GRIDS[4][0], "qwen2", "packed", "full"), (GRIDS[4][1], "qwen2", "packed", "position")],
    8: [(grid, "qwen2", "packed", loss) for grid in GRIDS[8] for loss in ("document", "full")],
}  # fmt: skip


def cases_of(world_size: int) -> list[Case]:
    """Besides those above, each grid in fp32 and in bf16 under the full loss.

    On four and eight ranks in one packing: each is on fewer.
    """
    packings = ["unpacked", "packed"] if world_size < 4 else ["packed"]
    full = [
        (replace(grid, bf16=bf16), [*MODELS][(number + bf16) % 2], packing, "full")
        for number, (grid, packing) in enumerate(itertools.product(GRIDS[world_size], packings))
        for bf16 in (False, True)
    ]
    return RESTRICTED[world_size] + OTHERS[world_size] + full


def document_loss(
    logits_NV: Tensor, labels_N: Tensor, record: DocumentCandidates, loss: str
) -> Any:
    """[N], from float64 logits at the recorded positions."""
    N, offsets = len(labels_N), record.offsets.tolist()
    if loss == "full":
        return logits_NV.logsumexp(1) - logits_NV[torch.arange(N), labels_N]
    mask_NV = torch.full(logits_NV.shape, "full" in loss)
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
    losses, logits, read, unread = [], [], 0, 0
    corpus = Corpus(folder / "corpus")
    for number, record in enumerate(CandidateReader(folder / "store")):
        tokens = torch.tensor(corpus[number].tokens).long()
        positions_N = torch.tensor(record.positions).long()
        if loss == "full":
            positions_N = torch.tensor(corpus[number].loss_mask[1:]).nonzero().squeeze(1)
        logits.append(model(tokens[None, :-1]).logits[0])
        logits_NV = logits[number][positions_N]
        losses.append(document_loss(logits_NV, tokens[positions_N + 1], record, loss))
        read += int(positions_N[-1]) + 1
        unread += len(tokens) - 2 - int(positions_N[-1])
    assert unread >= NUM_DOCUMENTS or loss == "full", "few tokens after the last recorded position"
    mean = torch.cat(losses).mean()
    mean.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
    single = {name: gradient.float() for name, gradient in gradients.items()}
    save_tensors(single, folder / "model", folder / loss)
    torch.save([each.detach() for each in logits], folder / loss / "logits.pt")
    count = len(torch.cat(losses))
    return {"loss": mean.item(), "positions": count, "tokens": read, "norm": norm}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By model: checkpoint, corpus, and a store of a share of the positions."""
    some = "--position-strategy random --position-fraction 0.3 --coverage 0.3 --store-logits fp16"
    folders = {}
    for model, (save, settings) in MODELS.items():
        folder = folders[model] = tmp_path_factory.mktemp("definition")
        save(folder / "model", **settings)
        tiny.save_corpus(folder / "corpus", num_documents=NUM_DOCUMENTS, longest=32, stems=3)
        store = ["--store", folder / "store", *some.split()]
        stages.succeed("stage0", *stages.inputs(folder), *store)
    return folders


@pytest.fixture(scope="module")
def references(folders: dict[str, Path]) -> dict[tuple[str, str], dict[str, Any]]:
    """By model and loss, of the cases there are."""
    named = {case[1::2] for size in GRIDS for case in cases_of(size)}
    return {(model, loss): save_reference(folders[model], loss) for model, loss in sorted(named)}


def worst_logit(
    model: torch.nn.Module, work: list[MicroBatch], shard: range, reference: Path
) -> float:
    """Largest difference of a logit, of this rank's shard, at any position of any document."""
    expected: list[Tensor] = torch.load(reference)
    every = [MicroBatch(x.batch, lambda hidden, weight: hidden.all() @ weight.T) for x in work]
    worst = 0.0
    for micro_batch, logits_TV in zip(work, forward_only(model, every), strict=False):
        forest, path = micro_batch.batch.forest, []
        first = itertools.accumulate(forest.own_D.tolist(), initial=0)
        for number, shared, (start, stop) in zip(
            forest.document_D, forest.shared_D, itertools.pairwise(first), strict=True
        ):
            path = [*path[:shared], *range(start, stop)]
            found = logits_TV[path].double()
            worst = max(
                worst, (found - expected[number][:, shard.start : shard.stop]).abs().max().item()
            )
    return worst


def step(case: Case, folder: Path, save: Path) -> dict[str, Any]:
    """The gradients of a first step in this process, on its share of the batch, and its norm."""
    layout, _, packing, loss = case
    groups = join_groups(layout)
    argv = [
        *stages.argv(folder, save, "--probe-interval", int(loss == "full")),
        *LOSSES[loss].split(), *PACKING[packing].split(),
        "--tensor-model-parallel-size", layout.tp, "--pipeline-model-parallel-size", layout.pp,
        *["--sequence-parallel"] * layout.sequence_parallel, *["--bf16"] * layout.bf16,
        *["--head-backend", "torch"] * (packing == "unpacked" and "full" not in loss),
    ]  # fmt: skip
    config = flags.parse(Stage1Config, list(map(str, argv)), program="stage1").config
    built = build_run(config, groups)
    batch, lengths = built.make_batch(0), []
    norm = built.model.module.decoder.layers[0].input_layernorm
    norm.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[0]))
    logit = 0.0
    if loss == "full":
        reference = folder / loss / "logits.pt"
        shard = groups.vocabulary_shard(built.model.shape.vocab_size)
        logit = worst_logit(built.model.module, batch.micro_batches, shard, reference)
    sums = forward_backward(built.wrapped, batch.micro_batches)
    if sums is not None:
        dist.all_reduce(sums, group=groups.dp_group)
    gradient = worst_gradient(built.model, built.wrapped, groups, folder / loss)
    built.optimizer.prepare_grads()
    built.optimizer.step_with_ready_grads()
    return {
        "sums": None if sums is None else sums.tolist(),
        "logit": logit,
        "gradient": gradient,
        "norm": built.optimizer.optimizer.grad_norm,
        "tokens": batch.tokens,
        "computed": [part.computed for part in batch.parts],
        "steps": built.data.train_iters,
        "rows": [work.rows is not None for work in batch.micro_batches],
        "lengths": set(lengths),
        "recompute": built.model.config.recompute_granularity,
    }


def run_all(
    rank: int, world_size: int, folders: dict[str, Path], save: Path
) -> list[dict[str, Any]]:
    return [
        step(case, folders[case[1]], save / str(number))
        for number, case in enumerate(cases_of(world_size))
    ]


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", GRIDS)
def test_losses_and_gradients_are_those_of_the_definition(
    world_size, folders, references, tmp_path
):
    losses = {
        round(found["loss"], 4) for (model, _), found in references.items() if model == "tied"
    }
    assert len(losses) == len(LOSSES)
    per_rank = pool.run(world_size, run_all, folders, tmp_path)
    for number, case in enumerate(cases_of(world_size)):
        layout, model, packing, loss = case
        reports, expected = [ranks[number] for ranks in per_rank], references[model, loss]
        total, count = next(r["sums"] for r in reports if r["sums"] is not None)
        assert count == expected["positions"], case
        near = 2e-2 if layout.bf16 else 2e-6
        assert total / count == pytest.approx(expected["loss"], abs=near), case
        worst = max(r["logit"] for r in reports)
        assert worst <= (0.3 if layout.bf16 else 5e-6), case
        assert (worst > 0) is (loss == "full"), case  # float64 is never met to the bit
        assert max(r["gradient"] for r in reports) <= (0.2 if layout.bf16 else 5e-6, "~"), case
        norms = [expected["norm"]] * world_size
        assert [r["norm"] for r in reports] == pytest.approx(
            norms, rel=5e-2 if layout.bf16 else 1e-6
        )
        assert {(r["steps"], r["tokens"]) for r in reports} == {(1, expected["tokens"])}, case
        computed = reports[0]["computed"]
        assert reports[0]["rows"] == [True] * (len(computed) // layout.dp)
        assert (sum(computed) < 0.9 * expected["tokens"]) is (packing != "unshared"), case
        # Sequence parallelism that is silently off would pass every comparison.
        divisor = layout.tp if layout.sequence_parallel else 1
        lengths = {-(-length // layout.tp) * layout.tp // divisor for length in computed}
        assert {n for r in reports for n in r["lengths"]} == lengths, case
        assert reports[0]["recompute"] == ("full" if packing == "unpacked" else None)


FUSED: list[Case] = [
    (TP2SP, "tied", "unpacked", "full"), (TP2, "llama", "packed", "full"),
    (replace(TP2SP, bf16=True), "tied", "packed", "full"),
]  # fmt: skip


def run_fused(rank: int, world_size: int, folders: dict[str, Path], save: Path) -> list[Any]:
    with fused.chosen():
        return [
            step(case, folders[case[1]], save / str(number)) for number, case in enumerate(FUSED)
        ]


@pytest.mark.distributed
def test_the_fused_operators_of_npus_compute_the_same(folders, references, tmp_path):
    """Norm, activation, rotation and attention, by stand-ins for torch_npu's operators."""
    per_rank = pool.run(2, run_fused, folders, tmp_path)
    for number, case in enumerate(FUSED):
        reports, expected = [ranks[number] for ranks in per_rank], references[case[1], "full"]
        near = 2e-2 if case[0].bf16 else 2e-6
        total, count = reports[0]["sums"]
        assert total / count == pytest.approx(expected["loss"], abs=near), case
        assert max(r["gradient"] for r in reports) <= (0.2 if case[0].bf16 else 5e-6, "~"), case
