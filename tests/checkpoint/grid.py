"""Parameters of every rank of a TP x PP grid, as megatron-core holds them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_replay.checkpoint.convert_ranks import grid_for, hf_to_ranks
from megatron_replay.checkpoint.export import write_model_files, write_weights
from megatron_replay.checkpoint.hf import HFReader
from megatron_replay.checkpoint.names import mapping_of
from megatron_replay.checkpoint.staging import publish
from megatron_replay.model.config import ModelConfig

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
LOCAL_NORMS = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
TE_NORMS = (
    "self_attention.linear_qkv.layer_norm_weight",
    "mlp.linear_fc1.layer_norm_weight",
)
QK_NORMS = ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight")


def empty_stage(config: ModelConfig, tp: int, pp: int, stage: int, te: bool) -> dict[str, Tensor]:
    """One rank's parameters, full of NaN: a parameter left unfilled differs from everything."""
    hidden, channels = config.hidden_size, config.kv_channels
    queries, groups = config.num_attention_heads // tp, config.num_query_groups // tp
    layer = {
        **dict.fromkeys(TE_NORMS if te else LOCAL_NORMS, (hidden,)),
        "self_attention.linear_qkv.weight": ((queries + 2 * groups) * channels, hidden),
        "self_attention.linear_proj.weight": (hidden, queries * channels),
        "mlp.linear_fc1.weight": (2 * config.ffn_hidden_size // tp, hidden),
        "mlp.linear_fc2.weight": (hidden, config.ffn_hidden_size // tp),
    }
    if config.qk_layernorm:
        layer |= dict.fromkeys(QK_NORMS, (channels,))
    if config.qkv_bias:
        layer["self_attention.linear_qkv.bias"] = ((queries + 2 * groups) * channels,)
    vocabulary = (-(-config.vocab_size // tp), hidden)
    shapes: dict[str, tuple[int, ...]] = {}
    if stage == 0:
        shapes["embedding.word_embeddings.weight"] = vocabulary
    for number in range(config.layers_of_stages(pp)[stage]):
        shapes |= {f"decoder.layers.{number}.{name}": shape for name, shape in layer.items()}
    if stage == pp - 1:
        shapes["decoder.final_layernorm.weight"] = (hidden,)
        if pp > 1 or not config.tie_embeddings:
            shapes["output_layer.weight"] = vocabulary
    return {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}


def load_grid(
    directory: Path, tp: int, pp: int, *, te: bool = False
) -> dict[int, list[dict[str, Tensor]]]:
    """{stage: [parameters of TP rank 0, 1, ...]}, loaded."""
    config, reader = ModelConfig.from_hf(directory), HFReader(directory)
    grid: dict[int, list[dict[str, Tensor]]] = {}
    for stage in range(pp):
        grid[stage] = [empty_stage(config, tp, pp, stage, te) for _ in range(tp)]
        for rank, parameters in enumerate(grid[stage]):
            for name, parameter in parameters.items():
                mapping = mapping_of(name, config, sum(config.layers_of_stages(pp)[:stage]))
                reader.fill(parameter, mapping, rank, tp)
    return grid


def save_grid(
    grid: dict[int, list[dict[str, Tensor]]],
    source: Path,
    staged: Path,
    final: Path,
    *,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> None:
    """Join the ranks' shards and write them as the stages do."""
    config = ModelConfig.from_hf(source)
    written = {}
    for stage, ranks in grid.items():
        tensors = []
        for name in ranks[0]:
            if name == "output_layer.weight" and config.tie_embeddings:
                continue
            mapping = mapping_of(name, config, sum(config.layers_of_stages(len(grid))[:stage]))
            joined = mapping.join([rank[name] for rank in ranks])
            tensors += zip(mapping.names, joined, strict=True)
        written |= write_weights(staged, tensors, dtype=dtype, stage=stage)
    write_model_files(staged, written, source, dtype=dtype)
    publish(staged, final, overwrite=overwrite)


def converted(source: Path, target: Path, tp: int = 1, pp: int = 1, **options) -> Path:
    hf_to_ranks(source, target, grid_for(ModelConfig.from_hf(source), tp=tp, pp=pp, **options))
    return target
