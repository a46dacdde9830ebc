"""ModelConfig against transformers' and megatron-core's own counts, and what it refuses to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_replay import parallel
from megatron_replay.config import ParallelConfig
from megatron_replay.errors import CheckpointError, ConfigError
from megatron_replay.model.config import ModelConfig
from megatron_replay.model.gpt import build_model, transformer_config
from tests import pool, tiny
from tests.checkpoint.grid import empty_stage

TINY: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 6,
    "vocab_size": 64,
    "max_position_embeddings": 16,
    "rotary_base": 10000.0,
    "layernorm_epsilon": 1e-6,
}
#: From the config.json each is published with.
QWEN3_4B = ModelConfig(
    num_layers=36, hidden_size=2560, ffn_hidden_size=9728, num_attention_heads=32,
    num_query_groups=8, kv_channels=128, vocab_size=151936, max_position_embeddings=40960,
    rotary_base=1e6, layernorm_epsilon=1e-6, tie_embeddings=True,
)  # fmt: skip
QWEN3_8B = ModelConfig(
    num_layers=36, hidden_size=4096, ffn_hidden_size=12288, num_attention_heads=32,
    num_query_groups=8, kv_channels=128, vocab_size=151936, max_position_embeddings=40960,
    rotary_base=1e6, layernorm_epsilon=1e-6, tie_embeddings=False,
)  # fmt: skip
GRIDS = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(4, 1), (2, 2), (1, 4)]}


def test_published_totals():
    assert QWEN3_4B.num_parameters() == 4_022_468_096
    assert QWEN3_8B.num_parameters() == 8_190_735_360
    assert QWEN3_4B.parameters_per_device(1, 1) == QWEN3_4B.num_parameters()
    assert QWEN3_8B.parameters_per_device(1, 1) == QWEN3_8B.num_parameters()


def real_shapes(rank: int, world_size: int) -> dict[tuple, tuple[int, dict[str, tuple[int, ...]]]]:
    """{(tied, tp, pp): (stage, {name: shape})} of this rank's part of what megatron-core builds."""
    shapes = {}
    for tp, pp in GRIDS[world_size]:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        layout = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
        groups = parallel.build_groups(layout, torch.device("cpu"))
        for tied in (True, False):
            shape = ModelConfig(**TINY, tie_embeddings=tied)
            model = build_model(shape, transformer_config(shape, layout), groups)
            named = {name: tuple(p.shape) for name, p in model.named_parameters()}
            shapes[tied, tp, pp] = (groups.pp_rank, named)
    return shapes


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_counts_are_those_of_megatron_core(world_size):
    per_rank = pool.run(world_size, real_shapes)
    for tied, tp, pp in per_rank[0]:
        config = ModelConfig(**TINY, tie_embeddings=tied)
        counts = []
        for ranks in per_rank:
            stage, named = ranks[tied, tp, pp]
            fake = empty_stage(config, tp, pp, stage, te=False)
            assert named == {name: tuple(tensor.shape) for name, tensor in fake.items()}, (
                tied,
                tp,
                pp,
                stage,
            )
            counts.append(sum(torch.Size(shape).numel() for shape in named.values()))
        assert config.parameters_per_device(tp, pp) == max(counts), (tied, tp, pp)
        if world_size == 1:
            assert config.num_parameters() == counts[0]


@pytest.mark.parametrize("tied", [True, False])
def test_reads_what_transformers_writes_and_back(tmp_path, tied):
    tiny.save_qwen3(
        tmp_path, tied=tied, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}
    )
    config = ModelConfig.from_hf(tmp_path)
    model = tiny.load_reference(tmp_path)
    assert config.num_parameters() == model.num_parameters()
    assert (config.num_layers, config.hidden_size, config.ffn_hidden_size) == (4, 64, 96)
    assert (config.num_attention_heads, config.num_query_groups, config.kv_channels) == (8, 4, 16)
    assert (config.rotary_base, config.layernorm_epsilon) == (5e5, 1e-6)
    assert (config.vocab_size, config.max_position_embeddings) == (512, 512)
    assert config.tie_embeddings is tied
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf_dict()))
    assert ModelConfig.from_hf(tmp_path) == config
    again = type(model.config).from_pretrained(tmp_path)
    for key in (
        "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "head_dim",
        "num_key_value_heads", "vocab_size", "rms_norm_eps", "tie_word_embeddings",
        "max_position_embeddings", "rope_parameters", "layer_types", "hidden_act", "attention_bias",
    ):  # fmt: skip
        assert getattr(again, key) == getattr(model.config, key), key


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, r"unsupported model \(expected qwen3; found llama\)"),
        ({"model_type": "absent"}, "unsupported model"),
        ({"attention_bias": True}, r"unsupported attention_bias \(expected False; found True\)"),
        ({"use_sliding_window": True}, "unsupported use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "found sliding_attention"),
        ({"layer_types": 3}, r"unsupported layer_types .*found 3"),
        ({"hidden_act": "gelu"}, "expected silu; found gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type .*found yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type .*found linear"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "unsupported partial_rotary_factor .*found 0.5",
        ),
        ({"partial_rotary_factor": 0.5}, "unsupported partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "fp8"}}, "unsupported quantization_config"),
        ({"num_key_value_heads": 3}, r"groups do not divide .*expected a multiple of 3; found 8"),
        ({"head_dim": 7}, "channels in pairs"),
    ],
)
def test_unsupported(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(write(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
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
        ({"tie_word_embeddings": "false"}, "unusable tie_word_embeddings .*expected true or false"),
    ],
)
def test_unusable_keys(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
        ModelConfig.from_hf(write(tmp_path, **changes))


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 1' + b"0" * 5000 + b"}"]
)
def test_not_json(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON: "):
        ModelConfig.from_hf(tmp_path)


def test_not_a_mapping_and_not_there(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="found no mapping"):
        ModelConfig.from_hf(tmp_path)
    with pytest.raises(CheckpointError, match="cannot read: No such file or directory"):
        ModelConfig.from_hf(tmp_path / "nowhere")


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
    config = ModelConfig(**{**TINY, **changes}, tie_embeddings=True)
    with pytest.raises(ConfigError, match=message):
        config.check_layout(tp, pp)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (4, 4)])
def test_layouts_that_can_be(tp, pp):
    ModelConfig(**TINY, tie_embeddings=True).check_layout(tp, pp)
