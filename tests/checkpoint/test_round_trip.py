"""Hugging Face -> ranks -> Hugging Face is the identity, and the ranks hold what they should."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_replay.checkpoint import export
from megatron_replay.checkpoint.export import write_random, write_weights
from megatron_replay.checkpoint.hf import HFReader
from megatron_replay.checkpoint.names import hf_tensor_shapes, mapping_of
from megatron_replay.checkpoint.staging import start_directory
from megatron_replay.errors import CheckpointError, OutputError
from megatron_replay.model.config import ModelConfig
from tests import tiny
from tests.checkpoint.conftest import SIDE_FILES
from tests.checkpoint.grid import load_grid, save_grid
from tests.same_weights import require_equal


@pytest.mark.parametrize("te", [False, True], ids=["local", "te"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("tied", [True, False])
def test_load_then_export_is_the_identity(
    sharded_qwen3, qwen3, tmp_path, monkeypatch, tied, tp, pp, te
):
    source, final = sharded_qwen3[tied], tmp_path / "exported"
    grid = load_grid(source, tp, pp, te=te)
    for ranks in grid.values():
        assert not any(tensor.isnan().any() for rank in ranks for tensor in rank.values())
    monkeypatch.setattr(export, "MAX_SHARD_BYTES", 150_000)
    save_grid(grid, source, start_directory(final), final)
    require_equal(final, qwen3[tied])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported"]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_each_rank_holds_its_heads_and_columns(qwen3, tp):
    """Against rows picked one head at a time, straight from the definition of each layout."""
    weights = load_file(qwen3[False] / "model.safetensors")
    config = ModelConfig.from_hf(qwen3[False])
    q, k, v, gate, up, down, out = (
        weights[f"model.layers.2.{name}_proj.weight"]
        for name in (
            *("self_attn.q", "self_attn.k", "self_attn.v"),
            *("mlp.gate", "mlp.up", "mlp.down", "self_attn.o"),
        )
    )
    per_group = config.num_attention_heads // config.num_query_groups

    def head(tensor, number):
        return tensor[number * config.kv_channels : (number + 1) * config.kv_channels]

    [ranks] = load_grid(qwen3[False], tp, 1).values()
    groups, ffn = config.num_query_groups // tp, config.ffn_hidden_size // tp
    width, rows = config.num_attention_heads * config.kv_channels // tp, config.vocab_size // tp
    for rank, parameters in enumerate(ranks):
        expected = []
        for group in range(rank * groups, (rank + 1) * groups):
            expected += [head(q, group * per_group + i) for i in range(per_group)]
            expected += [head(k, group), head(v, group)]
        mine = slice(rank * ffn, (rank + 1) * ffn)
        layer = "decoder.layers.2."
        for name, tensor in {
            layer + "self_attention.linear_qkv.weight": torch.cat(expected),
            layer + "mlp.linear_fc1.weight": torch.cat([gate[mine], up[mine]]),
            layer + "mlp.linear_fc2.weight": down[:, mine],
            layer + "self_attention.linear_proj.weight": out[:, rank * width : (rank + 1) * width],
            "output_layer.weight": weights["lm_head.weight"][rank * rows : (rank + 1) * rows],
        }.items():
            assert torch.equal(parameters[name], tensor), (rank, name)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_the_export(qwen3, tmp_path, tied):
    source, final = qwen3[tied], tmp_path / "exported"
    config = ModelConfig.from_hf(source)
    original = json.loads((source / "config.json").read_text())
    save_grid(load_grid(source, 1, 1), source, start_directory(final), final)
    tokens = torch.arange(20)[None]
    ours, theirs = (tiny.load_reference(path)(tokens).logits for path in (final, source))
    assert torch.equal(ours, theirs)
    for name, content in SIDE_FILES.items():
        assert (final / name).read_text() == content
    assert not (final / "pytorch_model.bin.index.json").exists()
    exported = json.loads((final / "config.json").read_text())
    assert exported == {**original, "dtype": "float32", "torch_dtype": "float32"}
    index = json.loads((final / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * config.num_parameters()
    assert index["weight_map"].keys() == hf_tensor_shapes(config).keys()


def test_bf16_is_rounded_once_and_said(qwen3, tmp_path):
    save_grid(
        load_grid(qwen3[True], 2, 2),
        qwen3[True],
        start_directory(tmp_path / "half"),
        tmp_path / "half",
        dtype=torch.bfloat16,
    )
    reader, weights = HFReader(tmp_path / "half"), load_file(qwen3[True] / "model.safetensors")
    for name in reader.stored:
        assert torch.equal(reader.tensor(name), weights[name].bfloat16()), name
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    [ranks] = load_grid(tmp_path / "half", 2, 1).values()  # a bf16 checkpoint fills fp32 weights
    assert all(t.dtype == torch.float32 for rank in ranks for t in rank.values())


@pytest.mark.parametrize("limit", [1, 50_000, 2 << 30])
def test_shards_keep_to_the_limit(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(export, "MAX_SHARD_BYTES", limit)
    tensors = {f"t{i}": torch.full((10 + i, 100), float(i)) for i in range(30)}
    written = write_weights(tmp_path, tensors.items(), dtype=torch.float32, stage=3)
    files = sorted({file for file, _ in written.values()})
    assert files == [f"model-003-{i:05d}.safetensors" for i in range(len(files))]
    assert len(files) == {1: 30, 50_000: 7, 2 << 30: 1}[limit]
    for file in files:
        held = load_file(tmp_path / file)
        assert sum(t.nbytes for t in held.values()) <= limit or len(held) == 1
        assert all(torch.equal(held[name], tensors[name]) for name in held)
    assert written == {n: (written[n][0], t.nbytes) for n, t in tensors.items()}


def test_random_model_is_seeded_and_loads(qwen3, tmp_path):
    config = ModelConfig.from_hf(qwen3[True])
    for name, seed in (("one", 7), ("again", 7), ("other", 8)):
        write_random(tmp_path / name, config, seed=seed, init_std=0.02, tokenizer=qwen3[True])
    require_equal(tmp_path / "one", tmp_path / "again")
    with pytest.raises(AssertionError):
        require_equal(tmp_path / "one", tmp_path / "other")
    model = tiny.load_reference(tmp_path / "one")
    assert model.num_parameters() == config.num_parameters()
    assert ModelConfig.from_hf(tmp_path / "one") == config
    assert model.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.all(model.model.norm.weight == 1)
    with pytest.raises(OutputError, match="not empty"):
        write_random(tmp_path / "one", config, seed=0, init_std=0.02, tokenizer=qwen3[True])
    with pytest.raises(CheckpointError, match="nowhere: cannot read"):
        write_random(tmp_path / "x", config, seed=0, init_std=1, tokenizer=tmp_path / "nowhere")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["decoder.layers.0.mlp.router.weight", "lm_head.weight", "x"])
def test_unknown_parameter(qwen3, name):
    with pytest.raises(CheckpointError, match=f"no mapping for the parameter {name}"):
        mapping_of(name, ModelConfig.from_hf(qwen3[True]), 0)
