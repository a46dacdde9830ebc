"""Which Hugging Face tensors make up a megatron-core parameter, and how they are split over TP.

Loading, export and the check that no tensor is left over use the same table.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_replay.errors import CheckpointError
from megatron_replay.model.config import ModelConfig

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@dataclass(frozen=True)
class Mapping:
    """The Hugging Face tensors of a parameter, and the shard that each TP rank has of them.

    Attributes:
        names: one tensor; or SwiGLU's gate and up matrix, of which rank r has [gate_r; up_r]; or
            query, key and value, of whose groups each rank has some: of each group its query
            heads, its key head, its value head.
        dim: the dimension of the Hugging Face tensors that is split over TP; None: replicated.
        groups, channels: query groups over all ranks and channels of a head, for the last kind.
        vocab_size: of an embedding or output layer: rows of shards beyond it are padding, zeros.
    """

    names: tuple[str, ...]
    dim: int | None = 0
    groups: int = 0
    channels: int = 0
    vocab_size: int = 0

    def places(self, shard: Tensor, size: int) -> Sequence[Tensor]:
        """For each Hugging Face tensor, a view of its part of a shard; ``size`` ranks in all."""
        if len(self.names) == 3:
            grouped = shard.unflatten(0, (self.groups // size, -1, self.channels))
            return grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:]
        return shard.chunk(len(self.names))

    def fill(self, shard: Tensor, whole: Sequence[Tensor], rank: int, size: int) -> None:
        """Write this rank's shard into ``shard``, cast to its dtype; reads no more than that."""
        if self.vocab_size:
            held = whole[0][rank * len(shard) : (rank + 1) * len(shard)]
            shard[: len(held)].copy_(held)
            shard[len(held) :].zero_()
            return
        for place, tensor in zip(self.places(shard, size), whole, strict=True):
            if self.dim is not None:
                length = tensor.shape[self.dim] // size
                tensor = tensor.narrow(self.dim, rank * length, length)
            place.copy_(tensor.view(place.shape))

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """The Hugging Face tensors from all ranks' shards, in rank order."""
        if self.dim is None:
            return [shards[0]]
        parts = zip(*(self.places(shard, len(shards)) for shard in shards), strict=True)
        if self.vocab_size:
            return [torch.cat(list(shards))[: self.vocab_size]]
        rows = -shards[0].dim()  # of a place, whose last dimensions are a shard's
        return [torch.cat([place.flatten(0, rows) for place in part], self.dim) for part in parts]

    def shard_shape(self, shapes: Sequence[Sequence[int]], size: int) -> tuple[int, ...]:
        """The shape of each rank's shard of tensors with ``shapes``."""
        shape = list(shapes[0])
        if self.dim is not None:
            shape[self.dim] = sum(-(-each[self.dim] // size) for each in shapes)
        return tuple(shape)

    def rows(self, num_rows: int, size: int) -> list[list[range]]:
        """For each Hugging Face tensor, its ranges of rows in a shard of ``num_rows`` rows."""
        numbers = torch.arange(num_rows)[:, None]
        return [_runs(place.flatten().tolist()) for place in self.places(numbers, size)]


def mapping_of(parameter: str, config: ModelConfig, layer_offset: int) -> Mapping:
    """The mapping of a megatron-core parameter, named as in the local or the TE layer spec.

    Raises:
        CheckpointError: no such parameter.
    """
    if parameter == "embedding.word_embeddings.weight":
        return Mapping((EMBEDDING,), vocab_size=config.vocab_size)
    if parameter == "output_layer.weight":
        name = EMBEDDING if config.tie_embeddings else HEAD
        return Mapping((name,), vocab_size=config.vocab_size)
    if parameter == "decoder.final_layernorm.weight":
        return Mapping((FINAL_NORM,), dim=None)
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", parameter)
    layer = layer_mappings(config).get(match[2]) if match else None
    if match is None or layer is None:
        raise CheckpointError(f"no mapping for the parameter {parameter}")
    prefix = f"model.layers.{int(match[1]) + layer_offset}."
    return replace(layer, names=tuple(prefix + name for name in layer.names))


def layer_mappings(config: ModelConfig) -> dict[str, Mapping]:
    """The mappings of a layer's parameters in the model's order, norms under both their names."""
    before = Mapping(("input_layernorm.weight",), dim=None)
    after = Mapping(("post_attention_layernorm.weight",), dim=None)
    qkv = {
        f"self_attention.linear_qkv.{kind}": Mapping(
            tuple(f"self_attn.{x}_proj.{kind}" for x in "qkv"),
            groups=config.num_query_groups,
            channels=config.kv_channels,
        )
        for kind in ("weight", *["bias"] * config.qkv_bias)
    }
    qk_norms = {
        f"self_attention.{x}_layernorm.weight": Mapping((f"self_attn.{x}_norm.weight",), dim=None)
        for x in ("qk" if config.qk_layernorm else "")
    }
    return {
        "input_layernorm.weight": before,
        "self_attention.linear_qkv.layer_norm_weight": before,  # TransformerEngine's name
        "self_attention.linear_proj.weight": Mapping(("self_attn.o_proj.weight",), dim=1),
        **qkv,
        **qk_norms,
        "pre_mlp_layernorm.weight": after,
        "mlp.linear_fc1.layer_norm_weight": after,  # TransformerEngine's name
        "mlp.linear_fc1.weight": Mapping(("mlp.gate_proj.weight", "mlp.up_proj.weight")),
        "mlp.linear_fc2.weight": Mapping(("mlp.down_proj.weight",), dim=1),
    }


def hf_tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every Hugging Face tensor of the model, by name."""
    hidden, channels = config.hidden_size, config.kv_channels
    queries, keys = config.num_attention_heads * channels, config.num_query_groups * channels
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (config.ffn_hidden_size, hidden),
        "mlp.up_proj.weight": (config.ffn_hidden_size, hidden),
        "mlp.down_proj.weight": (hidden, config.ffn_hidden_size),
    }
    if config.qkv_bias:
        layer |= {
            "self_attn.q_proj.bias": (queries,),
            "self_attn.k_proj.bias": (keys,),
            "self_attn.v_proj.bias": (keys,),
        }
    if config.qk_layernorm:
        layer |= {"self_attn.q_norm.weight": (channels,), "self_attn.k_norm.weight": (channels,)}
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for number in range(config.num_layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    shapes[FINAL_NORM] = (hidden,)
    if not config.tie_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def _runs(numbers: Sequence[int]) -> list[range]:
    """Ascending numbers as ranges."""
    cuts = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    return [
        range(numbers[a], numbers[b - 1] + 1)
        for a, b in itertools.pairwise([0, *cuts, len(numbers)])
    ]
