"""The two modules megatron-core's local layers lack: a norm that may be sequence parallel, and
attention that keeps packed documents apart.

Shapes: S positions, B packs, D channels; on this rank N query heads and G key-value groups.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, with the constructor megatron-core's layer specs expect.

    megatron-core's own wrapper refuses sequence parallelism. All a norm needs there is that its
    weight says so: ``finalize_model_grads`` then sums the weight's gradient over TP.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class PackedAttention(MegatronModule):
    """softmax(Q K^T / sqrt(D)) V through torch's fused kernel, under a boolean mask.

    The mask says which position may look at which: causal, and inside one document. Key-value
    groups are shared by the kernel (``enable_gqa``), not repeated in memory.
    """

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
        attention_mask: Tensor,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """[S, B, N * D]; ``attention_mask`` [B, 1, S, S] is True where looking is allowed."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGD))
        out_BNSD = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=self.scale, enable_gqa=True
        )
        return out_BNSD.permute(2, 0, 1, 3).flatten(2)


def document_attention_mask(document_BS: Tensor) -> Tensor:
    """[B, 1, S, S]: may position s look at position r? r <= s, and both in one document.

    Padding (document -1) looks at padding only, so that no row of the softmax is empty.
    """
    length = document_BS.shape[1]
    causal_SS = torch.ones(length, length, dtype=torch.bool, device=document_BS.device).tril()
    same_BSS = document_BS[:, :, None] == document_BS[:, None, :]
    return (same_BSS & causal_SS)[:, None]
