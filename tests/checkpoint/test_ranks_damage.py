"""Damaged and hostile files of ranks, wrong conversions, a full disk, a kill."""

from __future__ import annotations

import argparse
import functools
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

from megatron_replay.checkpoint import convert_ranks, rank_files
from megatron_replay.checkpoint.convert_ranks import ranks_to_hf
from megatron_replay.checkpoint.names import Split
from megatron_replay.errors import CheckpointError, OutputError
from tests.checkpoint.deaths import is_killed_at
from tests.checkpoint.grid import EMBEDDING, converted, rewrite
from tests.same_weights import require_equal


def test_verification_finds_what_was_written_wrongly(small, tmp_path, monkeypatch):
    write_rank = convert_ranks.write_rank

    def damaged(path, parameters, iteration):
        if path.parent.name == "mp_rank_01":
            parameters["decoder.layers.1.mlp.linear_fc2.weight"][3, 2] += 1e-3
        write_rank(path, parameters, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(convert_ranks, "write_rank", damaged)
        with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight reads diff"):
            converted(small[False, 96], tmp_path / "mg", 2)
    assert not (tmp_path / "mg").exists()
    converted(small[False, 96], tmp_path / "mg", 2)
    monkeypatch.setattr(Split, "join", lambda self, shards: [-torch.cat(list(shards), self.dim)])
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
        lambda p: p.parent.rename(p.parent.with_name("mp_rank_00_000_001")), "experts are not"
    ),
    "virtual": (
        lambda p: rewrite(p, lambda c: c.update(model0=c.pop("model"))), "no plain model .*model0"
    ),
    "a list": (lambda p: torch.save([1], p), "no plain model"),
    "integers": (
        lambda p: rewrite(p, lambda c: c["model"].update(x=torch.ones(2).int())), "x is not a float"
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
        r"wrong shape: .*q_layernorm.* \(expected \(4,\); found \(5,\)\)",
    ),
    "dtype": (
        lambda p: rewrite(
            p, lambda c: c["model"].update({k: v.double() for k, v in c["model"].items()})
        ),
        r"dtype of TP rank 0: .* \(expected torch.float64; found torch.float32\)",
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
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="expected a regular file"):
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


def test_full_disk(small, tmp_path, monkeypatch):
    """/dev/full takes no byte; nothing is left under the name."""
    full = functools.partial(open, "/dev/full")
    monkeypatch.setattr(convert_ranks, "open", lambda _, mode: full(mode), raising=False)
    with pytest.raises(OutputError, match=r"model_optim_rng\.pt: no space left on the device"):
        converted(small[True, 96], tmp_path / "mg")
    assert not (tmp_path / "mg").exists()


def test_killed_at_each_step(small, tmp_path):
    deaths = complete = 0
    for step in range(1, 100):
        folder = tmp_path / str(step)
        folder.mkdir()
        work = functools.partial(converted, small[True, 96], folder / "mg", 2)
        if not is_killed_at(step, ("os.fsync", "os.replace"), work):
            break
        deaths += 1
        if (folder / "mg").exists():
            complete += 1
            ranks_to_hf(folder / "mg", folder / "hf")
    assert deaths > 8
    assert 0 < complete < 6  # after the rename: the lock goes, the directory is synced
