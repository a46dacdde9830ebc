"""The two modules megatron-core's local layers lack: a norm that may be sequence parallel, and
attention that keeps packed documents apart.

Shapes: S positions, B packs, D channels; on this rank N query heads and G key-value groups.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.transformer.attention import SelfAttention
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

    Attributes:
        record_max_logits: whether to measure, at each pass with gradients, what QK-Clip needs. The
            kernel does not tell, so this computes Q K^T a second time, in fp32.
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
        attention_mask: Tensor,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """[S, B, N * D]; ``attention_mask`` [B, 1, S, S] is True where looking is allowed."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGD))
        # Under recomputation a layer runs twice, and with gradients once.
        if self.record_max_logits and torch.is_grad_enabled():
            seen_N = largest_logits(query, key, attention_mask, scale=self.scale)
            known_N = seen_N if self.max_logits is None else self.max_logits
            self.max_logits = torch.maximum(known_N, seen_N)
        out_BNSD = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=self.scale, enable_gqa=True
        )
        return out_BNSD.permute(2, 0, 1, 3).flatten(2)


@torch.no_grad()
def largest_logits(
    query_BNSD: Tensor, key_BGSD: Tensor, mask_B1SS: Tensor, *, scale: float, rows: int = 256
) -> Tensor:
    """max of scale <q_s, k_r> over packs and pairs (s, r) that may look, for each head. fp32 [N].

    Padding does not count: a head is judged by the documents, however they are packed. -inf where
    there is nothing but padding. ``rows`` queries at a time, against the keys up to the last of
    them (the mask is causal), so that the fp32 logits in memory are at most B N rows S.
    """
    heads, groups, length = query_BNSD.shape[1], *key_BGSD.shape[1:3]
    key_BGDS = key_BGSD.float().mT
    counts_B1S1 = mask_B1SS.diagonal(dim1=-2, dim2=-1)[..., None]
    largest_N = query_BNSD.new_full((heads,), -math.inf, dtype=torch.float32)
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        # The heads of a group are rows against the same keys: nothing is repeated.
        query = query_BNSD[:, :, start:stop].float().unflatten(1, (groups, -1)).flatten(2, 3)
        logits = (query @ key_BGDS[..., :stop]).view(-1, heads, stop - start, stop)
        allowed = mask_B1SS[:, :, start:stop, :stop] & counts_B1S1[:, :, start:stop]
        logits.masked_fill_(~allowed, -math.inf)
        largest_N = torch.maximum(largest_N, logits.amax((0, 2, 3)))
    return largest_N * scale


def record_max_logits(model: torch.nn.Module, record: bool = True) -> None:
    """Begin, or end, to measure every layer's largest logits; what was measured is forgotten."""
    for layer in _attention_layers(model):
        layer.core_attention.record_max_logits = record
        layer.core_attention.max_logits = None


def take_max_logits(model: torch.nn.Module) -> list[tuple[Tensor, Tensor]]:
    """For each layer of this stage, its ``linear_qkv.weight`` and its heads' largest logits [N].

    Over all micro-batches since the last call. Reads nothing from the device.
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


def document_attention_mask(document_BS: Tensor) -> Tensor:
    """[B, 1, S, S]: may position s look at position r? r <= s, and both in one document.

    Padding (document -1) looks at the position before it, at 0 the last: no row of the softmax may
    be empty. Nothing looks at padding, and only padding may not look at itself.
    """
    length, device = document_BS.shape[1], document_BS.device
    causal_SS = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    before_SS = torch.eye(length, dtype=torch.bool, device=device).roll(-1, 1)
    same_BSS = document_BS[:, :, None] == document_BS[:, None, :]
    is_padding_BS1 = document_BS[:, :, None] < 0
    return torch.where(is_padding_BS1, before_SS, same_BSS & causal_SS)[:, None]
