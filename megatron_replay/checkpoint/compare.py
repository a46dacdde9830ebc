"""Compare a Hugging Face directory with files of ranks, bit for bit, tensor by tensor.

Written apart from ``names`` on purpose: where every row and column must lie is worked out here once
more, group by group, so that a mistake in the mapping is found and not repeated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_replay.checkpoint.hf import HFReader, same_bits
from megatron_replay.checkpoint.rank_files import Grid, RankFile
from megatron_replay.errors import CheckpointError
from megatron_replay.model.config import ModelConfig
from megatron_replay.progress import Progress


class _Block(NamedTuple):
    """A part of a Hugging Face tensor, and where on a rank its numbers must be."""

    rank: int
    here: Any
    there: Any


_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
#: A layer's parameter by the word before ".weight"; norms by the local and the TE name.
_PARAMETERS = {
    "q_proj": ("self_attention.linear_qkv.weight",),
    "k_proj": ("self_attention.linear_qkv.weight",),
    "v_proj": ("self_attention.linear_qkv.weight",),
    "o_proj": ("self_attention.linear_proj.weight",),
    "gate_proj": ("mlp.linear_fc1.weight",),
    "up_proj": ("mlp.linear_fc1.weight",),
    "down_proj": ("mlp.linear_fc2.weight",),
    "q_norm": ("self_attention.q_layernorm.weight",),
    "k_norm": ("self_attention.k_layernorm.weight",),
    "input_layernorm": (
        "input_layernorm.weight",
        "self_attention.linear_qkv.layer_norm_weight",
    ),
    "post_attention_layernorm": ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
}

Files = Mapping[tuple[int, int], RankFile]


def require_same(
    hf: HFReader,
    files: Files,
    config: ModelConfig,
    grid: Grid,
    *,
    dtype: torch.dtype | None = None,
    padding_is_zero: bool,
) -> int:
    """Compare all of both sides; returns the number of Hugging Face tensors.

    Args:
        dtype: what the written side was rounded to; None: every number is as it was.
        padding_is_zero: whether rows beyond the vocabulary must be zeros, or may be anything.

    Raises:
        CheckpointError: names the first difference, or a rank of which not all was compared.
    """
    compared = dict.fromkeys(files, 0)
    names = [name for name in sorted(hf.names()) if not _is_surplus(name, config)]
    with Progress("Verify", len(names), "tensors") as progress:
        for name in names:
            whole = hf.slice(name)
            for stage, parameter in _homes(name, files, grid, is_tied=config.tie_embeddings):
                for rank, here, there in _blocks(name, config, grid):
                    file = files[stage, rank]
                    found = file[parameter][there]
                    _require_bits(whole[here], found, dtype, (name, parameter, file))
                    compared[stage, rank] += found.numel()
            progress.advance()
    for (stage, rank), file in files.items():
        compared[stage, rank] += _padding(file, config, rank, must_be_zero=padding_is_zero)
        total = sum(torch.Size(shape).numel() for shape in file.shapes.values())
        if compared[stage, rank] != total:
            raise CheckpointError(
                "not every number of this file was compared",
                where=file.path,
                expected=total,
                found=compared[stage, rank],
            )
    return len(names)


def whole_parameter(parameter: str, files: Files, config: ModelConfig, grid: Grid) -> Tensor:
    """A parameter as a model on one device has it (TP 1, PP 1), put together from all ranks."""
    stage, name = (0 if parameter == _EMBEDDING else len(grid.layers) - 1), parameter
    if parameter == _OUTPUT and _OUTPUT not in files[stage, 0].shapes:
        stage, name = 0, _EMBEDDING
    if parameter.startswith("decoder.layers."):
        number, word = parameter.removeprefix("decoder.layers.").split(".", 1)
        stage, local = _stage_of(int(number), grid)
        te = dict(names for names in _PARAMETERS.values() if len(names) == 2)
        name = f"decoder.layers.{local}.{word}"
        if name not in files[stage, 0].shapes and word in te:
            name = f"decoder.layers.{local}.{te[word]}"
    shards = [files[stage, rank][name] for rank in range(grid.tp)]
    if name in (_EMBEDDING, _OUTPUT):
        return torch.cat(shards)[: config.vocab_size]
    if name.endswith("linear_fc1.weight"):
        return torch.cat([shard.chunk(2)[half] for half in (0, 1) for shard in shards])
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return torch.cat(shards, 1)
    return torch.cat(shards) if name.endswith("linear_qkv.weight") else shards[0]


def _stage_of(number: int, grid: Grid) -> tuple[int, int]:
    """A layer's stage, and its number there."""
    stage = 0
    while number >= grid.layers[stage]:
        number -= grid.layers[stage]
        stage += 1
    return stage, number


def _is_surplus(name: str, config: ModelConfig) -> bool:
    """What ``HFReader.check`` allows and compares itself: a tied head, rotary frequencies."""
    return name.endswith("inv_freq") or (config.tie_embeddings and name == "lm_head.weight")


def _homes(name: str, files: Files, grid: Grid, *, is_tied: bool) -> Iterator[tuple[int, str]]:
    """Stages and parameters that must hold the tensor."""
    last = len(grid.layers) - 1
    if name == "model.embed_tokens.weight":
        yield 0, _EMBEDDING
        if is_tied and _OUTPUT in files[last, 0].shapes:
            yield last, _OUTPUT
    elif name == "lm_head.weight":
        yield last, _OUTPUT
    elif name == "model.norm.weight":
        yield last, "decoder.final_layernorm.weight"
    else:
        _, _, number, *words = name.split(".")
        stage, number_there = _stage_of(int(number), grid)
        local, *te = _PARAMETERS[words[-2]]
        prefix = f"decoder.layers.{number_there}."
        held = files[stage, 0].shapes
        yield stage, prefix + (te[0] if te and prefix + te[0] in held else local)


def _blocks(name: str, config: ModelConfig, grid: Grid) -> Iterator[_Block]:
    """All of the tensor, cut where it lies on different ranks or in different rows of one."""
    tp, channels = grid.tp, config.kv_channels
    word = name.split(".")[-2]
    per_group = config.num_attention_heads // config.num_query_groups
    groups = config.num_query_groups // tp
    for rank in range(tp):
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            rows = grid.vocabulary // tp
            held = max(0, min(config.vocab_size, (rank + 1) * rows) - rank * rows)
            yield _Block(rank, slice(rank * rows, rank * rows + held), slice(0, held))
        elif word.endswith("norm"):
            yield _Block(rank, slice(None), slice(None))
        elif word in ("gate_proj", "up_proj"):
            rows = config.ffn_hidden_size // tp
            above = rows if word == "up_proj" else 0
            yield _Block(rank, slice(rank * rows, (rank + 1) * rows), slice(above, above + rows))
        elif word in ("o_proj", "down_proj"):
            width = config.num_attention_heads * channels if word == "o_proj" else 0
            columns = (width or config.ffn_hidden_size) // tp
            here = slice(rank * columns, (rank + 1) * columns)
            yield _Block(rank, (slice(None), here), slice(None))
        else:
            heads = per_group if word == "q_proj" else 1
            skipped = {"q_proj": 0, "k_proj": per_group, "v_proj": per_group + 1}[word]
            for local in range(groups):
                first = (rank * groups + local) * heads * channels
                there = (local * (per_group + 2) + skipped) * channels
                length = heads * channels
                yield _Block(rank, slice(first, first + length), slice(there, there + length))


def _require_bits(
    source: Tensor, found: Tensor, dtype: torch.dtype | None, where: tuple[str, str, RankFile]
) -> None:
    if dtype is not None:
        source, found = source.to(dtype), found.to(dtype)
    if not same_bits(source, found):
        name, parameter, file = where
        raise CheckpointError(f"{parameter} differs from {name}", where=file.path)


def _padding(file: RankFile, config: ModelConfig, rank: int, *, must_be_zero: bool) -> int:
    """Numbers in this rank's rows beyond the vocabulary."""
    count = 0
    for parameter in (_EMBEDDING, _OUTPUT):
        if parameter in file.shapes:
            rows, hidden = file.shapes[parameter]
            beyond = min(rows, max(0, (rank + 1) * rows - config.vocab_size))
            count += beyond * hidden
            if must_be_zero and file[parameter][rows - beyond :].any():
                raise CheckpointError(f"{parameter}'s padding is not zero", where=file.path)
    return count
