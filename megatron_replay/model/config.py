"""The shape of a Qwen3 model, read from a Hugging Face config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_replay.errors import CheckpointError, ConfigError

SUPPORTED_MODEL_TYPES = ("qwen3",)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A dense decoder with grouped-query attention, QK-norm, RMSNorm, SwiGLU and RoPE."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    rotary_base: float
    layernorm_epsilon: float
    tie_embeddings: bool
    qk_layernorm: bool = True

    @classmethod
    def from_hf(cls, directory: str | Path) -> ModelConfig:
        """Read ``directory/config.json``.

        Raises:
            CheckpointError: it is missing, not JSON, or lacks a key.
            ConfigError: it asks for something this project would compute wrongly.
        """
        path = Path(directory) / "config.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"cannot read: {error.strerror}", where=path) from error
        except ValueError as error:
            raise CheckpointError(f"not JSON: {error}", where=path) from error
        _refuse_unsupported(content, path)
        # transformers 5 moved rope_theta into rope_parameters.
        rope = content.get("rope_parameters") or {}
        try:
            return cls(
                num_layers=int(content["num_hidden_layers"]),
                hidden_size=int(content["hidden_size"]),
                ffn_hidden_size=int(content["intermediate_size"]),
                num_attention_heads=int(content["num_attention_heads"]),
                num_query_groups=int(content["num_key_value_heads"]),
                kv_channels=int(content["head_dim"]),
                vocab_size=int(content["vocab_size"]),
                max_position_embeddings=int(content["max_position_embeddings"]),
                rotary_base=float(rope.get("rope_theta") or content["rope_theta"]),
                layernorm_epsilon=float(content["rms_norm_eps"]),
                tie_embeddings=bool(content["tie_word_embeddings"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"missing or unusable key {error}", where=path) from error

    def num_parameters(self) -> int:
        """Parameters of the whole model; tied embeddings count once."""
        heads, groups, channels = self.num_attention_heads, self.num_query_groups, self.kv_channels
        attention = self.hidden_size * channels * (2 * heads + 2 * groups) + 2 * channels
        layer = attention + 3 * self.hidden_size * self.ffn_hidden_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size

    def parameters_per_device(self, tp: int, pp: int) -> int:
        """Parameters of the fullest device: norms are whole on every TP rank, the rest is split."""
        heads, groups, channels = self.num_attention_heads, self.num_query_groups, self.kv_channels
        matrices = self.hidden_size * channels * (2 * heads + 2 * groups)
        matrices += 3 * self.hidden_size * self.ffn_hidden_size
        layer = matrices // tp + 2 * self.hidden_size + 2 * channels
        embedding = self.vocab_size * self.hidden_size // tp
        # With PP, first and last stage hold an embedding each, tied or not; without, both or one.
        copies = 1 if pp > 1 or self.tie_embeddings else 2
        return self.num_layers // pp * layer + copies * embedding + self.hidden_size

    def check_layout(self, tp: int, pp: int) -> None:
        """Raise ConfigError unless TP and PP divide what they split."""
        for name, value in (
            ("attention heads", self.num_attention_heads),
            ("query groups", self.num_query_groups),
            ("vocabulary", self.vocab_size),
            ("ffn_hidden_size", self.ffn_hidden_size),
        ):
            if value % tp:
                raise ConfigError(
                    f"TP does not divide the model's {name}",
                    where="--tensor-model-parallel-size",
                    expected=f"a divisor of {value}",
                    found=tp,
                )
        if self.num_layers % pp:
            raise ConfigError(
                "PP does not divide the model's layers",
                where="--pipeline-model-parallel-size",
                expected=f"a divisor of {self.num_layers}",
                found=pp,
            )

    def to_hf_dict(self) -> dict[str, Any]:
        """A config.json that transformers 4 and 5 load."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_query_groups,
            "head_dim": self.kv_channels,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rotary_base,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rotary_base},
            "rms_norm_eps": self.layernorm_epsilon,
            "tie_word_embeddings": self.tie_embeddings,
            "attention_bias": False,
            "hidden_act": "silu",
        }


def _refuse_unsupported(content: Any, path: Path) -> None:
    if not isinstance(content, dict) or content.get("model_type") not in SUPPORTED_MODEL_TYPES:
        found = content.get("model_type") if isinstance(content, dict) else "no mapping"
        raise ConfigError(
            "unsupported model",
            where=path,
            expected=" or ".join(SUPPORTED_MODEL_TYPES),
            found=found,
        )
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    for what, found, expected in (
        ("attention_bias", content.get("attention_bias", False), False),
        ("use_sliding_window", content.get("use_sliding_window", False), False),
        ("hidden_act", content.get("hidden_act", "silu"), "silu"),
        ("rope_type", rope_type, "default"),
    ):
        if found != expected:
            raise ConfigError(f"unsupported {what}", where=path, expected=expected, found=found)
