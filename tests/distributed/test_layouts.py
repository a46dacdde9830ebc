"""Every layout against transformers: logits, loss, gradients, gradient norm, and three steps.

Qwen3 has two layers, so that a stage of a pipeline has one; Llama, which has no QK-norm, has four.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_replay.checkpoint.export import export_hf
from tests import pool, tiny
from tests.distributed import layouts
from tests.distributed.layouts import Layout
from tests.e2e import stages
from tests.same_weights import require_equal

pytestmark = pytest.mark.distributed

GRIDS = {
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
LLAMA = {
    2: [
        (Layout(tp=2), "tied llama"),
        (Layout(tp=2, sequence_parallel=True), "llama"),
        (Layout(pp=2), "tied llama"),
        (Layout(pp=2), "llama"),
        (Layout(tp=2, bf16=True), "llama"),
    ]
}


def cases_of(world_size: int) -> list[tuple[Layout, str]]:
    """Layout and model: each grid in fp32 and in bf16, one of them tied, in turn."""
    if world_size == 1:
        alone = [(Layout(bf16=bf16), model) for bf16 in (False, True) for model in ("tied", "")]
        return [*alone, (Layout(), "tied llama"), (Layout(), "llama")]
    cases = [
        (replace(grid, bf16=bf16), "tied" if (number + bf16) % 2 == 1 else "")
        for number, grid in enumerate(GRIDS[world_size])
        for bf16 in (False, True)
    ]
    return cases + LLAMA.get(world_size, [])


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """By kind of model: a folder with checkpoint, corpus and reference."""
    folders = {}
    for kind in ("tied", "", "tied llama", "llama"):
        folder = folders[kind] = tmp_path_factory.mktemp("model")
        if "llama" in kind:
            tiny.save_llama(folder / "model", tied="tied" in kind)
        else:
            tiny.save_qwen3(folder / "model", tied="tied" in kind, num_hidden_layers=2)
        corpus = tiny.save_corpus(folder / "corpus", num_documents=40)
        layouts.save_reference(folder / "model", corpus, folder / "expected")
    return folders


def compare_all(
    rank: int, world_size: int, models: dict[str, Path], exports: Path
) -> list[dict[str, Any]]:
    """The report of each case; Llama is exported again, too."""
    reports = []
    for number, (layout, kind) in enumerate(cases_of(world_size)):
        reports.append(layouts.compare(layout, models[kind]))
        if "llama" in kind and not layout.bf16:
            groups = layouts.join_groups(layout)
            model = layouts.build(layout, groups, models[kind] / "model")
            export_hf(model, exports / str(number), groups, dtype=torch.float32)
    return reports


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory) -> tuple[list[list[dict[str, Any]]], Path]:
    """Reports of one process, and its exports."""
    exports = tmp_path_factory.mktemp("exports")
    return pool.run(1, compare_all, models, exports), exports


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_layout_equals_transformers(world_size, models, alone, tmp_path):
    per_rank, exports = alone
    reports_in_fp32 = zip(cases_of(1), per_rank[0], strict=True)
    single = {kind: r["losses"] for (layout, kind), r in reports_in_fp32 if not layout.bf16}
    if world_size > 1:
        per_rank, exports = pool.run(world_size, compare_all, models, tmp_path), tmp_path
    for number, (layout, kind) in enumerate(cases_of(world_size)):
        reports, where, bf16 = [ranks[number] for ranks in per_rank], (layout, kind), layout.bf16
        losses = next(r["losses"] for r in reversed(reports) if r["losses"][0] is not None)
        assert max(r["logits"] for r in reports) <= (0.3 if bf16 else 5e-6), where
        assert max(r["loss"] for r in reports) <= (2e-2 if bf16 else 2e-6), where
        assert max(r["gradients"] for r in reports) <= (0.2 if bf16 else 5e-6, "~"), where
        assert max(r["grad_norm"] for r in reports) <= (5e-2 if bf16 else 1e-6), where
        assert losses == pytest.approx(single[kind], abs=5e-2 if bf16 else 2e-6), where
        if "llama" in kind and not bf16:
            require_equal(exports / str(number), models[kind] / "model")


def test_llama_through_both_stages_and_conversion(models, tmp_path):
    """Stage 0 on TP 2, Stage 1 on PP 2, then to Hugging Face and back."""
    folder, store, run = models["llama"], tmp_path / "store", tmp_path / "run"
    stages.succeed("stage0", *stages.inputs(folder), "--store", store, tp=2)
    stages.succeed("stage1", *stages.argv(folder, run, "--store", store), pp=2)
    stages.convert(run, tmp_path / "tuned")
    stages.convert(tmp_path / "tuned", tmp_path / "mcore", "--save-model-type", "mcore")
    stages.convert(tmp_path / "mcore", tmp_path / "back")
    require_equal(tmp_path / "back", tmp_path / "tuned")
    tuned, before = (tiny.load_reference(d) for d in (tmp_path / "tuned", folder / "model"))
    assert type(tuned) is type(before)
    tokens = torch.arange(12)[None]
    assert not torch.equal(tuned(tokens).logits, before(tokens).logits)
