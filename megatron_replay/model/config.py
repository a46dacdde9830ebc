"""The shape of a Qwen3 or Llama model, read from a Hugging Face config.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_replay.errors import CheckpointError, ConfigError
from megatron_replay.files import read_json

SUPPORTED_MODEL_TYPES = ("qwen3", "llama")
#: The largest integer that every JSON parser reads exactly.
_LARGEST = 2**53
_KINDS = {int: "a positive integer", float: "a positive number", bool: "true or false"}

#: The key in config.json of each field, and its kind.
_KEYS: dict[str, tuple[str, type[int | float | bool]]] = {
    "num_layers": ("num_hidden_layers", int),
    "hidden_size": ("hidden_size", int),
    "ffn_hidden_size": ("intermediate_size", int),
    "num_attention_heads": ("num_attention_heads", int),
    "num_query_groups": ("num_key_value_heads", int),
    "kv_channels": ("head_dim", int),
    "vocab_size": ("vocab_size", int),
    "max_position_embeddings": ("max_position_embeddings", int),
    "rotary_base": ("rope_theta", float),
    "layernorm_epsilon": ("rms_norm_eps", float),
    "tie_embeddings": ("tie_word_embeddings", bool),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A dense decoder with grouped-query attention, RMSNorm, SwiGLU, RoPE and no biases.

    ``qk_layernorm``, a norm of each query and key head: Qwen3 has it, Llama does not.
    """

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

    def __post_init__(self) -> None:
        heads, groups = self.num_attention_heads, self.num_query_groups
        for what, number, divisor in (
            ("query groups do not divide the attention heads", heads, groups),
            ("rotary embeddings need channels in pairs", self.kv_channels, 2),
        ):
            if number % divisor:
                raise ConfigError(what, expected=f"a multiple of {divisor}", found=number)

    @classmethod
    def from_hf(cls, directory: str | Path) -> ModelConfig:
        """Read ``directory/config.json``.

        Raises:
            CheckpointError: it is missing, not JSON, or lacks a key.
            ConfigError: it has a feature that this project does not implement.
        """
        path = Path(directory) / "config.json"
        content = read_json(path, CheckpointError)
        _refuse_unsupported(content, path)
        is_llama = content["model_type"] == "llama"
        if is_llama:
            content = _with_llama_defaults(content, path)
        # transformers 5 moved rope_theta into rope_parameters.
        rope = content.get("rope_scaling") or content.get("rope_parameters") or {}
        if "rope_theta" in rope:
            content = {**content, "rope_theta": rope["rope_theta"]}
        fields: dict[str, Any] = {
            field: _read(content, key, kind, path) for field, (key, kind) in _KEYS.items()
        }
        return cls(**fields, qk_layernorm=not is_llama)

    def num_parameters(self) -> int:
        """Parameters of the whole model; tied embeddings count once."""
        return self.parameters_per_device(1, 1)

    def parameters_per_device(self, tp: int, pp: int) -> int:
        """Parameters of the device with most: every TP rank has the norms, the rest is split."""
        heads, groups, channels = self.num_attention_heads, self.num_query_groups, self.kv_channels
        matrices = self.hidden_size * channels * (2 * heads + 2 * groups)
        matrices += 3 * self.hidden_size * self.ffn_hidden_size
        norms = 2 * self.hidden_size + 2 * channels * self.qk_layernorm
        embedding = self.vocab_size * self.hidden_size // tp
        # With PP, first and last stage have one each, tied or not; without PP, one stage has both.
        copies = 1 if pp > 1 or self.tie_embeddings else 2
        layers = self.num_layers // pp * (matrices // tp + norms)
        return layers + copies * embedding + self.hidden_size

    def check_layout(self, tp: int, pp: int, *, flag: str = "--{}-model-parallel-size") -> None:
        """Raise ConfigError unless TP and PP, given by ``flag``, divide what they split."""
        flags = {"TP": flag.format("tensor"), "PP": flag.format("pipeline")}
        for kind, size, what, value in (
            ("TP", tp, "attention heads", self.num_attention_heads),
            ("TP", tp, "query groups", self.num_query_groups),
            ("TP", tp, "vocabulary", self.vocab_size),
            ("TP", tp, "ffn_hidden_size", self.ffn_hidden_size),
            ("PP", pp, "layers", self.num_layers),
        ):
            if value % size:
                raise ConfigError(
                    f"{kind} does not divide the model's {what}",
                    where=flags[kind],
                    expected=f"a divisor of {value}",
                    found=size,
                )

    def to_hf_dict(self) -> dict[str, Any]:
        """A config.json that transformers 4 and 5 load."""
        return {
            "architectures": ["Qwen3ForCausalLM" if self.qk_layernorm else "LlamaForCausalLM"],
            "model_type": "qwen3" if self.qk_layernorm else "llama",
            **{key: getattr(self, field) for field, (key, _) in _KEYS.items()},
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rotary_base},
            "attention_bias": False,
            "hidden_act": "silu",
        }


def _refuse_unsupported(content: dict[str, Any], path: Path) -> None:
    if content.get("model_type") not in SUPPORTED_MODEL_TYPES:
        raise ConfigError(
            "unsupported model",
            where=path,
            expected=" or ".join(SUPPORTED_MODEL_TYPES),
            found=content.get("model_type"),
        )
    for key in ("rope_parameters", "rope_scaling"):
        _refuse_unsupported_rope(content.get(key) or {}, key, path)
    for key, expected in (
        ("attention_bias", False),
        ("mlp_bias", False),
        ("use_sliding_window", False),
        ("hidden_act", "silu"),
        ("partial_rotary_factor", 1.0),
        ("quantization_config", None),
    ):
        found = content.get(key) or expected
        if found != expected:
            raise ConfigError(f"unsupported {key}", where=path, expected=expected, found=found)
    layer_types = content.get("layer_types") or []
    for found in layer_types if isinstance(layer_types, list) else [layer_types]:
        if found != "full_attention":
            raise ConfigError(
                "unsupported layer_types", where=path, expected="full_attention", found=found
            )


def _refuse_unsupported_rope(rope: Any, key: str, path: Path) -> None:
    if not isinstance(rope, dict):
        raise CheckpointError(f"unusable {key}", where=path, expected="a mapping", found=rope)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    for name, found, expected in (
        ("rope_type", rope_type, "default"),
        ("partial_rotary_factor", rope.get("partial_rotary_factor") or 1.0, 1.0),
    ):
        if found != expected:
            raise ConfigError(f"unsupported {name}", where=path, expected=expected, found=found)


def _with_llama_defaults(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Adds LlamaConfig's defaults for absent or null keys, which Llama 1 and 2 lack."""
    content = {key: value for key, value in content.items() if value is not None}
    hidden, heads = (
        _read(content, key, int, path) for key in ("hidden_size", "num_attention_heads")
    )
    if hidden % heads:
        raise ConfigError(
            "the attention heads do not divide hidden_size",
            where=path,
            expected=f"a multiple of {heads}",
            found=hidden,
        )
    return {
        "num_key_value_heads": heads,
        "head_dim": hidden // heads,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        **content,
    }


def _read(content: dict[str, Any], key: str, kind: type[int | float | bool], path: Path) -> Any:
    """``content[key]``, which must be a ``kind``; numbers must be positive and at most 2^53."""
    if key not in content:
        raise CheckpointError(f"lacks the key {key}", where=path)
    value = content[key]
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits or (kind is not bool and not 0 < value <= _LARGEST):
        raise CheckpointError(
            f"unusable {key}", where=path, expected=_KINDS[kind], found=repr(value)[:80]
        )
    return kind(value)
