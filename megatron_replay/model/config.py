"""The shape of a Qwen or Llama model, read from a Hugging Face config.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_replay.errors import CheckpointError, ConfigError, few
from megatron_replay.files import read_json
from megatron_replay.model.rotary import Llama3Scaling

#: What transformers assumes for keys that config.json leaves out, by supported model type. A number
#: of key heads or of channels that is null follows from the other sizes.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
    "qwen2": {"num_key_value_heads": 32, "head_dim": None, "max_position_embeddings": 32768},
    "llama": {"num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048},
    "mistral": {
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
}
_COMMON_DEFAULTS = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
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
    """A dense decoder with grouped-query attention, RMSNorm, SwiGLU and RoPE.

    Attributes:
        qk_layernorm: a norm of each query and key head, as in Qwen3.
        qkv_bias: a bias of queries, keys and values, as in Qwen2; no other matrix has one.
        rope_scaling: as in Llama 3.1 and later.
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
    qkv_bias: bool = False
    rope_scaling: Llama3Scaling | None = None

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
        model_type = content.get("model_type")
        if model_type not in [*_DEFAULTS]:  # compared, as it may be a list
            raise ConfigError(
                "unsupported model", where=path, expected=" or ".join(_DEFAULTS), found=model_type
            )
        content = {**_COMMON_DEFAULTS, **_DEFAULTS[model_type], **content}
        _refuse_unsupported(content, path)
        # transformers 4 has rope_theta and rope_scaling, transformers 5 has rope_parameters.
        rope = content.get("rope_scaling") or content.get("rope_parameters") or {}
        content = _with_derived_sizes(content, path)
        content["rope_theta"] = rope.get("rope_theta", content["rope_theta"])
        fields: dict[str, Any] = {
            field: _read(content, key, kind, path) for field, (key, kind) in _KEYS.items()
        }
        return cls(
            **fields,
            qk_layernorm=model_type == "qwen3",
            qkv_bias=model_type == "qwen2",
            rope_scaling=_read_scaling(rope, path),
        )

    def num_parameters(self) -> int:
        """Parameters of the whole model; tied embeddings count once."""
        return self.parameters_per_device(1, 1)

    def parameters_per_device(self, tp: int, pp: int) -> int:
        """Parameters of the device with most: every TP rank has the norms, the rest is split."""
        heads, groups, channels = self.num_attention_heads, self.num_query_groups, self.kv_channels
        matrices = self.hidden_size * channels * (2 * heads + 2 * groups)
        matrices += 3 * self.hidden_size * self.ffn_hidden_size
        matrices += channels * (heads + 2 * groups) * self.qkv_bias
        norms = 2 * self.hidden_size + 2 * channels * self.qk_layernorm
        embedding = self.vocabulary_rows(tp) * self.hidden_size
        # With PP, first and last stage have one each, tied or not; without PP, one stage has both.
        copies = 1 if pp > 1 or self.tie_embeddings else 2
        stages = self.layers_of_stages(pp)
        # The last stage has the final norm, and is the largest unless it has fewer layers.
        final_norm = self.hidden_size if stages[0] == stages[-1] else 0
        return stages[0] * (matrices // tp + norms) + copies * embedding + final_norm

    def layers_of_stages(self, pp: int) -> tuple[int, ...]:
        """Layers of each pipeline stage: as even as can be, the first stages have one more.

        So the last stage, which also computes the loss, never has more than another.
        """
        least, rest = divmod(self.num_layers, pp)
        return (least + 1,) * rest + (least,) * (pp - rest)

    def vocabulary_rows(self, tp: int) -> int:
        """Rows of the embedding on each TP rank, with padding where TP does not divide them."""
        return -(-self.vocab_size // tp)

    def check_layout(self, tp: int, pp: int, *, flag: str = "--{}-model-parallel-size") -> None:
        """Raise ConfigError unless TP and PP, given by ``flag``, can split the model.

        TP divides all but the vocabulary, of which each rank must have a token; PP divides nothing,
        but each stage must have a layer.
        """
        for what, value in (
            ("attention heads", self.num_attention_heads),
            ("query groups", self.num_query_groups),
            ("ffn_hidden_size", self.ffn_hidden_size),
        ):
            if value % tp:
                raise ConfigError(
                    f"TP does not divide the model's {what}",
                    where=flag.format("tensor"),
                    expected=f"a divisor of {value}",
                    found=tp,
                )
        for kind, size, fits, parts in (
            ("tensor", tp, (tp - 1) * self.vocabulary_rows(tp) < self.vocab_size,
             f"{self.vocab_size} tokens"),
            ("pipeline", pp, pp <= self.num_layers, f"{self.num_layers} layers"),
        ):  # fmt: skip
            if not fits:
                raise ConfigError(
                    "too many ranks",
                    where=flag.format(kind),
                    expected=f"fewer for {parts}",
                    found=size,
                )

    def to_hf_dict(self) -> dict[str, Any]:
        """A config.json that transformers 4 and 5 load."""
        family = "Qwen3" if self.qk_layernorm else "Qwen2" if self.qkv_bias else "Llama"
        return {
            "architectures": [f"{family}ForCausalLM"],
            "model_type": family.lower(),
            **{key: getattr(self, field) for field, (key, _) in _KEYS.items()},
            **self.rope_keys(),
            "hidden_act": "silu",
        }

    def rope_keys(self) -> dict[str, Any]:
        """The keys of config.json about RoPE: transformers 4 reads two of them, 5 the third."""
        scaling = None
        if self.rope_scaling is not None:
            scaling = {"rope_type": "llama3", **asdict(self.rope_scaling)}
        parameters = {"rope_type": "default"} if scaling is None else scaling
        return {
            "rope_theta": self.rotary_base,
            "rope_scaling": scaling,
            "rope_parameters": {**parameters, "rope_theta": self.rotary_base},
        }


def _refuse_unsupported(content: dict[str, Any], path: Path) -> None:
    for key in ("rope_parameters", "rope_scaling"):
        _refuse_unsupported_rope(content.get(key) or {}, key, path)
    model_type = content["model_type"]
    for key, expected, is_read in (
        # Qwen2's biases are fixed. Llama's are those of the output projection as well.
        ("attention_bias", False, model_type != "qwen2"),
        ("mlp_bias", False, True),
        ("use_sliding_window", False, True),
        ("sliding_window", "null", model_type == "mistral"),
        ("hidden_act", "silu", True),
        ("partial_rotary_factor", 1.0, True),
        ("quantization_config", "null", True),
    ):
        found = content.get(key) or expected
        if is_read and found != expected:
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
    if _rope_type(rope) not in ("default", "llama3"):
        raise ConfigError(
            "unsupported rope_type",
            where=path,
            expected="default or llama3",
            found=_rope_type(rope),
        )
    if nested := sorted(name for name, value in rope.items() if isinstance(value, dict)):
        raise ConfigError(
            f"unsupported {key}", where=path, expected="one for all layers", found=few(nested)
        )
    if (found := rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ConfigError(
            "unsupported partial_rotary_factor", where=path, expected=1.0, found=found
        )


def _rope_type(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _read_scaling(rope: dict[str, Any], path: Path) -> Llama3Scaling | None:
    if _rope_type(rope) == "default":
        return None
    factor, low, high = (
        _read(rope, key, float, path) for key in ("factor", "low_freq_factor", "high_freq_factor")
    )
    context = _read(rope, "original_max_position_embeddings", int, path)
    if not low < high:
        raise ConfigError(
            "unusable high_freq_factor", where=path, expected=f"a number above {low}", found=high
        )
    return Llama3Scaling(
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=context,
    )


def _with_derived_sizes(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """As many key heads as heads, and hidden_size / heads channels, where these are null."""
    heads, groups, channels = (
        content.get(key) for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    if groups is None:
        groups = heads
    if channels is None:
        hidden, heads = (
            _read(content, key, int, path) for key in ("hidden_size", "num_attention_heads")
        )
        channels, rest = divmod(hidden, heads)
        if rest:
            raise ConfigError(
                "the attention heads do not divide hidden_size",
                where=path,
                expected=f"a multiple of {heads}",
                found=hidden,
            )
    return {**content, "num_key_value_heads": groups, "head_dim": channels}


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
