"""Llama, which has no QK-norm: every stage of the way, and QK-Clip, against transformers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import eager_attention_forward, repeat_kv

from megatron_replay.checkpoint.export import export_hf
from megatron_replay.checkpoint.hf import HFReader
from megatron_replay.checkpoint.load import load_model
from megatron_replay.config import ModelConfigSource
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.replay import full_targets
from megatron_replay.errors import CheckpointError
from megatron_replay.forward import MicroBatch, forward_backward
from megatron_replay.model import heads
from megatron_replay.model.attention import record_max_logits, take_max_logits
from megatron_replay.model.config import ModelConfig
from megatron_replay.optim.muonclip import max_over_replicas, qk_clip_factors, scale_query_key_
from megatron_replay.training.step import wrap_for_training
from tests import pool, tiny
from tests.distributed import layouts
from tests.distributed.layouts import Layout
from tests.distributed.test_layouts import save_reference
from tests.e2e import stages
from tests.same_weights import require_equal

GRIDS = {
    1: [(Layout(), True), (Layout(), False)],
    2: [
        (Layout(tp=2), True),
        (Layout(tp=2, sequence_parallel=True), False),
        (Layout(pp=2), True),
        (Layout(pp=2), False),
        (Layout(tp=2, bf16=True), False),
    ],
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[bool, Path]:
    """For tied and untied embeddings: checkpoint, corpus and reference."""
    folders = {}
    for tied in (True, False):
        folder = tmp_path_factory.mktemp("tied" if tied else "untied")
        tiny.save_llama(folder / "model", tied=tied)
        corpus = tiny.save_corpus(folder / "corpus", num_documents=40)
        save_reference(folder / "model", corpus, folder / "expected")
        folders[tied] = folder
    return folders


def compare_and_export(
    rank: int, world_size: int, cases: dict[bool, Path], exports: Path
) -> list[dict[str, Any]]:
    reports = []
    for layout, tied in GRIDS[world_size]:
        inputs = (cases[tied] / name for name in ("model", "corpus", "expected"))
        reports.append(layouts.compare(layout, *inputs))
        groups = layouts.join_groups(layout)
        model = layouts.build(layout, groups, cases[tied] / "model")
        export_hf(
            model,
            exports / f"{layout}-{tied}",
            groups,
            dtype=torch.bfloat16 if layout.bf16 else torch.float32,
        )
    return reports


@pytest.mark.distributed
def test_layouts_equal_transformers_and_export_the_same_bits(cases, tmp_path):
    losses: dict[bool, list[float]] = {}
    for world_size, grid in GRIDS.items():
        per_rank = pool.run(world_size, compare_and_export, cases, tmp_path)
        for (layout, tied), reports in zip(grid, zip(*per_rank, strict=True), strict=True):
            norm = torch.load(cases[tied] / "expected" / "reference.pt")["norm"]
            where, bf16 = f"{layout}, {'tied' if tied else 'untied'}", layout.bf16
            ours = next(r["losses"] for r in reversed(reports) if r["losses"][0] is not None)
            alone = losses.setdefault(tied, ours)
            assert max(r["logits"] for r in reports) <= (0.3 if bf16 else 5e-6), where
            assert max(r["loss"] for r in reports) <= (2e-2 if bf16 else 2e-6), where
            assert max(r["gradients"] for r in reports) <= (0.2 if bf16 else 5e-6, "~"), where
            assert reports[0]["grad_norm"] == pytest.approx(norm, rel=5e-2 if bf16 else 1e-6), where
            assert ours == pytest.approx(alone, abs=5e-2 if bf16 else 2e-6), where
            if not bf16:
                require_equal(tmp_path / f"{layout}-{tied}", cases[tied] / "model")


@pytest.mark.distributed
def test_both_stages_and_conversion_with_verification(cases, tmp_path):
    """Stage 0 on TP 2, Stage 1 on PP 2, then to Hugging Face and back."""
    base, store, run = cases[False] / "model", tmp_path / "store", tmp_path / "run"
    common = ["--load", base, "--data-path", cases[False] / "corpus", "--seq-length", 64]
    stages.succeed("stage0", *common, "--store", store, tp=2)
    stages.succeed(
        "stage1", *common, "--store", store, "--save", run, "--lr", 1e-3,
        "--global-batch-size", 4, pp=2,
    )  # fmt: skip
    stages.convert(run, tmp_path / "tuned")
    stages.convert(tmp_path / "tuned", tmp_path / "mcore", "--save-model-type", "mcore")
    stages.convert(tmp_path / "mcore", tmp_path / "back")
    require_equal(tmp_path / "back", tmp_path / "tuned")
    tuned, before = (tiny.load_reference(d) for d in (tmp_path / "tuned", base))
    assert type(tuned) is type(before)
    tokens = torch.arange(12)[None]
    assert not torch.equal(tuned(tokens).logits, before(tokens).logits)


def transformers_max_logits(checkpoint: Path, corpus: Corpus, k: int = 0) -> Tensor:
    """[layers, heads], of global batch ``k``: transformers' own queries and keys, by document."""
    seen: dict[int, list[Tensor]] = {}

    def recording(module, query, key, value, mask, scaling, **kwargs):
        logits = query @ repeat_kv(key, module.num_key_value_groups).mT * scaling
        assert mask is None  # transformers makes none for a name it does not know
        mask = torch.full(logits.shape[-2:], -math.inf).triu(1)
        seen.setdefault(module.layer_idx, []).append((logits + mask).amax((0, 2, 3)))
        return eager_attention_forward(module, query, key, value, mask, scaling, **kwargs)

    AttentionInterface.register("recording", recording)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="recording").eval()
    batches = layouts.GlobalBatches(
        corpus.lengths, seq_length=layouts.SEQ_LENGTH, global_batch_size=layouts.GLOBAL_BATCH_SIZE,
        micro_batch_size=1, seed=1, epochs=4, dp_rank=0, dp_size=1,
    )  # fmt: skip
    with torch.no_grad():
        for pack in batches.global_batch(k):
            for document in pack:
                tokens = torch.tensor(corpus[int(document)].tokens).long()
                model(tokens[None, :-1])
    return torch.stack([torch.stack(seen[layer]).amax(0) for layer in sorted(seen)])


def measure(groups: Any, ddp: torch.nn.Module, corpus: Corpus) -> list[tuple[Tensor, Tensor]]:
    batches = layouts.micro_batches(groups, corpus)
    forward_backward(
        ddp, [MicroBatch(b, heads.full_loss(*full_targets(b), groups)) for b in batches]
    )
    weights, maxima = zip(*take_max_logits(ddp), strict=True)
    return list(zip(weights, max_over_replicas(maxima, groups.dp_group), strict=True))


def measure_and_clip(
    rank: int, world_size: int, folder: Path, threshold: float
) -> dict[str, tuple[Any, Tensor, Tensor]]:
    """{layout: (place, maxima, the same after clipping the first layer)}."""
    grid = {
        1: [(Layout(), False), (Layout(), True)],
        2: [(Layout(tp=2), True), (Layout(pp=2), False), (Layout(dp=2), False)],
    }
    results, corpus = {}, Corpus(folder / "corpus")
    for layout, recompute in grid[world_size]:
        groups = layouts.join_groups(layout)
        source = ModelConfigSource(load=str(folder / "model"))
        model = load_model(source, layout.config(), groups, recompute=recompute)
        ddp = wrap_for_training(model)
        record_max_logits(ddp)
        before = measure(groups, ddp, corpus)
        weight, maxima_N = before[0]
        local_groups = model.shape.num_query_groups // layout.tp
        factors = qk_clip_factors(maxima_N, threshold=threshold, num_query_groups=local_groups)
        scale_query_key_(weight, *factors)
        after = measure(groups, ddp, corpus)
        place = (groups.tp_rank, groups.pp_rank, layout)
        tables = (torch.stack([maxima for _, maxima in part]) for part in (before, after))
        results[f"{layout}, recomputed: {recompute}"] = (place, *tables)
    return results


@pytest.mark.distributed
def test_max_logits_are_those_of_transformers_and_clipping_bounds_them(cases):
    folder = cases[True]
    expected_LN = transformers_max_logits(folder / "model", Corpus(folder / "corpus"))
    threshold = expected_LN[0].median().item()
    clipped_N = expected_LN[0] > threshold
    assert 0 < clipped_N.sum() < len(clipped_N)
    for world_size in (1, 2):
        for results in pool.run(world_size, measure_and_clip, folder, threshold):
            for where, ((tp_rank, pp_rank, layout), before_LN, after_LN) in results.items():
                layers = expected_LN.chunk(layout.pp)[pp_rank]
                mine = layers.chunk(layout.tp, 1)[tp_rank]
                assert (before_LN - mine).abs().max() <= 2e-6, where
                if pp_rank == 0:  # behind a clipped layer, hidden states are others
                    bounded_N = mine[0].clamp(max=threshold)
                    assert (after_LN[0] - bounded_N).abs().max() <= 2e-6, where


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_stored_rotary_frequencies_must_be_those_of_rope_theta(cases, tmp_path, dtype):
    """Llama 2's files hold them; transformers makes its own, and so do we."""
    config = ModelConfig.from_hf(cases[True] / "model")
    weights = load_file(cases[True] / "model" / "model.safetensors")
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    frequencies = tiny.load_reference(cases[True] / "model").model.rotary_emb.inv_freq
    for stored, is_right in (
        (frequencies, True),
        (frequencies / 2, False),
        (frequencies[:-1], False),
    ):
        save_file({**weights, name: stored.to(dtype)}, tmp_path / "model.safetensors")
        if is_right:
            HFReader(tmp_path).check(config)
        else:
            with pytest.raises(CheckpointError, match=f"{name} differs"):
                HFReader(tmp_path).check(config)
    save_file({**weights, name + "s": frequencies}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not part of the model"):
        HFReader(tmp_path).check(config)
