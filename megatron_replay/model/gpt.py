"""Qwen or Llama as a megatron-core GPTModel whose head is a function that the caller passes.

Stage 0 selects candidates in the head, Stage 1 computes a loss, the probe both; none of them needs
the [S, B, V] logits that megatron-core would compute.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.profiler import record_function

from megatron_replay import kernels
from megatron_replay.config import ParallelConfig
from megatron_replay.kernels.layers import Rotation
from megatron_replay.model.attention import LastLayer, PackedAttention, PackedDocuments
from megatron_replay.model.config import ModelConfig
from megatron_replay.model.rotary import inverse_frequencies
from megatron_replay.model.selected_rows import HiddenStates, WordEmbeddings
from megatron_replay.parallel import Parallel

#: (hidden states, which the head indexes; weight_VH, this rank's rows of the output layer) -> any
#: result. In backward, the gradients of the indexed rows are summed over TP.
Head = Callable[[HiddenStates, Tensor], Any]


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

    def forward(self, x: Tensor) -> Tensor:
        """By the backend that is best for the device (``kernels.LAYERS``)."""
        assert self.eps is not None
        return kernels.LAYERS.choose("auto", x).rms_norm(x, self.weight, self.eps)


def swiglu(x: Tensor) -> Tensor:
    """silu(a) * b of x = [a, b], by the backend that is best for the device."""
    return kernels.LAYERS.choose("auto", x).swiglu(x)


class RotaryOfPositions(RotaryEmbedding):
    """Rotates by position inside the document, as rows are not in the order of positions.

    ``PackedAttention`` does it, with cosines and sines made once a micro-batch; megatron-core would
    make them twice a layer.
    """

    def forward(self, *_: Any, **__: Any) -> None:
        """Gives megatron-core nothing to rotate by."""

    def rotation(self, position_T: Tensor, dtype: torch.dtype) -> Rotation:
        """By the angles position times inverse frequency."""
        return Rotation.of(torch.outer(position_T.to(self.inv_freq.dtype), self.inv_freq), dtype)


class ReplayGPTModel(GPTModel):
    """GPTModel with a head passed at each call instead of logits or a full-softmax loss."""

    #: Rows of this rank's output layer that are tokens; the others are padding.
    num_tokens = 0
    _head: Head | None = None
    _documents: PackedDocuments | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # GPTModel has no parameters for these classes; ours add no state.
        self.rotary_pos_emb.__class__ = RotaryOfPositions
        if self.pre_process:
            self.embedding.word_embeddings.__class__ = WordEmbeddings

    def forward(
        self, token_T: Tensor, position_T: Tensor, documents: PackedDocuments, head: Head
    ) -> Any:
        """Hidden states on all stages but the last; there, what ``head`` returns."""
        self._head, self._documents = head, documents
        dtype = self.config.params_dtype
        documents.rotation = self.rotary_pos_emb.rotation(position_T, dtype)
        try:
            return super().forward(token_T[None], None, None, packed_seq_params=documents)
        finally:
            self._head = self._documents = None

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Any:
        if not self.post_process:
            return hidden_states
        assert self._head is not None
        assert self._documents is not None
        hidden = HiddenStates(
            hidden_states,
            self.pg_collection.tp,
            sequence_parallel=self.config.sequence_parallel,
            selected=self._documents.rows,
        )
        with record_function("head"):
            return self._head(hidden, self.output_weight())

    def output_weight(self) -> Tensor:
        """This rank's rows of the output layer, tied or not, without padding: [V, H]."""
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        else:
            weight = self.output_layer.weight
        if self.num_tokens == len(weight):
            return weight
        tokens = weight[: self.num_tokens]
        if hasattr(weight, "main_grad"):  # the heads add to it
            tokens.main_grad = weight.main_grad[: self.num_tokens]
        return tokens


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    bf16: bool = False,
    recompute: bool = False,
    gradient_accumulation_fusion: bool = False,
) -> TransformerConfig:
    """Megatron's configuration of ``model`` on this layout."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    stages = model.layers_of_stages(parallel.pipeline_model_parallel_size)
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        qk_layernorm=model.qk_layernorm,
        add_qkv_bias=model.qkv_bias,
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # the layer spec's, which need not be TransformerEngine's
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        # Megatron's spelling of uneven stages: E embedding, t a layer, L the loss.
        pipeline_model_parallel_layout="E" + "|".join("t" * layers for layers in stages) + "L"
        if len({*stages}) > 1
        else None,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        batch_p2p_comm=parallel.batch_p2p_comm,
        # Micro-batches of their own lengths; megatron-core then asks for this dispatcher, though
        # there are no experts.
        variable_seq_lengths=parallel.pipeline_model_parallel_size > 1,
        moe_token_dispatcher_type="alltoall",
        bf16=bf16,
        # The loss is a sum over selected positions, divided by their number over the whole global
        # batch: micro-batches and ranks with few or no positions get their exact weight.
        calculate_per_token_loss=True,
        # False would silently leave `tensor_model_parallel` unset on the weights, and the
        # gradient norm wrong; the weights drawn are overwritten by the checkpoint.
        perform_initialization=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=gradient_accumulation_fusion,
        persist_layer_norm=False,
        cuda_graph_scope=[],
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
    )


def build_model(
    model: ModelConfig, config: TransformerConfig, parallel: Parallel
) -> ReplayGPTModel:
    """This rank's part of the model, weights not yet loaded."""
    layer = get_gpt_layer_local_spec(qk_layernorm=model.qk_layernorm, normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.mlp.submodules.activation_func = swiglu
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if model.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layers = [layer] * get_num_layers_to_build(config)
    if parallel.last_stage:
        layers[-1] = dataclasses.replace(layer, module=LastLayer)
    block = TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
    gpt = ReplayGPTModel(
        config,
        block,
        vocab_size=model.vocabulary_rows(parallel.tp_size) * parallel.tp_size,
        max_sequence_length=model.max_position_embeddings,
        pre_process=parallel.first_stage,
        post_process=parallel.last_stage,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
    )
    gpt.num_tokens = len(parallel.vocabulary_shard(model.vocab_size))
    # megatron-core computes its own on the device, and scales them for one Llama only.
    gpt.rotary_pos_emb.inv_freq = inverse_frequencies(
        model.rotary_base, model.kv_channels, model.rope_scaling
    ).to(parallel.device)
    return gpt
