"""Hugging Face -> files of ranks -> Hugging Face: bit for bit, in every layout, or a clear line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_replay.checkpoint import export
from megatron_replay.checkpoint.convert_ranks import grid_for, hf_to_ranks, ranks_to_hf
from megatron_replay.checkpoint.load import model_files
from megatron_replay.checkpoint.rank_files import RankFile
from megatron_replay.errors import CheckpointError, ConfigError
from megatron_replay.model.config import ModelConfig
from tests.checkpoint.grid import EMBEDDING, HEAD, converted, load_grid, ranks, rewrite
from tests.same_weights import require_equal


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("vocabulary", [96, 97])
@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back_is_the_identity(small, tmp_path, monkeypatch, tied, vocabulary, tp, pp):
    source = small[tied, vocabulary]
    te = tp == 2  # the other names
    converted(source, tmp_path / "mg", tp, pp, transformer_engine=te)
    monkeypatch.setattr(export, "MAX_SHARD_BYTES", 3000)
    ranks_to_hf(tmp_path / "mg", tmp_path / "hf")
    require_equal(tmp_path / "hf", source)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    assert (tmp_path / "hf" / "tokenizer.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mg"]
    written = ranks(tmp_path / "mg")
    suffixes = [""] if pp == 1 else ["_000", "_001"]
    assert sorted(written) == sorted(f"mp_rank_{r:02d}{s}" for r in range(tp) for s in suffixes)
    last = written["mp_rank_00" + suffixes[-1]]
    assert (HEAD in last) == (pp > 1 or not tied)
    assert len(last[HEAD] if HEAD in last else last[EMBEDDING]) == -(-vocabulary // tp)
    if vocabulary == 96:  # as Stage 0 and 1 load, which test_round_trip compares head by head
        grid = load_grid(source, tp, pp, te=te)
        for stage, suffix in enumerate(suffixes):
            for rank, expected in enumerate(grid[stage]):
                found = written[f"mp_rank_{rank:02d}{suffix}"]
                assert found.keys() == expected.keys()
                assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_uneven_stages_and_padding_and_dtype(small, tmp_path):
    source = small[True, 97]
    grid = grid_for(ModelConfig.from_hf(source), tp=2, pp=2, layers=(1, 1), vocabulary_multiple=32)
    assert grid.vocabulary == 128
    hf_to_ranks(source, tmp_path / "mg", grid, dtype=torch.bfloat16)
    embedding = torch.cat([ranks(tmp_path / "mg")[f"mp_rank_0{r}_000"][EMBEDDING] for r in (0, 1)])
    assert embedding.dtype == torch.bfloat16
    assert not embedding[97:].any()
    ranks_to_hf(tmp_path / "mg", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    theirs = load_file(source / "model.safetensors")
    name = "model.embed_tokens.weight"
    [file] = (tmp_path / "hf").glob("model-000-*.safetensors")
    assert torch.equal(load_file(file)[name], theirs[name].bfloat16())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp": 3, "pp": 1}, r"--target-tensor-parallel-size: .*heads"),
        ({"tp": 1, "pp": 3}, r"--target-pipeline-parallel-size: "),
        ({"tp": 1, "pp": 2, "layers": (2,)}, r"--num-layer-list: .*expected 2 positive.*2 in all"),
        ({"tp": 1, "pp": 2, "layers": (2, 0)}, r"--num-layer-list: .*found 2,0"),
    ],
)
def test_layouts_that_do_not_fit(small, options, message):
    with pytest.raises(ConfigError, match=message):
        grid_for(ModelConfig.from_hf(small[True, 96]), **options)


@pytest.mark.parametrize(
    ("tp", "pp", "rank", "name"),
    [
        (1, 2, "mp_rank_00_001", HEAD),  # the last stage's copy of a tied embedding
        (2, 1, "mp_rank_01", "decoder.layers.1.input_layernorm.weight"),
    ],
)
def test_copies_that_differ(small, tmp_path, tp, pp, rank, name):
    converted(small[True, 96], tmp_path / "mg", tp, pp)
    path = tmp_path / "mg" / "iter_0000001" / rank / "model_optim_rng.pt"
    rewrite(path, lambda content: content["model"][name].add_(1))
    with pytest.raises(CheckpointError, match=rf"{rank}/.*{name} differs"):
        ranks_to_hf(tmp_path / "mg", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_tied_source_that_lists_its_head(small, tmp_path):
    """Another converter lost 16 tensors silently in this case."""
    source = Path(shutil.copytree(small[True, 96], tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    converted(source, tmp_path / "mg", 2)
    ranks_to_hf(tmp_path / "mg", tmp_path / "hf")
    require_equal(tmp_path / "hf", small[True, 96])


def test_a_source_of_two_dtypes(small, tmp_path):
    """Norms may have another dtype than matrices; the tensors of one parameter may not differ."""
    source = Path(shutil.copytree(small[True, 96], tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    halves = {n: t if "norm" in n else t.bfloat16() for n, t in tensors.items()}
    save_file(halves, source / "model.safetensors")
    converted(source, tmp_path / "mg", 2)
    ranks_to_hf(tmp_path / "mg", tmp_path / "hf")
    require_equal(tmp_path / "hf", source)
    halves["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(halves, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj.*Give --params-dtype"):
        converted(source, tmp_path / "mg2", 2)


def test_the_config_of_another_model(small, tmp_path):
    """hf/ must be the one that the ranks were written with, unless --hf-cfg-dir replaces it."""
    converted(small[True, 97], tmp_path / "mg")
    path = tmp_path / "mg" / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 9.0}))
    with pytest.raises(CheckpointError, match=r"not the config\.json that the checkpoint"):
        ranks_to_hf(tmp_path / "mg", tmp_path / "hf")
    shutil.rmtree(tmp_path / "mg" / "hf")
    with pytest.raises(CheckpointError, match=r"no config\.json.*--hf-cfg-dir"):
        ranks_to_hf(tmp_path / "mg", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    ranks_to_hf(tmp_path / "mg", tmp_path / "hf", config_directory=small[True, 97])
    require_equal(tmp_path / "hf", small[True, 97])


def test_stages_say_how_to_load_ranks(small, tmp_path):
    converted(small[True, 96], tmp_path / "mg")
    with pytest.raises(CheckpointError, match=r"mg\) .*convert_checkpoint\.py"):
        model_files(tmp_path / "mg")


def test_pages_of_a_rank_file_go_with_the_tensor(tmp_path, mapped_kilobytes):
    torch.save({"model": {"a": torch.ones(4 << 20)}}, tmp_path / "model_optim_rng.pt")
    file = RankFile(tmp_path / "model_optim_rng.pt")
    before = mapped_kilobytes()
    view = file["a"]
    assert view.sum() == 4 << 20
    assert mapped_kilobytes() > before + 12_000
    del view
    assert mapped_kilobytes() < before + 4_000
