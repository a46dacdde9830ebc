from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megatron_replay.checkpoint import weight_distance
from megatron_replay.checkpoint.weight_distance import relative_l2
from megatron_replay.errors import CheckpointError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def save(directory: Path, *shards: dict[str, torch.Tensor], tied: bool = False) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    files = {}
    for number, shard in enumerate(shards):
        file = f"model-{number}.safetensors"
        save_file(shard, directory / file)
        files |= dict.fromkeys(shard, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return directory


def test_equals_numpy_across_shards_and_formats(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_distance, "BLOCK", 7)  # blocks that end inside tensors
    rng = np.random.default_rng(0)
    old = {"a": rng.normal(size=(5, 4)), "b": rng.normal(size=11)}
    new = {name: value + 1e-3 * rng.normal(size=value.shape) for name, value in old.items()}
    base = save(tmp_path / "base", {n: torch.tensor(v) for n, v in old.items()})
    model = save(tmp_path / "model", *({n: torch.tensor(v)} for n, v in new.items()))
    expected = math.sqrt(
        sum(((new[n] - old[n]) ** 2).sum() for n in old) / sum((old[n] ** 2).sum() for n in old)
    )
    assert relative_l2(model, base) == pytest.approx(expected, rel=1e-12)
    assert relative_l2(base, base) == 0.0
    # In float32 the sum of squares would stop growing at 2^24.
    base = save(tmp_path / "large", {"a": torch.tensor([4096.0] + [1.0] * 5000)})
    model = save(tmp_path / "moved", {"a": torch.tensor([4096.0] + [2.0] * 5000)})
    assert relative_l2(model, base) == pytest.approx(math.sqrt(5000 / (2**24 + 5000)), rel=1e-12)


def test_tied_head_counts_once(tmp_path):
    old, new = torch.ones(4, 2), torch.full((4, 2), 1.5)
    norm = {"model.norm.weight": torch.ones(2)}
    base = save(tmp_path / "base", {EMBEDDING: old} | norm, tied=True)
    model = save(tmp_path / "model", {EMBEDDING: new, HEAD: new.clone()} | norm, tied=True)
    assert relative_l2(model, base) == pytest.approx(math.sqrt(8 * 0.25 / 10))


def test_refuses_what_cannot_be_compared(tmp_path):
    a = torch.ones(4)
    base = save(tmp_path / "base", {"a": a})
    with pytest.raises(CheckpointError, match="only one of the two has b"):
        relative_l2(save(tmp_path / "more", {"a": a, "b": a.clone()}), base)
    with pytest.raises(CheckpointError, match=r"another shape .*expected \(4,\); found \(5,\)"):
        relative_l2(save(tmp_path / "wide", {"a": torch.ones(5)}), base)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the embedding"):
        relative_l2(save(tmp_path / "torn", {EMBEDDING: a, HEAD: 2 * a}, tied=True), base)
    with pytest.raises(CheckpointError, match="no weights here"):
        relative_l2(tmp_path, base)
    zero = save(tmp_path / "zero", {"a": 0 * a})
    with pytest.raises(CheckpointError, match="every weight is zero"):
        relative_l2(zero, zero)
