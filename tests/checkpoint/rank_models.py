"""Directories of ranks' files: made, read as anybody with torch reads them, and changed."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_replay.checkpoint.stream import grid_for, hf_to_ranks
from megatron_replay.model.config import ModelConfig

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


def ranks(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    """{folder: parameters}, as anybody with torch reads them."""
    return {
        path.parent.name: torch.load(path, weights_only=True)["model"]
        for path in directory.glob("iter_0000001/*/model_optim_rng.pt")
    }


def rewrite(path: Path, change) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def converted(source: Path, target: Path, tp: int = 1, pp: int = 1, **options) -> Path:
    hf_to_ranks(source, target, grid_for(ModelConfig.from_hf(source), tp=tp, pp=pp, **options))
    return target
