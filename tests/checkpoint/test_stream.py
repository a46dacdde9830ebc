"""Hugging Face -> files of ranks -> Hugging Face: bit for bit, in every layout, or a clear line."""

from __future__ import annotations

import argparse
import functools
import json
import os
import pickle
import shutil
import signal
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_replay.checkpoint import compare, rank_files, restricted_pickle, stream
from megatron_replay.checkpoint.export import require_equal
from megatron_replay.checkpoint.load import model_files
from megatron_replay.checkpoint.names import Layout, QueryKeyValue, mapping_of
from megatron_replay.checkpoint.stream import grid_for, hf_to_ranks, ranks_to_hf
from megatron_replay.errors import CheckpointError, ConfigError, OutputError
from megatron_replay.model.config import ModelConfig
from tests import tiny
from tests.checkpoint.grid import load_grid
from tests.store.test_kill import fork

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict[tuple[bool, int], Path]:
    """Tied and untied, of a vocabulary that TP divides and of one that it does not; in shards."""
    folder, models = tmp_path_factory.mktemp("small"), {}
    for tied in (True, False):
        for vocabulary in (96, 97):
            name = folder / f"{tied}-{vocabulary}"
            models[tied, vocabulary] = tiny.save_qwen3(
                name, tied=tied, vocab_size=vocabulary, hidden_size=16, intermediate_size=24,
                num_hidden_layers=2, head_dim=4,
            )  # fmt: skip
            (name / "tokenizer.json").write_text("{}")
    return models


def ranks(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    """{folder: parameters}, as anybody with torch reads them."""
    return {
        path.parent.name: torch.load(path, weights_only=True)["model"]
        for path in directory.glob("iter_0000001/*/model_optim_rng.pt")
    }


def rewrite(path: Path, change) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def converted(source: Path, target: Path, tp: int = 1, pp: int = 1, **options) -> Path:
    hf_to_ranks(source, target, grid_for(ModelConfig.from_hf(source), tp=tp, pp=pp, **options))
    return target


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


def _swapped_key_and_value(self, shard, size):
    grouped = shard.view(self.groups // size, -1, self.channels, shard.shape[-1])
    return grouped[:, :-2], grouped[:, -1:], grouped[:, -2:-1]


def test_verification_finds_a_wrong_mapping(small, tmp_path, monkeypatch):
    """The mapping both ways is broken alike: only a comparison of another make can tell."""
    monkeypatch.setattr(QueryKeyValue, "places", _swapped_key_and_value)
    with pytest.raises(CheckpointError, match=r"linear_qkv\.weight differs from .*k_proj"):
        converted(small[True, 96], tmp_path / "mg", 2)
    assert not (tmp_path / "mg").exists()


def test_verification_finds_damage_of_what_was_written(small, tmp_path, monkeypatch):
    def damaged(path, parameters, iteration):
        if path.parent.name == "mp_rank_01":
            parameters["decoder.layers.1.mlp.linear_fc2.weight"][3, 2] += 1e-3
        write(path, parameters, iteration)

    write = rank_files.write_rank
    monkeypatch.setattr(stream, "write_rank", damaged)
    with pytest.raises(CheckpointError, match=r"mp_rank_01/.*linear_fc2\.weight differs"):
        converted(small[False, 96], tmp_path / "mg", 2)
    monkeypatch.undo()
    converted(small[False, 96], tmp_path / "mg", 2)
    join = Layout.__subclasses__()[1].join
    monkeypatch.setattr(
        type(mapping_of(EMBEDDING, ModelConfig.from_hf(small[False, 96]), 0).layout),
        "join",
        lambda self, shards: [part.neg() for part in join(self, shards)],
    )
    with pytest.raises(CheckpointError, match="differs from"):
        ranks_to_hf(tmp_path / "mg", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_verification_insists_on_every_number(small, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "_is_surplus", lambda name, config: "k_proj" in name)
    with pytest.raises(CheckpointError, match=r"not every number of this file was compared"):
        converted(small[False, 96], tmp_path / "mg", 2)


def test_verification_finds_padding_that_is_not_zero(small, tmp_path, monkeypatch):
    fill = stream._fill_rows
    monkeypatch.setattr(stream, "_fill_rows", lambda shard, *rest: fill(shard.fill_(1), *rest))
    monkeypatch.setattr(torch.Tensor, "zero_", lambda self: self)
    with pytest.raises(CheckpointError, match=r"mp_rank_03/.*: embedding\..* padding is not zero"):
        converted(small[True, 97], tmp_path / "mg", 4)


def test_everything_is_synced(small, tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.add(Path(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd))
    )
    staged = tmp_path / ".mg.incomplete"
    converted(small[True, 96], tmp_path / "mg", 2)
    written = [path.relative_to(tmp_path / "mg") for path in (tmp_path / "mg").rglob("*")]
    kept = [path for path in written if path.parts[0].startswith("iter")]
    assert len(kept) == 5
    assert {staged, tmp_path, *(staged / path for path in kept)} <= synced


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_training_files_are_read_and_nothing_in_them_is_run(small, tmp_path):
    """As MindSpeed-LLM writes: protocol 4, with arguments, random states, and worse, beside."""
    converted(small[True, 96], tmp_path / "mg", 2)
    for path in (tmp_path / "mg").glob("iter_0000001/*/model_optim_rng.pt"):
        content = torch.load(path, weights_only=True)
        content["model"] = OrderedDict(content["model"])
        content["model"]["decoder.layers.0.mlp.linear_fc1._extra_state"] = None
        content |= {
            "args": argparse.Namespace(dtype=torch.bfloat16, signal=signal.SIGTERM, path=tmp_path),
            "rng_state": [{"np": np.random.get_state(), "set": {1, 2}}],
            "bomb": _Bomb(tmp_path / "bomb"),
        }
        torch.save(content, path, pickle_protocol=4)
        torch.load(path, weights_only=False)  # it does go off when read carelessly
        (tmp_path / "bomb").rmdir()
    ranks_to_hf(tmp_path / "mg", tmp_path / "hf")
    require_equal(tmp_path / "hf", small[True, 96])
    assert not (tmp_path / "bomb").exists()


FILES: dict[str, tuple] = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-300]), "truncated, or not a file of"),
    "empty": (lambda p: p.write_bytes(b""), "truncated, or not a file of"),
    "no zip": (lambda p: p.write_bytes(pickle.dumps({})), "truncated, or not a file of"),
    "gone": (lambda p: p.unlink(), "cannot read: No such file"),
    "rank gone": (lambda p: shutil.rmtree(p.parent), "a rank is missing .*TP 2 x PP 2; found 3"),
    "twice": (
        lambda p: shutil.copytree(p.parent, p.parent.with_name("mp_rank_00")), "are the same rank"
    ),
    "experts": (
        lambda p: p.parent.rename(p.parent.with_name("mp_rank_00_000_001")), "Experts are not"
    ),
    "virtual": (
        lambda p: rewrite(p, lambda c: c.update(model0=c.pop("model"))), "no plain model .*model0"
    ),
    "a list": (lambda p: torch.save([1], p), "no plain model"),
    "integers": (
        lambda p: rewrite(p, lambda c: c["model"].update(x=torch.ones(2).int())), "x is no floating"
    ),
    "extra": (
        lambda p: rewrite(p, lambda c: c["model"].update(x=torch.ones(2))), "not part of .*: x$"
    ),
    "missing": (lambda p: rewrite(p, lambda c: c["model"].pop(EMBEDDING)), "0 tokens|missing"),
    "shape": (
        lambda p: rewrite(
            p,
            lambda c: c["model"].update(
                {"decoder.layers.0.self_attention.q_layernorm.weight": torch.ones(5)}
            ),
        ),
        r"wrong shape of .*q_layernorm.* \(expected \(4,\); found \(5,\)\)",
    ),
    "dtype": (
        lambda p: rewrite(
            p, lambda c: c["model"].update({k: v.double() for k, v in c["model"].items()})
        ),
        "another dtype than on TP rank 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_damaged_ranks(small, tmp_path, case):
    converted(small[True, 96], tmp_path / "mg", 2, 2)
    change, message = FILES[case]
    change(tmp_path / "mg" / "iter_0000001" / "mp_rank_00_000" / "model_optim_rng.pt")
    with pytest.raises(CheckpointError, match=message):
        ranks_to_hf(tmp_path / "mg", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_script_modules_are_not_loaded(tmp_path):
    """torch.load hands such files, by what they contain, to TorchScript's reader."""
    path = tmp_path / "model_optim_rng.pt"
    torch.save({"model": {}}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model_optim_rng/constants.pkl", pickle.dumps(()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as outside of tests: it must be an error all the same
        with pytest.raises(CheckpointError, match="TorchScript"):
            rank_files.RankFile(path)


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
    with pytest.raises(OutputError, match="something else than what would replace it"):
        hf_to_ranks(
            small[True, 96],
            tmp_path / "hf",
            grid_for(ModelConfig.from_hf(small[True, 96]), tp=1, pp=1),
            overwrite=True,
        )


def test_full_disk(small, tmp_path, monkeypatch):
    """/dev/full takes no byte; nothing is left under the name."""
    full = functools.partial(open, "/dev/full")
    monkeypatch.setattr(rank_files, "open", lambda _, mode: full(mode), raising=False)
    with pytest.raises(OutputError, match=r"model_optim_rng\.pt: no space left on the device"):
        converted(small[True, 96], tmp_path / "mg")
    assert not (tmp_path / "mg").exists()


def _die_at(step: int, source: Path, target: Path) -> None:
    taken = 0

    def mortal(call):
        def counted(*arguments, **options):
            nonlocal taken
            taken += 1
            if taken == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return counted

    for name in ("fsync", "replace"):
        setattr(os, name, mortal(getattr(os, name)))
    converted(source, target, 2)


def test_killed_at_each_step(small, tmp_path):
    deaths = complete = 0
    for step in range(1, 100):
        folder = tmp_path / str(step)
        folder.mkdir()
        child = fork(lambda step=step, to=folder: _die_at(step, small[True, 96], to / "mg"))
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        deaths += 1
        if (folder / "mg").exists():
            complete += 1
            ranks_to_hf(folder / "mg", folder / "hf")
    assert deaths > 8
    assert complete == 1  # only the last fsync comes after the rename


def test_stages_say_how_to_load_ranks(small, tmp_path):
    converted(small[True, 96], tmp_path / "mg")
    with pytest.raises(CheckpointError, match=r"mg\) are not loaded .*convert_checkpoint\.py"):
        model_files(tmp_path / "mg")
