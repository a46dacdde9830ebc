"""Every layout against transformers: logits, loss, gradients, gradient norm, and three steps.

Two layers, so that a stage of a pipeline has one; the stages of test_llama.py have two.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file

from megatron_replay.data.corpus import Corpus
from tests import pool, tiny
from tests.distributed import layouts
from tests.distributed.layouts import Layout

GRIDS = {
    1: [Layout()],
    2: [
        Layout(tp=2),
        Layout(tp=2, sequence_parallel=True),
        Layout(pp=2),
        # megatron-core drops the sum of a gradient that is not contiguous: only then was it not.
        Layout(tp=2, micro_batch_size=2),
        Layout(tp=2, sequence_parallel=True, micro_batch_size=2),
    ],
    4: [
        Layout(tp=4),
        Layout(tp=4, sequence_parallel=True),
        Layout(tp=2, dp=2),
        Layout(tp=2, dp=2, sequence_parallel=True),
    ],
    8: [
        Layout(tp=4, pp=2),
        Layout(tp=4, pp=2, micro_batch_size=2),
        Layout(tp=4, pp=2, sequence_parallel=True),
    ],
}


def cases_of(world_size: int) -> list[tuple[Layout, bool]]:
    """(layout, tied): each layout in fp32 and in bf16, one of them tied, in turn; on one process,
    both in both.
    """
    cases = []
    for number, grid in enumerate(GRIDS[world_size]):
        for bf16 in (False, True):
            kinds = (True, False) if world_size == 1 else ((number + bf16) % 2 == 1,)
            cases += [(replace(grid, bf16=bf16), tied) for tied in kinds]
    return cases


def save_reference(checkpoint: Path, corpus: Corpus, directory: Path) -> None:
    """What transformers computes, one document at a time, so that nothing can leak between two."""
    model = tiny.load_reference(checkpoint)
    batches = layouts.GlobalBatches(
        corpus.lengths,
        seq_length=layouts.SEQ_LENGTH,
        global_batch_size=layouts.GLOBAL_BATCH_SIZE,
        micro_batch_size=1,
        seed=1,
        epochs=4,
        dp_rank=0,
        dp_size=1,
    )
    documents = [int(d) for pack in batches.global_batch(0) for d in pack]
    logits, losses = {}, []
    for number in documents:
        document = corpus[number]
        tokens = torch.tensor(document.tokens).long()
        out = model(tokens[None, :-1]).logits[0]
        mask = torch.tensor(document.loss_mask[1:])
        losses.append(F.cross_entropy(out[mask], tokens[1:][mask], reduction="none"))
        logits[number] = out.detach()
    loss = torch.cat(losses).mean()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    norm = torch.cat([g.flatten() for g in gradients.values()]).double().norm()
    (directory / "gradients").mkdir(parents=True)
    save_file(gradients, directory / "gradients" / "model.safetensors")
    (directory / "gradients" / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    torch.save(
        {"logits": logits, "loss": loss.detach(), "norm": norm.item()}, directory / "reference.pt"
    )


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[bool, Path]:
    """For tied and untied embeddings: checkpoint, corpus and reference."""
    folders = {}
    for tied in (True, False):
        folder = tmp_path_factory.mktemp("tied" if tied else "untied")
        tiny.save_qwen3(folder / "model", tied=tied, num_hidden_layers=2)
        corpus = tiny.save_corpus(folder / "corpus", num_documents=40)
        save_reference(folder / "model", corpus, folder / "expected")
        folders[tied] = folder
    return folders


def compare_all(rank: int, world_size: int, cases: dict[bool, Path]) -> dict[tuple, dict]:
    return {
        (str(layout), tied): layouts.compare(
            layout,
            cases[tied] / "model",
            cases[tied] / "corpus",
            cases[tied] / "expected",
        )
        for layout, tied in cases_of(world_size)
    }


@pytest.fixture(scope="module")
def single_process_losses(cases) -> dict[bool, list[float]]:
    [report] = pool.run(1, compare_all, cases)
    return {tied: report[str(Layout()), tied]["losses"] for tied in (True, False)}


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_layout_equals_transformers(world_size, cases, single_process_losses):
    per_rank = pool.run(world_size, compare_all, cases)
    for (layout, tied), norm_report in per_rank[0].items():
        reports = [ranks[layout, tied] for ranks in per_rank]
        norm = torch.load(cases[tied] / "expected" / "reference.pt")["norm"]
        losses = next(r["losses"] for r in reversed(reports) if r["losses"][0] is not None)
        bf16 = "bf16" in layout
        where = f"{layout}, {'tied' if tied else 'untied'}"
        assert max(r["logits"] for r in reports) <= (0.3 if bf16 else 5e-6), where
        assert max(r["loss"] for r in reports) <= (2e-2 if bf16 else 2e-6), where
        assert max(r["gradients"] for r in reports) <= (0.2 if bf16 else 5e-6, "~"), where
        assert norm_report["grad_norm"] == pytest.approx(norm, rel=5e-2 if bf16 else 1e-6), where
        assert losses == pytest.approx(single_process_losses[tied], abs=5e-2 if bf16 else 2e-6), (
            where
        )
