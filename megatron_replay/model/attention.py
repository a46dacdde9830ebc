"""Attention inside packed documents, a last layer that computes only the rows that the head uses,
and the largest logits, which QK-Clip needs.

Shapes: T rows of a micro-batch, which megatron-core takes for a batch of 1, H hidden channels, D
channels of a head; on this rank N query heads and G key-value groups; R selected rows (see
``model.selected_rows.SelectedRows``), of which a rank holds M with sequence parallelism, else all.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_replay import kernels
from megatron_replay.kernels.layers import Rotation
from megatron_replay.kernels.packed_attention import Documents
from megatron_replay.model.selected_rows import SelectedRows


class PackedDocuments(PackedSeqParams):
    """The documents of a micro-batch, passed through megatron-core to attention and the last layer.

    Attributes:
        documents: for attention.
        rows: the rows that the head uses; None: any.
        rotation: of every row, from its position; set by the model.
    """

    rotation: Rotation

    def __init__(self, documents: Documents, rows: SelectedRows | None, length: int) -> None:
        super().__init__(max_seqlen_q=length, max_seqlen_kv=length)
        self.documents, self.rows = documents, rows


class PackedAttention(MegatronModule):
    """softmax(Q K^T / sqrt(D)) V along each document's path (``kernels.packed_attention``).

    Rotates Q and K first. By the backends that are best for the queries' device and dtype
    (``kernels.ATTENTION``, ``kernels.LAYERS``).

    Attributes:
        record_max_logits: whether to record, at each pass with gradients, the largest logits. The
            kernel does not return them, so this computes Q K^T a second time, in fp32.
        max_logits: the largest logit of each of this rank's query heads since recording began or
            was last taken, fp32 [N]; None before the first pass.
    """

    record_max_logits = False
    max_logits: Tensor | None = None

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query_T1ND: Tensor,
        key_T1GD: Tensor,
        value_T1GD: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedDocuments,
        **_: Any,
    ) -> Tensor:
        """[T, 1, N * D]; any finite numbers at padding."""
        documents, rotation = packed_seq_params.documents, packed_seq_params.rotation
        query_T1ND, key_T1GD = _rotate(query_T1ND, rotation), _rotate(key_T1GD, rotation)
        query_TND, key_TGD, value_TGD = (x[:, 0] for x in (query_T1ND, key_T1GD, value_T1GD))
        # Under recomputation a layer runs twice, and with gradients once.
        if self.record_max_logits and torch.is_grad_enabled():
            seen_N = largest_logits(query_TND, key_TGD, documents, scale=self.scale)
            known_N = seen_N if self.max_logits is None else self.max_logits
            self.max_logits = torch.maximum(known_N, seen_N)
        backend = kernels.ATTENTION.choose("auto", query_TND)
        out_TND = backend.everywhere(query_TND, key_TGD, value_TGD, documents, scale=self.scale)
        return out_TND.flatten(1)[:, None]

    def at_rows(
        self, query_R1ND: Tensor, key_T1GD: Tensor, value_T1GD: Tensor, packed: PackedDocuments
    ) -> Tensor:
        """[R, 1, N * D]: what ``forward`` gives at the head's rows; zeros behind the last."""
        documents, rows = packed.documents, packed.rows
        assert rows is not None
        query_R1ND = _rotate(query_R1ND, packed.rotation.at(rows.rows_R))
        key_T1GD = _rotate(key_T1GD, packed.rotation)
        backend = kernels.ATTENTION.choose("auto", query_R1ND)
        operands = (x[:, 0] for x in (query_R1ND, key_T1GD, value_T1GD))
        out_RND = backend.at_rows(
            *operands, documents, rows.rows_N, rows.segments, scale=self.scale
        )
        return out_RND.flatten(1)[:, None]


class LastLayer(TransformerLayer):
    """The last layer: keys and values at all rows, everything else at the selected ones.

    No head reads the last hidden state of another row, so queries, attention, its projection and
    the MLP are not computed there. Results and gradients are exact.
    """

    def _forward_attention(
        self,
        hidden_states: Tensor,
        *args: Any,
        packed_seq_params: PackedDocuments,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[M, 1, H] of the selected rows; [T, 1, H] where no rows are given."""
        rows = packed_seq_params.rows
        if rows is None:
            return super()._forward_attention(
                hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs
            )
        residual_M1H = rows.of_residual(hidden_states)[:, None]
        attended_R1H = _attend_at_rows(
            self.self_attention, self.input_layernorm(hidden_states), packed_seq_params, rows
        )
        projected_M1H, _ = self.self_attention.linear_proj(attended_R1H)
        return residual_M1H + projected_M1H, None


def _attend_at_rows(
    attention: SelfAttention, normed_T1H: Tensor, packed: PackedDocuments, rows: SelectedRows
) -> Tensor:
    """What ``attention`` computes before its projection, at ``rows``: [R, 1, heads * D]."""
    group = attention.tp_group
    if attention.config.sequence_parallel:
        normed_T1H = gather_from_sequence_parallel_region(normed_T1H, group=group)
    else:
        normed_T1H = copy_to_tensor_model_parallel_region(normed_T1H, group=group)
    groups, channels = attention.num_query_groups_per_partition, attention.config.kv_channels
    # Weight and bias have their rows by group: the group's queries, its key, its value.
    weight = attention.linear_qkv.weight.unflatten(0, (groups, -1, channels))
    query_weight, pair_weight = weight[:, :-2].flatten(0, 2), weight[:, -2:].flatten(0, 2)
    query_bias = pair_bias = None
    if attention.linear_qkv.bias is not None:
        bias = attention.linear_qkv.bias.unflatten(0, (groups, -1, channels))
        query_bias, pair_bias = bias[:, :-2].flatten(), bias[:, -2:].flatten()
    pairs = F.linear(normed_T1H, pair_weight, pair_bias).unflatten(-1, (groups, 2, channels))
    key_T1GD, value_T1GD = pairs.unbind(3)
    query_RH = normed_T1H[:, 0][rows.rows_R]
    query_RND = F.linear(query_RH, query_weight, query_bias).unflatten(-1, (-1, channels))
    query_R1ND = query_RND[:, None]
    if attention.q_layernorm is not None:
        query_R1ND = attention.q_layernorm(query_R1ND)
    if attention.k_layernorm is not None:
        key_T1GD = attention.k_layernorm(key_T1GD)
    attended_R1H: Tensor = attention.core_attention.at_rows(
        query_R1ND, key_T1GD, value_T1GD, packed
    )
    return attended_R1H


def _rotate(heads_T1ND: Tensor, rotation: Rotation) -> Tensor:
    return kernels.LAYERS.choose("auto", heads_T1ND).rotate(heads_T1ND, rotation)


@torch.no_grad()
def largest_logits(
    query_TND: Tensor, key_TGD: Tensor, documents: Documents, *, scale: float, rows: int = 256
) -> Tensor:
    """max of scale <q_s, k_r> over pairs (s, r) that may look, for each head. fp32 [N].

    Padding does not count: a head is judged by the documents, however they are packed. -inf where
    there is nothing but padding. ``rows`` queries at a time, against the keys up to the last of
    them, so that the fp32 logits in memory are at most N rows K for a segment of K keys.
    """
    heads, groups = query_TND.shape[1], key_TGD.shape[1]
    largest_N = query_TND.new_full((heads,), -math.inf, dtype=torch.float32)
    for segment, key_KGD in zip(documents.segments, documents.keys_of(key_TGD), strict=True):
        key_GDK = key_KGD.permute(1, 2, 0).float()
        length = segment.stop - segment.start
        before = segment.num_keys - length
        place_K = torch.arange(segment.num_keys, device=query_TND.device)
        for start in range(0, length, rows):
            stop = min(start + rows, length)
            query = query_TND[segment.start + start : segment.start + stop]
            # The heads of a group are rows that multiply the same keys: no key is copied.
            query = query.transpose(0, 1).float().unflatten(0, (groups, -1)).flatten(1, 2)
            seen = before + stop
            logits = (query @ key_GDK[..., :seen]).view(heads, stop - start, seen)
            if segment.mask is None:
                allowed = place_K[before + start : seen, None] >= place_K[:seen]
            else:
                allowed = segment.mask[start:stop, :seen]
            logits.masked_fill_(~allowed, -math.inf)
            largest_N = torch.maximum(largest_N, logits.amax((1, 2)))
    return largest_N * scale


def record_max_logits(model: torch.nn.Module) -> None:
    """Start recording every layer's largest logits; drops what was recorded."""
    for layer in _attention_layers(model):
        layer.core_attention.record_max_logits = True
        layer.core_attention.max_logits = None


def take_max_logits(model: torch.nn.Module) -> list[tuple[list[Tensor], Tensor]]:
    """For each layer of this stage, weight and bias of ``linear_qkv`` and largest logits [N].

    Over all micro-batches since the last call; no copy to the host.
    """
    taken = []
    for layer in _attention_layers(model):
        attention = layer.core_attention
        assert attention.max_logits is not None, "no pass with gradients since recording began"
        taken.append((list(layer.linear_qkv.parameters()), attention.max_logits))
        attention.max_logits = None
    return taken


def _attention_layers(model: torch.nn.Module) -> list[SelfAttention]:
    return [module for module in model.modules() if isinstance(module, SelfAttention)]
