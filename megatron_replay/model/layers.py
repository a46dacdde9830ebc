"""The two layers megatron-core lacks: a norm under sequence parallelism, and a last layer that
computes only the selected positions.

Shapes: S positions, B packs, H hidden channels, D channels of a head; R selected rows (see
``model.selected_rows.SelectedRows``), of which a rank holds M with sequence parallelism, else all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_replay.model.attention import PackedDocuments
from megatron_replay.model.selected_rows import SelectedRows


class RMSNorm(torch.nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, with the constructor megatron-core's layer specs expect.

    megatron-core's own wrapper refuses sequence parallelism. A norm needs only the attribute
    ``sequence_parallel`` on its weight: ``finalize_model_grads`` then sums its gradient over TP.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


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
