"""Attention inside packed documents, a last layer that computes only the positions that the head
uses, and the largest logits, which QK-Clip needs.

Shapes: S positions, B packs, H hidden channels, D channels of a head; on this rank N query heads
and G key-value groups; R selected rows (see ``model.selected_rows.SelectedRows``), of which a rank
holds M with sequence parallelism, else all.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
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
from megatron_replay.kernels.packed_attention import Segments
from megatron_replay.model.selected_rows import SelectedRows


class PackedDocuments(PackedSeqParams):
    """The documents of each pack, passed through megatron-core to attention and the last layer.

    Attributes:
        segments: of each pack, for attention.
        rows: the positions that the head uses; None: any.
    """

    def __init__(self, segments: Segments, rows: SelectedRows | None, length: int) -> None:
        super().__init__(max_seqlen_q=length, max_seqlen_kv=length)
        self.segments, self.rows = segments, rows


class PackedAttention(MegatronModule):
    """softmax(Q K^T / sqrt(D)) V inside each document (``kernels.packed_attention``).

    By the backend that is best for the queries' device and dtype (``kernels.ATTENTION``).

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
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedDocuments,
        **_: Any,
    ) -> Tensor:
        """[S, B, N * D]; any finite numbers at padding."""
        segments = packed_seq_params.segments
        # Under recomputation a layer runs twice, and with gradients once.
        if self.record_max_logits and torch.is_grad_enabled():
            seen_N = largest_logits(query_SBND, key_SBGD, segments, scale=self.scale)
            known_N = seen_N if self.max_logits is None else self.max_logits
            self.max_logits = torch.maximum(known_N, seen_N)
        backend = kernels.ATTENTION.choose("auto", query_SBND)
        out_SBND = backend.everywhere(query_SBND, key_SBGD, value_SBGD, segments, scale=self.scale)
        return out_SBND.flatten(2)

    def at_rows(
        self, query_RND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, documents: PackedDocuments
    ) -> Tensor:
        """[R, N * D]: what ``forward`` gives at the documents' rows; zeros behind the last."""
        segments, rows = documents.segments, documents.rows
        assert rows is not None
        backend = kernels.ATTENTION.choose("auto", query_RND)
        operands = (query_RND, key_SBGD, value_SBGD)
        out_RND = backend.at_rows(*operands, segments, rows.rows_N, rows.segments, scale=self.scale)
        return out_RND.flatten(1)


class LastLayer(TransformerLayer):
    """The last layer: keys and values at all positions, everything else at the selected rows.

    No head reads the last hidden state of another position, so queries, attention, its projection
    and the MLP are not computed there. Results and gradients are exact.
    """

    def _forward_attention(
        self,
        hidden_states: Tensor,
        *args: Any,
        rotary_pos_emb: Tensor,
        packed_seq_params: PackedDocuments,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[M, 1, H] of the selected rows; [S, B, H] where no rows are given."""
        rows = packed_seq_params.rows
        if rows is None:
            return super()._forward_attention(
                hidden_states,
                *args,
                rotary_pos_emb=rotary_pos_emb,
                packed_seq_params=packed_seq_params,
                **kwargs,
            )
        residual_M1H = rows.of_residual(hidden_states)[:, None]
        attended_R1H = _attend_at_rows(
            self.self_attention,
            self.input_layernorm(hidden_states),
            rotary_pos_emb,
            packed_seq_params,
            rows,
        )
        projected_M1H, _ = self.self_attention.linear_proj(attended_R1H)
        return residual_M1H + projected_M1H, None


def _attend_at_rows(
    attention: SelfAttention,
    normed_SBH: Tensor,
    rotary_S11D: Tensor,
    documents: PackedDocuments,
    rows: SelectedRows,
) -> Tensor:
    """What ``attention`` computes before its projection, at ``rows``: [R, 1, heads * D]."""
    group = attention.tp_group
    if attention.config.sequence_parallel:
        normed_SBH = gather_from_sequence_parallel_region(normed_SBH, group=group)
    else:
        normed_SBH = copy_to_tensor_model_parallel_region(normed_SBH, group=group)
    groups, channels = attention.num_query_groups_per_partition, attention.config.kv_channels
    # The weight has its rows by group: the group's queries, its key, its value.
    weight = attention.linear_qkv.weight.unflatten(0, (groups, -1, channels))
    query_weight, pair_weight = weight[:, :-2].flatten(0, 2), weight[:, -2:].flatten(0, 2)
    pairs = F.linear(normed_SBH, pair_weight).unflatten(-1, (groups, 2, channels))
    key_SBGD, value_SBGD = pairs.unbind(3)
    query_RH = normed_SBH.flatten(0, 1)[rows.flat_R]
    query_R1ND = F.linear(query_RH, query_weight).unflatten(-1, (-1, channels))[:, None]
    if attention.q_layernorm is not None:
        query_R1ND = attention.q_layernorm(query_R1ND)
    if attention.k_layernorm is not None:
        key_SBGD = attention.k_layernorm(key_SBGD)
    query_R1ND = _rotate(query_R1ND, rotary_S11D[rows.position_R], attention)
    key_SBGD = _rotate(key_SBGD, rotary_S11D, attention)
    attended_RH = attention.core_attention.at_rows(
        query_R1ND[:, 0], key_SBGD, value_SBGD, documents
    )
    return attended_RH[:, None]


def _rotate(heads: Tensor, angles: Tensor, attention: SelfAttention) -> Tensor:
    return apply_rotary_pos_emb(
        heads, angles, config=attention.config, cp_group=attention.pg_collection.cp
    )


@torch.no_grad()
def largest_logits(
    query_SBND: Tensor, key_SBGD: Tensor, segments: Segments, *, scale: float, rows: int = 256
) -> Tensor:
    """max of scale <q_s, k_r> over packs and pairs (s, r) that may look, for each head. fp32 [N].

    Padding does not count: a head is judged by the documents, however they are packed. -inf where
    there is nothing but padding. ``rows`` queries at a time, against the keys up to the last of
    them, so that the fp32 logits in memory are at most N rows L for a segment of L positions.
    """
    heads, groups = query_SBND.shape[2], key_SBGD.shape[2]
    largest_N = query_SBND.new_full((heads,), -math.inf, dtype=torch.float32)
    for pack, of_pack in enumerate(segments):
        for segment in of_pack:
            if segment.is_padding:
                continue
            length = segment.stop - segment.start
            place_L = torch.arange(length, device=query_SBND.device)
            key_GDL = key_SBGD[segment.start : segment.stop, pack].permute(1, 2, 0).float()
            for start in range(0, length, rows):
                stop = min(start + rows, length)
                query = query_SBND[segment.start + start : segment.start + stop, pack]
                # The heads of a group are rows that multiply the same keys: no key is copied.
                query = query.permute(1, 0, 2).float().unflatten(0, (groups, -1)).flatten(1, 2)
                logits = (query @ key_GDL[..., :stop]).view(heads, stop - start, stop)
                if segment.mask is None:
                    allowed = place_L[start:stop, None] >= place_L[None, :stop]
                else:
                    allowed = segment.mask[start:stop, :stop].to(logits.device)
                logits.masked_fill_(~allowed, -math.inf)
                largest_N = torch.maximum(largest_N, logits.amax((1, 2)))
    return largest_N * scale


def record_max_logits(model: torch.nn.Module, record: bool = True) -> None:
    """Start or stop recording every layer's largest logits; drops what was recorded."""
    for layer in _attention_layers(model):
        layer.core_attention.record_max_logits = record
        layer.core_attention.max_logits = None


def take_max_logits(model: torch.nn.Module) -> list[tuple[Tensor, Tensor]]:
    """For each layer of this stage, its ``linear_qkv.weight`` and its heads' largest logits [N].

    Over all micro-batches since the last call; no copy to the host.
    """
    taken = []
    for layer in _attention_layers(model):
        attention = layer.core_attention
        assert attention.max_logits is not None, "no pass with gradients since recording began"
        taken.append((layer.linear_qkv.weight, attention.max_logits))
        attention.max_logits = None
    return taken


def _attention_layers(model: torch.nn.Module) -> list[SelfAttention]:
    return [module for module in model.modules() if isinstance(module, SelfAttention)]
