"""Hugging Face -> files of ranks -> Hugging Face: bit for bit, in every layout, or a clear line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_replay.checkpoint import rank_files, restricted_pickle
from megatron_replay.checkpoint.export import require_equal
from megatron_replay.checkpoint.load import model_files
from megatron_replay.checkpoint.stream import grid_for, hf_to_ranks, ranks_to_hf
from megatron_replay.errors import CheckpointError, ConfigError, OutputError
from megatron_replay.model.config import ModelConfig
from tests.checkpoint.grid import load_grid
from tests.checkpoint.rank_models import EMBEDDING, HEAD, converted, ranks, rewrite


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("vocabulary", [96, 97])
@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back_is_the_identity(small, tmp_path, tied, vocabulary, tp, pp):
    source = small[tied, vocabulary]
    te = tp == 2  # the other names
    converted(source, tmp_path / "mg", tp, pp, transformer_engine=te)
    done = ranks_to_hf(tmp_path / "mg", tmp_path / "hf", max_shard_bytes=3000)
    require_equal(tmp_path / "hf", source)
    assert done.num_verified == len(load_file(source / "model.safetensors"))
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    assert (tmp_path / "hf" / "tokenizer.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mg"]
    written = ranks(tmp_path / "mg")
    suffixes = [""] if pp == 1 else ["_000", "_001"]
    assert sorted(written) == sorted(f"mp_rank_{r:02d}{s}" for r in range(tp) for s in suffixes)
    last = written["mp_rank_00" + suffixes[-1]]
    assert (HEAD in last) == (pp > 1 or not tied)
    rows = -(-vocabulary // tp)
    assert len(last[HEAD] if HEAD in last else last[EMBEDDING]) == rows
    if vocabulary == 96:  # the layouts that Stage 0 and 1 load into, made by other code
        grid = load_grid(source, tp, pp, te=te)
        for stage, suffix in enumerate(suffixes):
            for rank, expected in enumerate(grid[stage]):
                found = written[f"mp_rank_{rank:02d}{suffix}"]
                assert found.keys() == expected.keys()
                assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("mapped_bytes", [0, 2000])
def test_files_are_mapped_anew(small, tmp_path, monkeypatch, mapped_bytes):
    loads, load = [], restricted_pickle.load
    monkeypatch.setattr(restricted_pickle, "load", lambda path: (loads.append(path), load(path))[1])
    monkeypatch.setattr(rank_files, "_MAPPED_BYTES", mapped_bytes)
    converted(small[False, 97], tmp_path / "mg", 2, 2)
    ranks_to_hf(tmp_path / "mg", tmp_path / "hf")
    require_equal(tmp_path / "hf", small[False, 97])
    assert len(loads) > 3 * 4 * 2  # opened three times; without a limit that would be all


def test_uneven_stages_and_padding_and_dtype(small, tmp_path):
    source = small[True, 97]
    config = ModelConfig.from_hf(source)
    grid = grid_for(config, tp=2, pp=2, layers=(1, 1), vocabulary_multiple=32)
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
        ({"tp": 3, "pp": 1}, r"--target-tensor-parallel-size: TP does not divide .*heads"),
        ({"tp": 1, "pp": 3}, r"--target-pipeline-parallel-size: PP does not divide"),
        ({"tp": 0, "pp": 1}, r"--target-tensor-parallel-size: not a positive number"),
        ({"tp": 1, "pp": 2, "layers": (2,)}, r"--num-layer-list: .*expected 2 positive.*2 in all"),
        ({"tp": 1, "pp": 2, "layers": (2, 0)}, r"--num-layer-list: .*found 2,0"),
    ],
)
def test_layouts_that_do_not_fit(small, options, message):
    with pytest.raises(ConfigError, match=message):
        grid_for(ModelConfig.from_hf(small[True, 96]), **options)


def test_a_tied_model_with_a_head_of_its_own(small, tmp_path):
    converted(small[True, 96], tmp_path / "mg", 1, 2)
    rewrite(
        tmp_path / "mg" / "iter_0000001" / "mp_rank_00_001" / "model_optim_rng.pt",
        lambda content: content["model"][HEAD].add_(1),
    )
    with pytest.raises(CheckpointError, match=r"ties .*, yet output_layer\.weight differs"):
        ranks_to_hf(tmp_path / "mg", tmp_path / "hf")


def test_a_tied_source_that_lists_its_head(small, tmp_path):
    """The case in which another converter lost 16 tensors silently."""
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
    """Norms of another dtype than matrices stay what they are; within one parameter it is asked."""
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


def test_config_of_another_directory(small, tmp_path):
    converted(small[True, 97], tmp_path / "mg")
    shutil.rmtree(tmp_path / "mg" / "hf")
    with pytest.raises(CheckpointError, match=r"no config\.json.*--hf-cfg-dir"):
        ranks_to_hf(tmp_path / "mg", tmp_path / "hf")
    ranks_to_hf(tmp_path / "mg", tmp_path / "hf", config_directory=small[True, 97])
    require_equal(tmp_path / "hf", small[True, 97])
    with pytest.raises(OutputError, match="not empty"):
        converted(small[True, 96], tmp_path / "hf")
    (tmp_path / "hf" / "notes.md").touch()
    with pytest.raises(OutputError, match=r"did not write, or that were changed .*notes\.md"):
        hf_to_ranks(
            small[True, 96],
            tmp_path / "hf",
            grid_for(ModelConfig.from_hf(small[True, 96]), tp=1, pp=1),
            overwrite=True,
        )


def test_ranks_beside_another_models_config_are_refused(small, tmp_path):
    """The logits would be compared with those of the same wrong config."""
    converted(small[True, 97], tmp_path / "mg")
    config = json.loads((tmp_path / "mg" / "hf" / "config.json").read_text())
    (tmp_path / "mg" / "hf" / "config.json").write_text(json.dumps(config | {"rope_theta": 9.0}))
    with pytest.raises(CheckpointError, match=r"not the config\.json that the checkpoint"):
        ranks_to_hf(tmp_path / "mg", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    ranks_to_hf(tmp_path / "mg", tmp_path / "hf", config_directory=small[True, 97])


def test_stages_say_how_to_load_ranks(small, tmp_path):
    converted(small[True, 96], tmp_path / "mg")
    with pytest.raises(CheckpointError, match=r"mg\) are not loaded .*convert_checkpoint\.py"):
        model_files(tmp_path / "mg")
