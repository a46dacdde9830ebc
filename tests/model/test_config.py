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
from transformers import LlamaConfig

from megatron_replay import parallel
from megatron_replay.checkpoint.hf import HFReader
from megatron_replay.config import ParallelConfig
from megatron_replay.errors import CheckpointError, ConfigError
from megatron_replay.model.config import ModelConfig
from megatron_replay.model.gpt import build_model, transformer_config
from tests import pool, tiny
from tests.checkpoint.grid import empty_stage

TINY: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 8,
    "num_query_groups": 4, "kv_channels": 6, "vocab_size": 64, "max_position_embeddings": 16,
    "rotary_base": 10000.0, "layernorm_epsilon": 1e-6,
}  # fmt: skip
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
#: From the config.json each is published with: layers, hidden and FFN size, heads, groups,
#: vocabulary, positions, theta, epsilon, tied, QK-norm; and its number of parameters.
PUBLISHED = {
    "Qwen3 4B": (36, 2560, 9728, 32, 8, 151936, 40960, 1e6, 1e-6, True, True, 4_022_468_096),
    "Qwen3 8B": (36, 4096, 12288, 32, 8, 151936, 40960, 1e6, 1e-6, False, True, 8_190_735_360),
    "Llama 2 7B": (32, 4096, 11008, 32, 32, 32000, 4096, 1e4, 1e-5, False, False, 6_738_415_616),
    "Llama 3 8B": (32, 4096, 14336, 32, 8, 128256, 8192, 5e5, 1e-5, False, False, 8_030_261_248),
}
QK_NORMS = ("q_layernorm.weight", "k_layernorm.weight")
#: Kinds of models: (tied, QK-norm).
KINDS = [(True, True), (False, True), (True, False)]
GRIDS = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(4, 1), (2, 2), (1, 4)]}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name):
    *sizes, tied, qk_layernorm, parameters = PUBLISHED[name]
    layers, hidden, ffn, heads, groups, vocab, positions, theta, epsilon = sizes
    model = ModelConfig(
        num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=heads,
        num_query_groups=groups, kv_channels=128, vocab_size=vocab,
        max_position_embeddings=positions, rotary_base=theta, layernorm_epsilon=epsilon,
        tie_embeddings=tied, qk_layernorm=qk_layernorm,
    )  # fmt: skip
    assert model.num_parameters() == model.parameters_per_device(1, 1) == parameters


def real_shapes(rank: int, world_size: int) -> dict[tuple, tuple[int, dict[str, tuple[int, ...]]]]:
    """{(kind, tp, pp): (stage, {name: shape})} of this rank's part of what megatron-core builds."""
    shapes = {}
    for tp, pp in GRIDS[world_size]:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        layout = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
        groups = parallel.build_groups(layout, torch.device("cpu"))
        for tied, qk_layernorm in KINDS:
            shape = ModelConfig(**TINY, tie_embeddings=tied, qk_layernorm=qk_layernorm)
            model = build_model(shape, transformer_config(shape, layout), groups)
            named = {name: tuple(p.shape) for name, p in model.named_parameters()}
            shapes[(tied, qk_layernorm), tp, pp] = (groups.pp_rank, named)
    return shapes


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_counts_are_those_of_megatron_core(world_size):
    per_rank = pool.run(world_size, real_shapes)
    for kind, tp, pp in per_rank[0]:
        config = ModelConfig(**TINY, tie_embeddings=kind[0], qk_layernorm=kind[1])
        counts = []
        for ranks in per_rank:
            stage, named = ranks[kind, tp, pp]
            fake = {
                name: tuple(tensor.shape)
                for name, tensor in empty_stage(config, tp, pp, stage, te=False).items()
                if config.qk_layernorm or not name.endswith(QK_NORMS)
            }
            assert named == fake, (kind, tp, pp, stage)
            counts.append(sum(torch.Size(shape).numel() for shape in named.values()))
        assert config.parameters_per_device(tp, pp) == max(counts), (kind, tp, pp)
        if world_size == 1:
            assert config.num_parameters() == counts[0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("save", "groups"), [(tiny.save_qwen3, (4, 16)), (tiny.save_llama, (2, 8))]
)
def test_reads_what_transformers_writes_and_back(tmp_path, save, groups, tied):
    save(tmp_path, tied=tied, rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    config, model = ModelConfig.from_hf(tmp_path), tiny.load_reference(tmp_path)
    assert config.num_parameters() == model.num_parameters()
    assert (config.num_layers, config.hidden_size, config.ffn_hidden_size) == (4, 64, 96)
    assert config.num_attention_heads == 8
    assert (config.num_query_groups, config.kv_channels) == groups
    assert (config.rotary_base, config.layernorm_epsilon) == (5e5, 1e-6)
    assert (config.vocab_size, config.max_position_embeddings) == (512, 512)
    assert config.tie_embeddings is tied
    assert config.qk_layernorm == (save is tiny.save_qwen3)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf_dict()))
    assert ModelConfig.from_hf(tmp_path) == config
    again = type(model.config).from_pretrained(tmp_path)
    for key in {*config.to_hf_dict(), "rope_parameters", "hidden_act"} - {"rope_theta"}:
        assert getattr(again, key) == getattr(model.config, key), key


def test_what_old_llama_files_leave_out(tmp_path):
    """As LlamaConfig reads it: as many key heads as heads, their size, theta, tied or not."""
    silent = {
        "model_type": "llama", "hidden_size": 48, "intermediate_size": 96, "vocab_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 16,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_scaling": None, "pretraining_tp": 1,
    }  # fmt: skip
    nulls = {"head_dim": None, "num_key_value_heads": None, "rope_parameters": None}
    for number, content in enumerate((silent, silent | nulls)):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(content))
        config, theirs = ModelConfig.from_hf(directory), LlamaConfig.from_pretrained(directory)
        assert (config.kv_channels, config.num_query_groups) == (12, 4)
        assert (theirs.head_dim, theirs.num_key_value_heads) == (12, 4)
        assert config.rotary_base == theirs.rope_parameters["rope_theta"] == 1e4
        assert config.tie_embeddings is theirs.tie_word_embeddings is False


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
    ({"model_type": "mistral"}, r"model \(expected qwen3 or llama; found mistral\)"),
    ({"model_type": "absent"}, "unsupported model"),
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
    (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type .*found llama3"),
    (LLAMA | {"head_dim": "absent", "num_attention_heads": 5},
     r"heads do not divide hidden_size \(expected a multiple of 5; found 32\)"),
]  # fmt: skip
#: The same for keys that are missing or make no sense.
UNUSABLE: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": "absent"}, "lacks the key hidden_size"),
    ({"tie_word_embeddings": "absent"}, "lacks the key tie_word_embeddings"),
    ({"rope_parameters": "absent", "rope_theta": "absent"}, "lacks the key rope_theta"),
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
    (LLAMA | {"hidden_size": None}, "lacks the key hidden_size"),
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
        ({"vocab_size": 63}, 4, 1, "vocabulary .expected a divisor of 63; found 4"),
        ({"ffn_hidden_size": 50}, 4, 1, "ffn_hidden_size .expected a divisor of 50; found 4"),
        ({}, 1, 3, "--pipeline-model-parallel-size: PP does not .*a divisor of 4; found 3"),
    ],
)
def test_layouts_that_cannot_be(changes, tp, pp, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**TINY | changes, tie_embeddings=True).check_layout(tp, pp)
    ModelConfig(**TINY, tie_embeddings=True).check_layout(4, 4)
