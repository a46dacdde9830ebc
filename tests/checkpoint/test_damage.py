"""Directories that are broken, or made to mislead: each is refused with a line that says why."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_replay.checkpoint.hf import INDEX, SINGLE, HFReader
from megatron_replay.checkpoint.load import base_fingerprint
from megatron_replay.checkpoint.model_files import differing_files
from megatron_replay.checkpoint.names import mapping_of
from megatron_replay.errors import CheckpointError, ConfigError
from megatron_replay.model.config import ModelConfig
from tests import tiny

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
DAMAGED = r"model\.safetensors: truncated, damaged.*found \d+ bytes"
NO_INDEX = rf"{INDEX}: (not an index of weights|damaged)"
Change = Callable[[Path], object]


def read(directory: Path) -> None:
    """Everything loading does to a directory before it reads the numbers."""
    config = ModelConfig.from_hf(directory)
    HFReader(directory).check(config)


@pytest.fixture
def copies(qwen3, sharded_qwen3, tmp_path) -> Callable[[str], Path]:
    """Makes copies of the tied model: of one file of weights ("single") or several ("sharded")."""
    sources = {"single": qwen3[True], "sharded": sharded_qwen3[True]}
    return lambda kind: Path(shutil.copytree(sources[kind], tmp_path / "model"))


def shard_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def changed(directory: Path) -> None:
        held = load_file(directory / SINGLE)
        change(held)
        save_file(held, directory / SINGLE)

    return changed


def index(change: Callable[[dict[str, Any]], object]) -> Change:
    def changed(directory: Path) -> None:
        content = json.loads((directory / INDEX).read_text())
        change(content["weight_map"])
        (directory / INDEX).write_text(json.dumps(content))

    return changed


def header(change: Callable[[dict], object] = lambda table: None, length: int = 0) -> Change:
    def changed(directory: Path) -> None:
        content = (directory / SINGLE).read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        table = json.loads(content[8 : 8 + size])
        change(table)
        text = json.dumps(table).encode()
        start = struct.pack("<Q", length or len(text))
        (directory / SINGLE).write_bytes(start + text + content[8 + size :])

    return changed


def offsets(*places: float) -> Change:
    return header(lambda table: table[NORM].update(data_offsets=list(places)))


def whole_header(text: bytes) -> Change:
    content = struct.pack("<Q", len(text)) + text
    return lambda directory: (directory / SINGLE).write_bytes(content)


def config(**values: Any) -> Change:
    def changed(directory: Path) -> None:
        content = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(content | values))

    return changed


def lists(file: str | None) -> Change:
    """The index names this file for one tensor."""
    return index(lambda listed: listed.update({NORM: file}))


def cut(stop: int, more: bytes = b"") -> Change:
    return lambda at: (at / SINGLE).write_bytes((at / SINGLE).read_bytes()[:stop] + more)


def empty_folder(directory: Path) -> None:
    (directory / SINGLE).unlink()
    (directory / SINGLE).mkdir()


def lists_another_shard(listed: dict[str, str]) -> None:
    listed.update({EMBEDDING: listed[NORM]} if listed[NORM] != listed[EMBEDDING] else {NORM: "?"})


def link_to_nothing(directory: Path) -> None:
    file = shard_files(directory)[1]
    file.unlink()
    file.symlink_to(directory / "blob")


#: (the copy that is changed, the change, what is printed)
DAMAGES: list[tuple[str, Change, str]] = [
    # files
    ("single", lambda at: shutil.rmtree(at), r"config\.json: cannot read: No such file"),
    ("single", lambda at: (at / SINGLE).unlink(), r"no weights here \(expected model\.safetensors"),
    ("single", empty_folder, "expected a regular file; found a directory"),
    ("single", cut(-1), DAMAGED),
    ("single", cut(10_000), DAMAGED),
    ("single", cut(7), DAMAGED),
    ("single", cut(0), DAMAGED),
    ("single", cut(10**9, b"more"), DAMAGED),
    ("single", lambda at: torch.save({"a": torch.ones(3)}, at / SINGLE), DAMAGED),
    ("sharded", link_to_nothing, "cannot read: No such file"),
    ("sharded", lambda at: shutil.copy(shard_files(at)[0], at / SINGLE), "beside an index"),
    # headers of safetensors
    ("single", offsets(0, 10**12), DAMAGED),
    ("single", offsets(0, float("inf")), DAMAGED),
    ("single", offsets(256, 0), DAMAGED),
    ("single", offsets(-4, 256), DAMAGED),
    ("single", offsets(0, 256), DAMAGED),  # overlapping
    ("single", header(lambda t: t[NORM].pop("data_offsets")), DAMAGED),
    ("single", header(lambda t: t[NORM].update(shape=[65])), DAMAGED),
    ("single", header(lambda t: t[NORM].update(dtype="F31")), DAMAGED),
    ("single", header(lambda t: t.update({NORM: [1]})), DAMAGED),
    ("single", header(lambda t: t.pop(list(t)[-1])), DAMAGED),
    ("single", header(lambda t: t[NORM].update(dtype="I32")),
     f"wrong dtype of {NORM} .*expected F64.*found I32"),
    *[("single", header(length=n), DAMAGED) for n in (2**64 - 1, 2**63, 100_000_001, 10**7, 3)],
    *[("single", whole_header(text), DAMAGED)
      for text in (b"", b"[]", b"7", b"\xff\xfe", b"[" * 100_000, b'{"a": {}}', b'{"a": 1e999}')],
    # the index
    *[("sharded", lambda at, text=text: (at / INDEX).write_bytes(text), NO_INDEX)
      for text in (b"", b"{", b"[]", b"{}", b'{"weight_map": 3}', b'{"weight_map": ["a"]}',
                   b"\xff", b"[" * 9**5)],
    *[("sharded", lists(file), f"unsafe shard name .*{file!r}")
      for file in ("../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "")],
    *[("sharded", lists(file), "a file that is not there")
      for file in ("model-9.safetensors", None, "a\0b", "a" * 5000)],
    ("sharded", lists("config.json"), "not a safetensors"),
    ("sharded", index(lists_another_shard), "(holds|lacks) a tensor that the index"),
    ("sharded", index(lambda m: m.pop(NORM)), f"does not list for it: {NORM}"),
    ("sharded", index(lambda m: m.update(extra=m[NORM])), "index lists for it: extra"),
    # tensors
    ("single", tensors(lambda t: t.pop(NORM)), f"tensors missing: {NORM}$"),
    ("single", tensors(lambda t: [t.pop(n) for n in list(t) if "mlp" in n]), "weight and 9 more$"),
    ("single", tensors(lambda t: t.update(x=torch.ones(1))), "not part of the model: x$"),
    ("single", tensors(lambda t: t.update({"model.layers.4.input_layernorm.weight": t[NORM] + 1})),
     r"not part of the model: model\.layers\.4"),
    ("single", tensors(lambda t: t.update({NORM: torch.ones(65)})),
     rf"wrong shape of {NORM} \(expected \(64,\); found \(65,\)\)"),
    ("single", tensors(lambda t: t.update({EMBEDDING: t[EMBEDDING].T.contiguous()})),
     r"found \(64, 512\)"),
    ("single", tensors(lambda t: t.update({HEAD: t[EMBEDDING] + 1})),
     r"lm_head\.weight differs from the embedding"),
    ("single", tensors(lambda t: t.update({HEAD: t[EMBEDDING].bfloat16()})), "weight differs"),
    ("single", tensors(lambda t: t.update({HEAD: t.pop(EMBEDDING)})), f"missing: {EMBEDDING}"),
    # config.json
    *[("single", lambda at, text=text: (at / "config.json").write_bytes(text),
       r"config\.json: damaged: n(ot|o) (JSON|UTF-8)")
      for text in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 1' + b"0" * 5000 + b"}", b"[]")],
    ("single", config(num_hidden_layers=5, layer_types=None), "tensors missing"),
    # Refused at once: no table of that many names is made.
    ("single", config(num_hidden_layers=2**53, layer_types=None), rf"expected {2**53} layers"),
    ("single", config(tie_word_embeddings=False), r"tensors missing: lm_head\.weight"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(DAMAGES)))
def test_damage(copies, case):
    kind, change, message = DAMAGES[case]
    directory = copies(kind)
    change(directory)
    with pytest.raises(CheckpointError, match=message):
        read(directory)


def test_what_is_accepted(copies, sharded_qwen3, tmp_path):
    for directory in sharded_qwen3.values():
        read(directory)
    sharded = copies("sharded")
    for path in shard_files(sharded):  # the hub's cache links to blobs elsewhere
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    read(sharded)
    shutil.rmtree(sharded)
    single = copies("single")
    read(single)
    tensors(lambda t: t.update({HEAD: t[EMBEDDING].clone()}))(single)
    read(single)  # a tied model may have an equal head
    listed = dict.fromkeys(load_file(single / SINGLE), SINGLE)
    (single / INDEX).write_text(json.dumps({"weight_map": listed}))
    read(single)  # an index may list a single file under its plain name


def test_fingerprint_needs_config_and_names_the_file_that_differs(copies):
    sharded = copies("sharded")
    before = base_fingerprint(sharded)
    for path in (sharded / "config.json", *shard_files(sharded)):
        content = path.read_bytes()
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1, content[-1]]))
        assert differing_files(before, base_fingerprint(sharded)) == path.name
        path.write_bytes(content)
    assert base_fingerprint(sharded) == before
    (sharded / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot read: No such file"):
        base_fingerprint(sharded)


@pytest.mark.parametrize("name", ["decoder.layers.0.mlp.router.weight", "lm_head.weight", "x"])
def test_unknown_parameter(qwen3, name):
    with pytest.raises(CheckpointError, match=f"no mapping for the parameter {name}"):
        mapping_of(name, ModelConfig.from_hf(qwen3[True]), 0)


@pytest.fixture
def smallest(tmp_path) -> Path:
    """A model whose weights take a few kilobytes."""
    return tiny.save_qwen3(
        tmp_path / "model", tied=True, vocab_size=8, hidden_size=4, intermediate_size=4,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=2,
    )  # fmt: skip


def test_flipped_bytes_are_refused_or_harmless(smallest):
    """Read well, or one line, and nothing else.

    Of a header, what passes is in "__metadata__", or in white space; of config.json, another
    number, which the tensors' shapes refute.
    """
    names = load_file(smallest / SINGLE).keys()
    (smallest / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE)}))
    for file, flips in ((SINGLE, (0x01, 0x20, 0xFF)), ("config.json", (0x10,)), (INDEX, (0x10,))):
        content, refused = (smallest / file).read_bytes(), 0
        for place in range(200) if file == SINGLE else range(0, len(content), 3):
            for flip in flips:
                damaged = bytearray(content)
                damaged[place] ^= flip
                (smallest / file).write_bytes(damaged)
                try:
                    read(smallest)
                except (CheckpointError, ConfigError) as error:
                    assert any(word in str(error) for word in (str(smallest), "divide", "pairs"))  # noqa: PT017
                    refused += 1
        assert refused > (500 if file == SINGLE else 50)
        (smallest / file).write_bytes(content)


def test_every_truncation_is_refused(smallest):
    content = (smallest / SINGLE).read_bytes()
    for part in range(50):
        (smallest / SINGLE).write_bytes(content[: len(content) * part // 50])
        with pytest.raises(CheckpointError, match=DAMAGED):
            read(smallest)
