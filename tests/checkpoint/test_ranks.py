"""Hugging Face -> files of ranks -> Hugging Face: bit for bit, in every layout, or a clear line."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import signal
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_replay.checkpoint import convert_ranks, export
from megatron_replay.checkpoint.convert_ranks import grid_for, hf_to_ranks, ranks_to_hf
from megatron_replay.checkpoint.load import model_files
from megatron_replay.checkpoint.names import Mapping
from megatron_replay.checkpoint.rank_files import RankFile
from megatron_replay.errors import CheckpointError, ConfigError
from megatron_replay.model.config import ModelConfig
from tests import tiny
from tests.checkpoint.grid import EMBEDDING, HEAD, converted, load_grid
from tests.same_weights import require_equal

Q_NORM = "decoder.layers.0.self_attention.q_layernorm.weight"


def ranks(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    """{folder: parameters}, as anybody with torch reads them."""
    return {
        path.parent.name: torch.load(path, weights_only=True)["model"]
        for path in directory.glob("iter_0000001/*/model_optim_rng.pt")
    }


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


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
    # As Stage 0 and 1 load, which test_round_trip compares head by head.
    grid = load_grid(source, tp, pp, te=te)
    for stage, suffix in enumerate(suffixes):
        for rank, expected in enumerate(grid[stage]):
            found = written[f"mp_rank_{rank:02d}{suffix}"]
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_biases_and_stages_of_unequal_length_return(tmp_path):
    source = tiny.save_qwen2(tmp_path / "model", tied=False, num_hidden_layers=3, vocab_size=97)
    converted(source, tmp_path / "mg", 2, 2)
    first = ranks(tmp_path / "mg")["mp_rank_00_000"]
    assert sum(name.endswith("self_attention.linear_qkv.bias") for name in first) == 2  # of 3
    ranks_to_hf(tmp_path / "mg", tmp_path / "hf")
    require_equal(tmp_path / "hf", source)


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


def test_sources_with_a_listed_head_or_two_dtypes(small, tmp_path):
    """Another converter lost 16 tensors of a tied model that lists its head, without a word.

    Norms may have another dtype than matrices; the tensors of one parameter may not differ.
    """
    source = Path(shutil.copytree(small[True, 96], tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    halves = {n: t if "norm" in n else t.bfloat16() for n, t in tensors.items()}
    save_file(halves, source / "model.safetensors")
    expected = shutil.copytree(source, tmp_path / "expected")
    head = {"lm_head.weight": halves["model.embed_tokens.weight"].clone()}
    save_file(halves | head, source / "model.safetensors")
    converted(source, tmp_path / "mg", 2)
    ranks_to_hf(tmp_path / "mg", tmp_path / "hf")
    require_equal(tmp_path / "hf", expected)
    halves["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(halves, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj.*Give --params-dtype"):
        converted(source, tmp_path / "mg2", 2)


def test_the_config_of_another_model(small, tmp_path):
    """hf/ must be the one that the ranks were written with, unless --hf-cfg-dir replaces it."""
    converted(small[True, 97], tmp_path / "mg")
    with pytest.raises(CheckpointError, match=r"mg\) .*convert_checkpoint\.py"):
        model_files(tmp_path / "mg")  # as a stage's --load
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


def test_verification_finds_what_was_written_wrongly(small, tmp_path, monkeypatch):
    write_rank = convert_ranks.write_rank

    def damaged(path, parameters):
        if path.parent.name == "mp_rank_01":
            parameters["decoder.layers.1.mlp.linear_fc2.weight"][3, 2] += 1e-3
        write_rank(path, parameters)

    with monkeypatch.context() as patch:
        patch.setattr(convert_ranks, "write_rank", damaged)
        with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight reads diff"):
            converted(small[False, 96], tmp_path / "mg", 2)
    assert not (tmp_path / "mg").exists()
    converted(small[False, 96], tmp_path / "mg", 2)
    join = Mapping.join
    monkeypatch.setattr(Mapping, "join", lambda *given: [-tensor for tensor in join(*given)])
    with pytest.raises(CheckpointError, match="reads differently"):
        ranks_to_hf(tmp_path / "mg", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


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


class Bomb:
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
            "bomb": Bomb(tmp_path / "bomb"),
        }
        torch.save(content, path, pickle_protocol=4)
        torch.load(path, weights_only=False)  # it does go off when read carelessly
        (tmp_path / "bomb").rmdir()
    ranks_to_hf(tmp_path / "mg", tmp_path / "hf")
    require_equal(tmp_path / "hf", small[True, 96])
    assert not (tmp_path / "bomb").exists()


def content(change: Callable[[dict], object]) -> Callable[[Path], object]:
    return lambda path: rewrite(path, change)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def add_one(name: str) -> Callable[[Path], object]:
    return content(lambda c: c["model"][name].add_(1))


#: (TP, PP, folder of the file, its damage, what is printed)
DAMAGES: list[tuple[int, int, str, Callable[[Path], object], str]] = [
    (2, 2, "00_000", lambda p: p.write_bytes(p.read_bytes()[:-300]), "truncated, or not a file of"),
    (2, 2, "00_000", lambda p: p.write_bytes(b""), "truncated, or not a file of"),
    (2, 2, "00_000", lambda p: p.write_bytes(pickle.dumps({})), "truncated, or not a file of"),
    (2, 2, "00_000", lambda p: p.unlink(), "cannot read: No such file"),
    (2, 2, "00_000", pipe, "expected a regular file"),
    (2, 2, "00_000", lambda p: shutil.rmtree(p.parent),
     "00_000/model_optim_rng.pt: a rank is missing .*TP 2 x PP 2; found 3"),
    (2, 2, "00_000", lambda p: shutil.copytree(p.parent, p.parent.with_name("mp_rank_00")),
     "are the same rank"),
    (2, 2, "00_000", lambda p: p.parent.rename(p.parent.with_name("mp_rank_00_000_001")),
     "experts are not"),
    (2, 2, "00_000", content(lambda c: c.update(model0=c.pop("model"))), "no plain model .*model0"),
    (2, 2, "00_000", lambda p: torch.save([1], p), "no plain model"),
    (2, 2, "00_000", content(lambda c: c["model"].update(x=torch.ones(2).int())), "x is not a flo"),
    (2, 2, "00_000", content(lambda c: c["model"].update(x=torch.ones(2))), "not part of .*: x$"),
    (2, 2, "00_000", content(lambda c: c["model"].pop(EMBEDDING)), "0 tokens|missing"),
    (2, 2, "00_000", content(lambda c: c["model"].update({Q_NORM: torch.ones(5)})),
     r"wrong shape: .*q_layernorm.* \(expected \(4,\); found \(5,\)\)"),
    (2, 2, "00_000",
     content(lambda c: c["model"].update({k: v.double() for k, v in c["model"].items()})),
     r"dtype of TP rank 0: .* \(expected torch.float64; found torch.float32\)"),
    # The last stage's copy of a tied embedding, and a norm's copies on TP ranks.
    (1, 2, "00_001", add_one(HEAD), f"00_001/.*{HEAD} differs"),
    (2, 1, "01", add_one("decoder.layers.1.input_layernorm.weight"), "01/.*input_.* differs"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(DAMAGES)))
def test_damaged_ranks(small, tmp_path, case):
    tp, pp, rank, change, message = DAMAGES[case]
    converted(small[True, 96], tmp_path / "mg", tp, pp)
    change(tmp_path / "mg" / "iter_0000001" / f"mp_rank_{rank}" / "model_optim_rng.pt")
    with pytest.raises(CheckpointError, match=message):
        ranks_to_hf(tmp_path / "mg", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_flipped_bit_in_any_tensor_of_a_rank_is_refused(small, tmp_path):
    """torch.load has no word for it, and the shapes are right."""
    converted(small[True, 96], tmp_path / "mg", 1)
    [path] = (tmp_path / "mg").rglob("*.pt")
    whole = path.read_bytes()
    refused = 0
    for place in range(1, 20):
        at = place * len(whole) // 20
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << place % 8)]) + whole[at + 1 :])
        try:
            ranks_to_hf(tmp_path / "mg", tmp_path / "hf")
        except CheckpointError as error:
            assert f"{path.name}: " in str(error)  # noqa: PT017 some flips do no harm
            refused += 1
        else:  # between two tensors, where nothing is read
            require_equal(tmp_path / "hf", small[True, 96])
            shutil.rmtree(tmp_path / "hf")
    assert refused > 12


def test_script_modules_are_not_loaded(tmp_path):
    """torch.load hands such files, by what they contain, to TorchScript's reader."""
    path = tmp_path / "model_optim_rng.pt"
    torch.save({"model": {}}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model_optim_rng/constants.pkl", pickle.dumps(()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as outside of tests: it must be an error all the same
        with pytest.raises(CheckpointError, match="TorchScript"):
            RankFile(path)
