"""ModelConfig against transformers' and megatron-core's own counts, and what it refuses to read."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_replay import parallel
from megatron_replay.checkpoint.hf import HFReader
from megatron_replay.config import ParallelConfig
from megatron_replay.errors import CheckpointError, ConfigError
from megatron_replay.model.config import ModelConfig
from megatron_replay.model.gpt import build_model, transformer_config
from megatron_replay.model.rotary import inverse_frequencies
from tests import pool, tiny
from tests.checkpoint.grid import empty_stage

TINY: dict[str, Any] = {
    "num_layers": 5, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 8,
    "num_query_groups": 4, "kv_channels": 6, "vocab_size": 66, "max_position_embeddings": 16,
    "rotary_base": 10000.0, "layernorm_epsilon": 1e-6,
}  # fmt: skip
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
MISTRAL = {"model_type": "mistral"}
#: From the config.json each is published with: layers, hidden and FFN size, heads, groups,
#: channels, vocabulary, tied, QK-norm, QKV bias; and its number of parameters.
PUBLISHED = {
    "Qwen3 4B": (36, 2560, 9728, 32, 8, 128, 151936, True, True, False, 4_022_468_096),
    "Qwen3 8B": (36, 4096, 12288, 32, 8, 128, 151936, False, True, False, 8_190_735_360),
    "Qwen2.5 0.5B": (24, 896, 4864, 14, 2, 64, 151936, True, False, True, 494_032_768),
    "Qwen2.5 7B": (28, 3584, 18944, 28, 4, 128, 152064, False, False, True, 7_615_616_512),
    "Llama 2 7B": (32, 4096, 11008, 32, 32, 128, 32000, False, False, False, 6_738_415_616),
    "Llama 3 8B": (32, 4096, 14336, 32, 8, 128, 128256, False, False, False, 8_030_261_248),
    "Llama 3.2 1B": (16, 2048, 8192, 32, 8, 64, 128256, True, False, False, 1_235_814_400),
    "Mistral 7B v0.3": (32, 4096, 14336, 32, 8, 128, 32768, False, False, False, 7_248_023_552),
}
#: Kinds of models: (tied, QK-norm, QKV bias).
KINDS = [(True, True, False), (False, True, False), (True, False, False), (True, False, True)]
#: The scaling of Llama 3.2, for a context of 32 tokens.
LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
GRIDS = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(4, 1), (2, 2), (1, 4)]}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name):
    layers, hidden, ffn, heads, groups, channels, vocab, *kind, parameters = PUBLISHED[name]
    model = ModelConfig(
        num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=heads,
        num_query_groups=groups, kv_channels=channels, vocab_size=vocab,
        max_position_embeddings=4096, rotary_base=1e4, layernorm_epsilon=1e-6, **of_kind(*kind),
    )  # fmt: skip
    assert model.num_parameters() == model.parameters_per_device(1, 1) == parameters


def of_kind(tied: bool, qk_layernorm: bool, qkv_bias: bool) -> dict[str, bool]:
    return {"tie_embeddings": tied, "qk_layernorm": qk_layernorm, "qkv_bias": qkv_bias}


def real_shapes(rank: int, world_size: int) -> dict[tuple, tuple[int, dict[str, tuple[int, ...]]]]:
    """{(kind, tp, pp): (stage, {name: shape})} of this rank's part of what megatron-core builds."""
    shapes = {}
    for tp, pp in GRIDS[world_size]:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        layout = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
        groups = parallel.build_groups(layout, torch.device("cpu"))
        for kind in KINDS:
            shape = ModelConfig(**TINY, **of_kind(*kind))
            model = build_model(shape, transformer_config(shape, layout), groups)
            named = {name: tuple(p.shape) for name, p in model.named_parameters()}
            shapes[kind, tp, pp] = (groups.pp_rank, named)
    return shapes


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_counts_are_those_of_megatron_core(world_size):
    per_rank = pool.run(world_size, real_shapes)
    for kind, tp, pp in per_rank[0]:
        config = ModelConfig(**TINY, **of_kind(*kind))
        counts = []
        for ranks in per_rank:
            stage, named = ranks[kind, tp, pp]
            fake = {
                name: tuple(tensor.shape)
                for name, tensor in empty_stage(config, tp, pp, stage, te=False).items()
            }
            assert named == fake, (kind, tp, pp, stage)
            counts.append(sum(torch.Size(shape).numel() for shape in named.values()))
        assert config.parameters_per_device(tp, pp) == max(counts), (kind, tp, pp)
        if world_size == 1:
            assert config.num_parameters() == counts[0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rope", [{"rope_type": "default"}, LLAMA3], ids=["default", "llama3"])
@pytest.mark.parametrize(
    ("save", "groups"),
    [
        (tiny.save_qwen3, (4, 16)), (tiny.save_qwen2, (4, 8)), (tiny.save_llama, (2, 8)),
        (tiny.save_mistral, (2, 8)),
    ],
)  # fmt: skip
def test_reads_what_transformers_writes_and_back(tmp_path, save, groups, rope, tied):
    save(tmp_path, tied=tied, rope_parameters={"rope_theta": 5e5, **rope})
    config, model = ModelConfig.from_hf(tmp_path), tiny.load_reference(tmp_path)
    assert config.num_parameters() == model.num_parameters()
    assert (config.num_layers, config.hidden_size, config.ffn_hidden_size) == (4, 64, 96)
    assert config.num_attention_heads == 8
    assert (config.num_query_groups, config.kv_channels) == groups
    assert (config.rotary_base, config.layernorm_epsilon) == (5e5, 1e-6)
    assert (config.vocab_size, config.max_position_embeddings) == (512, 512)
    assert config.tie_embeddings is tied
    assert config.qk_layernorm == (save is tiny.save_qwen3)
    assert config.qkv_bias == (save is tiny.save_qwen2)
    ours = inverse_frequencies(config.rotary_base, config.kv_channels, config.rope_scaling)
    assert torch.equal(ours, model.model.rotary_emb.inv_freq)
    tokens = torch.arange(40)[None]
    expected = model(tokens).logits
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf_dict()))
    assert ModelConfig.from_hf(tmp_path) == config
    # Mistral is written as Llama, which it then is.
    assert torch.equal(tiny.load_reference(tmp_path)(tokens).logits, expected)
    # The keys of transformers 4 alone.
    old = {k: v for k, v in config.to_hf_dict().items() if k != "rope_parameters"}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert ModelConfig.from_hf(tmp_path) == config
    assert torch.equal(tiny.load_reference(tmp_path)(tokens).logits, expected)


#: The keys of config.json that may be left out, and their fields.
OPTIONAL = {
    "num_key_value_heads": "num_query_groups", "head_dim": "kv_channels",
    "max_position_embeddings": "max_position_embeddings", "rope_parameters": "rotary_base",
    "rms_norm_eps": "layernorm_epsilon", "tie_word_embeddings": "tie_embeddings",
}  # fmt: skip


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama", "mistral"])
@pytest.mark.parametrize("key", OPTIONAL)
def test_what_files_leave_out_is_as_in_transformers(tmp_path, model_type, key):
    content = {
        "model_type": model_type, "hidden_size": 256, "intermediate_size": 96, "vocab_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 64, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 5e5}, "sliding_window": None,
    }  # fmt: skip
    del content[key]
    may_be_null = {"num_key_value_heads", "rope_parameters"}
    if model_type == "mistral":  # whose null transformers 5 refuses
        may_be_null.remove("num_key_value_heads")
    for change in [{}, {key: None}] if key in may_be_null else [{}]:
        (tmp_path / "config.json").write_text(json.dumps({**content, **change}))
        config, theirs = ModelConfig.from_hf(tmp_path), AutoConfig.from_pretrained(tmp_path)
        if key == "head_dim":  # Qwen2 has no such attribute: its attention computes it
            attention = AutoModelForCausalLM.from_config(theirs).model.layers[0].self_attn
            expected = attention.head_dim
        elif key == "rope_parameters":
            expected = theirs.rope_parameters["rope_theta"]
        else:
            expected = getattr(theirs, key)
        assert getattr(config, OPTIONAL[key]) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_stored_rotary_frequencies_must_be_those_of_rope_theta(tmp_path, dtype):
    """Llama 2's files hold them; transformers makes its own, and so do we."""
    tiny.save_llama(tmp_path, tied=True)
    config, weights = ModelConfig.from_hf(tmp_path), load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    right = tiny.load_reference(tmp_path).model.rotary_emb.inv_freq
    for stored, name_stored, error in (
        (right, name, None),
        (right / 2, name, f"{name} differs"),
        (right[:-1], name, f"{name} differs"),
        (right, name + "s", "not part of the model"),
    ):
        save_file({**weights, name_stored: stored.to(dtype)}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=error) if error else contextlib.nullcontext():
            HFReader(tmp_path).check(config)


def write(directory: Path, **changes: Any) -> Path:
    content = ModelConfig(**TINY, tie_embeddings=True).to_hf_dict()
    content = {key: value for key, value in (content | changes).items() if value != "absent"}
    (directory / "config.json").write_text(json.dumps(content))
    return directory


def test_spelling_of_older_files(tmp_path):
    """transformers 4: rope_theta at the top; the values that mean nothing special may be null."""
    old = write(
        tmp_path,
        rope_parameters="absent", rope_scaling=None, rope_theta=1000000, attention_bias=None,
        use_sliding_window=False, sliding_window=None, max_window_layers=36,
        layer_types=["full_attention"] * 4,
    )  # fmt: skip
    assert ModelConfig.from_hf(old).rotary_base == 1e6
    assert isinstance(ModelConfig.from_hf(old).rotary_base, float)


#: (changes of config.json, what is printed): features that this project does not implement.
UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "qwen3_moe"},
     r"model \(expected qwen3 or qwen2 or llama or mistral; found qwen3_moe\)"),
    ({"model_type": "absent"}, "unsupported model"),
    ({"model_type": ["llama"]}, "unsupported model"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
     r"rope_parameters \(expected one for all layers; found full_attention\)"),
    ({"attention_bias": True}, r"unsupported attention_bias \(expected False; found True\)"),
    ({"use_sliding_window": True}, "unsupported use_sliding_window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "found sliding_attention"),
    ({"layer_types": 3}, r"unsupported layer_types .*found 3"),
    ({"hidden_act": "gelu"}, "expected silu; found gelu"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type .*found yarn"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type .*found linear"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rotary_.*found 0.5"),
    ({"partial_rotary_factor": 0.5}, "unsupported partial_rotary_factor"),
    ({"quantization_config": {"quant_method": "fp8"}}, "unsupported quantization_config"),
    ({"num_key_value_heads": 3}, r"groups do not divide .*expected a multiple of 3; found 8"),
    ({"head_dim": 7}, "channels in pairs"),
    (LLAMA | {"mlp_bias": True}, r"unsupported mlp_bias \(expected False; found True\)"),
    (LLAMA | {"attention_bias": True}, "unsupported attention_bias"),
    (MISTRAL | {"sliding_window": 512}, r"sliding_window \(expected null; found 512\)"),
    (MISTRAL, "unsupported sliding_window .*found 4096"),
    ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
     r"unusable high_freq_factor \(expected a number above 1.0; found 1.0\)"),
    (LLAMA | {"head_dim": "absent", "num_attention_heads": 5},
     r"heads do not divide hidden_size \(expected a multiple of 5; found 32\)"),
]  # fmt: skip
#: The same for keys that are missing or make no sense.
UNUSABLE: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": "absent"}, "lacks the key hidden_size"),
    (LLAMA | {"rope_scaling": {"rope_type": "llama3"}}, "lacks the key factor"),
    ({"rope_scaling": LLAMA3 | {"factor": "8"}}, "unusable factor .*expected a positive number"),
    ({"rope_parameters": {"rope_theta": 0}}, "unusable rope_theta .*found 0"),
    ({"rope_parameters": [1]}, "unusable rope_parameters .*expected a mapping"),
    ({"hidden_size": 32.5}, r"unusable hidden_size \(expected a positive integer; found 32\.5"),
    ({"hidden_size": "32"}, "unusable hidden_size .*found '32'"),
    ({"hidden_size": True}, "unusable hidden_size .*found True"),
    ({"hidden_size": None}, "unusable hidden_size .*found None"),
    ({"num_hidden_layers": 0}, "unusable num_hidden_layers"),
    ({"vocab_size": -1}, "unusable vocab_size"),
    ({"vocab_size": 10**30}, "unusable vocab_size"),
    ({"rms_norm_eps": float("nan")}, "unusable rms_norm_eps .*expected a positive number"),
    ({"rms_norm_eps": float("inf")}, "unusable rms_norm_eps"),
    (LLAMA | {"hidden_size": None}, "unusable hidden_size .*found None"),
    (LLAMA | {"rope_parameters": {"rope_theta": None}}, "unusable rope_theta .*found None"),
    ({"tie_word_embeddings": "false"}, "unusable tie_word_embeddings .*expected true or false"),
]


@pytest.mark.parametrize(
    ("error", "changes", "message"),
    [
        *((ConfigError, changes, message) for changes, message in UNSUPPORTED),
        *((CheckpointError, changes, rf"config\.json: {text}") for changes, text in UNUSABLE),
    ],
)
def test_what_is_refused(tmp_path, error, changes, message):
    with pytest.raises(error, match=message):
        ModelConfig.from_hf(write(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "tp", "pp", "message"),
    [
        ({}, 3, 1, "attention heads .expected a divisor of 8; found 3"),
        ({}, 8, 1, "query groups .expected a divisor of 4; found 8"),
        (
            {"vocab_size": 9},
            4,
            1,
            "--tensor-.*too many ranks .expected fewer for 9 tokens; found 4",
        ),
        ({"ffn_hidden_size": 50}, 4, 1, "ffn_hidden_size .expected a divisor of 50; found 4"),
        ({}, 1, 6, "--pipeline-model-parallel-size: too many .*fewer for 5 layers; found 6"),
    ],
)
def test_layouts_that_cannot_be(changes, tp, pp, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**TINY | changes, tie_embeddings=True).check_layout(tp, pp)
    ModelConfig(**TINY, tie_embeddings=True).check_layout(4, 5)


@pytest.mark.parametrize(
    ("layers", "stages"), [(36, (18, 18)), (5, (3, 2)), (7, (2, 2, 2, 1)), (2, (1, 1))]
)
def test_layers_are_spread_over_the_stages(layers, stages):
    config = ModelConfig(**TINY | {"num_layers": layers}, tie_embeddings=True)
    assert config.layers_of_stages(len(stages)) == stages
