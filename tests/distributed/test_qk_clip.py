"""The largest attention logits on any layout are transformers', and QK-Clip bounds them.

Documents share prefixes, so a query's keys are its own document's and those of others before it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import eager_attention_forward, repeat_kv

from megatron_replay.checkpoint.load import load_model
from megatron_replay.config import ModelConfigSource
from megatron_replay.data.corpus import Corpus
from megatron_replay.forward import forward_backward
from megatron_replay.model.attention import record_max_logits, take_max_logits
from megatron_replay.optim.muonclip import max_over_replicas, qk_clip_factors, scale_query_key_
from megatron_replay.training.step import wrap_for_training
from tests import pool, tiny
from tests.distributed import layouts
from tests.distributed.layouts import Layout

#: Layout, and whether layers are recomputed.
GRIDS = {
    1: [(Layout(), False), (Layout(), True)],
    2: [(Layout(tp=2), True), (Layout(pp=2), False), (Layout(dp=2), False)],
}


def transformers_max_logits(checkpoint: Path, corpus: Corpus) -> Tensor:
    """[layers, heads], of a global batch: transformers' own queries and keys, by document."""
    seen: dict[int, list[Tensor]] = {}

    def recording(module, query, key, value, mask, scaling, **kwargs):
        logits = query @ repeat_kv(key, module.num_key_value_groups).mT * scaling
        assert mask is None  # transformers makes none for an implementation that is not its own
        mask = torch.full(logits.shape[-2:], -math.inf).triu(1)
        seen.setdefault(module.layer_idx, []).append((logits + mask).amax((0, 2, 3)))
        return eager_attention_forward(module, query, key, value, mask, scaling, **kwargs)

    AttentionInterface.register("recording", recording)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="recording").eval()
    with torch.no_grad():
        for document in layouts.global_batch(corpus).document_D.tolist():
            model(torch.tensor(corpus[document].tokens).long()[None, :-1])
    return torch.stack([torch.stack(seen[layer]).amax(0) for layer in sorted(seen)])


def measure(
    layout: Layout, groups: Any, ddp: torch.nn.Module, corpus: Corpus
) -> list[tuple[list[Tensor], Tensor]]:
    """Weight and bias, and the largest logits, of each layer of this rank."""
    batches = layouts.micro_batches(groups, corpus)
    work = layouts.full_loss_work(layout, groups, batches, last_layer_at_selected=False)
    forward_backward(ddp, work)
    projections, maxima = zip(*take_max_logits(ddp), strict=True)
    return list(zip(projections, max_over_replicas(maxima, groups.dp_group), strict=True))


def measure_and_clip(
    rank: int, world_size: int, folder: Path, threshold: float
) -> list[tuple[int, int, Tensor, Tensor]]:
    """TP rank, PP rank, and the maxima before and after clipping the first layer."""
    results, corpus = [], Corpus(folder / "corpus")
    for layout, recompute in GRIDS[world_size]:
        groups = layouts.join_groups(layout)
        source = ModelConfigSource(load=str(folder / "model"))
        model = load_model(source, layout.config(), groups, recompute=recompute)
        ddp = wrap_for_training(model)
        record_max_logits(ddp)
        before = measure(layout, groups, ddp, corpus)
        projection, maxima_N = before[0]
        local_groups = model.shape.num_query_groups // layout.tp
        factors = qk_clip_factors(maxima_N, threshold=threshold, num_query_groups=local_groups)
        for tensor in projection:
            scale_query_key_(tensor, *factors)
        after = measure(layout, groups, ddp, corpus)
        tables = (torch.stack([maxima for _, maxima in part]) for part in (before, after))
        results.append((groups.tp_rank, groups.pp_rank, *tables))
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("save", [tiny.save_llama, tiny.save_qwen2])
def test_max_logits_are_those_of_transformers_and_clipping_bounds_them(tmp_path, save):
    save(tmp_path / "model", tied=True)
    corpus = tiny.save_corpus(tmp_path / "corpus", num_documents=40, stems=3)
    forest = layouts.global_batch(corpus)
    assert forest.computed < 0.9 * forest.positions
    expected_LN = transformers_max_logits(tmp_path / "model", corpus)
    threshold = expected_LN[0].median().item()
    assert 0 < (expected_LN[0] > threshold).sum() < expected_LN.shape[1]
    for world_size, grid in GRIDS.items():
        for ranks in pool.run(world_size, measure_and_clip, tmp_path, threshold):
            for case, (tp_rank, pp_rank, before_LN, after_LN) in zip(grid, ranks, strict=True):
                layers = expected_LN.chunk(case[0].pp)[pp_rank]
                mine = layers.chunk(case[0].tp, 1)[tp_rank]
                assert (before_LN - mine).abs().max() <= 2e-6, case
                if pp_rank == 0:  # behind a clipped layer, hidden states are others
                    bounded_N = mine[0].clamp(max=threshold)
                    assert (after_LN[0] - bounded_N).abs().max() <= 2e-6, case
