"""Hugging Face -> ranks -> Hugging Face is the identity, and the ranks hold what they should."""

from __future__ import annotations

import functools
import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_replay.checkpoint import export
from megatron_replay.checkpoint.export import write_random, write_weights
from megatron_replay.checkpoint.hf import HFReader, same_bits, stored_tensors
from megatron_replay.checkpoint.model_files import fingerprints, keep_model_files
from megatron_replay.checkpoint.names import hf_tensor_shapes
from megatron_replay.checkpoint.rank_files import RankFile
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
    names = (*(f"self_attn.{x}" for x in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
    q, k, v, out, gate, up, down = (weights[f"model.layers.2.{x}_proj.weight"] for x in names)
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


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_biases_are_beside_their_rows(tmp_path, tp):
    """A bias is filled as the first column of its matrix would be."""
    source = tiny.save_qwen2(tmp_path, tied=True, num_hidden_layers=1)
    weights = load_file(source / "model.safetensors")
    for x in "qkv":
        name = f"model.layers.0.self_attn.{x}_proj"
        weights[f"{name}.weight"][:, 0] = weights[f"{name}.bias"]
    save_file(weights, source / "model.safetensors")
    [ranks] = load_grid(source, tp, 1).values()
    for parameters in ranks:
        weight, bias = (
            parameters[f"decoder.layers.0.self_attention.linear_qkv.{kind}"]
            for kind in ("weight", "bias")
        )
        assert torch.equal(weight[:, 0], bias)


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
    for name in ("pytorch_model.bin.index.json", "README.md"):
        assert not (final / name).exists()
    exported = json.loads((final / "config.json").read_text())
    # transformers 4 reads rope_theta and rope_scaling.
    old = {"rope_theta": original["rope_parameters"]["rope_theta"], "rope_scaling": None}
    assert exported == {**original, **old, "dtype": "float32", "torch_dtype": "float32"}
    index = json.loads((final / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * config.num_parameters()
    assert index["weight_map"].keys() == hf_tensor_shapes(config).keys()


def test_bf16_is_rounded_once_and_said(qwen3, tmp_path):
    half = tmp_path / "half"
    save_grid(
        load_grid(qwen3[True], 2, 2), qwen3[True], start_directory(half), half, dtype=torch.bfloat16
    )
    reader, weights = HFReader(half), load_file(qwen3[True] / "model.safetensors")
    for name in reader.stored:
        assert same_bits(reader.tensor(name), weights[name].bfloat16()), name
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    [ranks] = load_grid(half, 2, 1).values()  # a bf16 checkpoint fills fp32 weights
    assert all(t.dtype == torch.float32 for rank in ranks for t in rank.values())


def test_a_run_keeps_its_models_files_and_no_others(qwen3, tmp_path):
    """Whatever an attempt that was killed left there."""
    (tmp_path / "hf").mkdir()
    for name, content in (("extra.json", "{}"), ("config.json", "half")):
        (tmp_path / "hf" / name).write_text(content)
    keep_model_files(qwen3[True], tmp_path)
    assert fingerprints(tmp_path / "hf") == fingerprints(qwen3[True])
    assert len(fingerprints(tmp_path / "hf")) == len(SIDE_FILES) + 1


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


@pytest.mark.parametrize("spaces", range(4))
def test_offsets_that_no_dtype_divides(tmp_path, spaces):
    path = tmp_path / "x.safetensors"
    table = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    header = json.dumps(table).encode() + b" " * spaces
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"abc" + struct.pack("<2f", 1, -2))
    stored = stored_tensors(path)
    assert stored["b"].mapped().tolist() == [1, -2]
    with pytest.raises(CheckpointError, match=r"wrong dtype of a .*expected F64.*found U8"):
        stored["a"].torch_dtype()
    path.write_bytes(b"shorter")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: cannot read"):
        stored["b"].mapped()


def mapped_kilobytes() -> int:
    """This process's resident pages of mapped files."""
    with open("/proc/self/status") as handle:
        return next(int(line.split()[1]) for line in handle if line.startswith("RssFile"))


@pytest.mark.parametrize("kind", ["safetensors", "rank"])
def test_pages_go_with_the_tensor_and_writing_to_it_leaves_the_file_alone(tmp_path, kind):
    path, ones = tmp_path / "file", torch.ones(4 << 20)
    if kind == "rank":
        torch.save({"model": {"a": ones}}, path)
        read = functools.partial(RankFile(path).__getitem__, "a")
    else:
        save_file({"a": ones}, path)
        read = stored_tensors(path)["a"].mapped
    before = mapped_kilobytes()
    tensor = read()
    assert tensor.sum() == 4 << 20
    assert mapped_kilobytes() > before + 12_000
    tensor[:9] = 0
    del tensor
    assert mapped_kilobytes() < before + 4_000
    assert read()[:9].tolist() == [1] * 9
