"""Directories that are broken, or made to mislead: each is refused with a line that says why."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_replay.checkpoint.hf import INDEX, SINGLE, HFReader, load_hf_weights
from megatron_replay.checkpoint.load import base_fingerprint
from megatron_replay.checkpoint.model_files import differing_files
from megatron_replay.errors import CheckpointError, ConfigError
from megatron_replay.model.config import ModelConfig
from tests import tiny

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
DAMAGED = r"model\.safetensors: truncated, damaged.*found \d+ bytes"


def read(directory: Path) -> None:
    """Everything loading does to a directory before it reads the numbers."""
    config = ModelConfig.from_hf(directory)
    HFReader(directory).check(config)


@pytest.fixture
def single(qwen3, tmp_path) -> Path:
    return Path(shutil.copytree(qwen3[True], tmp_path / "model"))


@pytest.fixture
def sharded(sharded_qwen3, tmp_path) -> Path:
    return Path(shutil.copytree(sharded_qwen3[True], tmp_path / "model"))


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE)


def change_index(directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def shard_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


def test_the_untouched_ones_are_accepted(single, sharded_qwen3):
    read(single)
    read(sharded_qwen3[True])
    read(sharded_qwen3[False])
    change_tensors(single, lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    read(single)  # a tied model may have an equal head
    names = load_file(single / SINGLE).keys()
    (single / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE)}))
    read(single)  # an index may list a single file under its plain name


def test_no_directory_and_no_weights(single, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere/config\.json: cannot read: No such file"):
        read(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="nowhere: no weights here"):
        HFReader(tmp_path / "nowhere")
    (single / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=r"no weights here \(expected model\.safetensors or"):
        read(single)
    (single / SINGLE).mkdir()
    with pytest.raises(CheckpointError, match="expected a regular file; found a directory"):
        read(single)


def test_fingerprint_needs_config_and_names_the_file_that_differs(sharded):
    before = base_fingerprint(sharded)
    assert base_fingerprint(sharded) == before
    for path in (sharded / "config.json", *shard_files(sharded)):
        content = path.read_bytes()
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1, content[-1]]))
        assert differing_files(before, base_fingerprint(sharded)) == path.name
        path.write_bytes(content)
    (sharded / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot read: No such file"):
        base_fingerprint(sharded)


def rewrite_header(path: Path, change: Callable[[dict], object], length: int | None = None) -> None:
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    table = json.loads(content[8 : 8 + size])
    change(table)
    header = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", length or len(header)) + header + content[8 + size :])


def set_offsets(*offsets: float) -> Callable[[dict], object]:
    return lambda table: table[NORM].update(data_offsets=list(offsets))


HEADER_LIES: dict[str, Callable[[dict], object]] = {
    "offsets beyond the file": set_offsets(0, 10**12),
    "offsets as infinity": set_offsets(0, float("inf")),
    "offsets backwards": set_offsets(256, 0),
    "offsets negative": set_offsets(-4, 256),
    "offsets overlapping": set_offsets(0, 256),
    "offsets missing": lambda table: table[NORM].pop("data_offsets"),
    "shape and size disagree": lambda table: table[NORM].update(shape=[65]),
    "unknown dtype": lambda table: table[NORM].update(dtype="F31"),
    "entry is a list": lambda table: table.update({NORM: [1]}),
    "shorter than the file": lambda table: table.pop(list(table)[-1]),
}


@pytest.mark.parametrize("lie", HEADER_LIES)
def test_lying_header(single, lie):
    rewrite_header(single / SINGLE, HEADER_LIES[lie])
    with pytest.raises(CheckpointError, match=DAMAGED):
        read(single)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 100_000_001, 10_000_000, 3])
def test_header_of_another_length(single, length):
    rewrite_header(single / SINGLE, lambda table: None, length)
    with pytest.raises(CheckpointError, match=DAMAGED):
        read(single)


@pytest.mark.parametrize(
    "header", [b"", b"[]", b"7", b"\xff\xfe", b"[" * 100_000, b'{"a": {}}', b'{"a": 1e999}']
)
def test_garbage_header(single, header):
    (single / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match=DAMAGED):
        read(single)


def test_other_content_under_the_name_of_weights(single):
    content = (single / SINGLE).read_bytes()
    for other in (content + b"more", b"", content[:7], content[:10_000], content[:-1]):
        (single / SINGLE).write_bytes(other)
        with pytest.raises(CheckpointError, match=DAMAGED):
            read(single)
    torch.save({"a": torch.ones(3)}, single / SINGLE)  # a pickle
    with pytest.raises(CheckpointError, match=DAMAGED):
        read(single)
    (single / SINGLE).write_bytes(content)
    rewrite_header(single / SINGLE, lambda table: table[NORM].update(dtype="I32"))
    with pytest.raises(CheckpointError, match=f"wrong dtype of {NORM} .*expected F64.*found I32"):
        read(single)


INDEX_LIES: dict[str, tuple[Callable[[dict[str, str]], object], str]] = {
    "missing file": (lambda m: m.update({NORM: "model-9.safetensors"}), "a file that is not there"),
    "parent": (lambda m: m.update({NORM: "../model.safetensors"}), r"unsafe shard name .*'\.\./"),
    "absolute": (lambda m: m.update({NORM: "/etc/passwd"}), "unsafe shard name .*'/etc/passwd'"),
    "nested": (lambda m: m.update({NORM: "a/b.safetensors"}), "unsafe shard name"),
    "dots": (lambda m: m.update({NORM: ".."}), "unsafe shard name"),
    "itself": (lambda m: m.update({NORM: "."}), "unsafe shard name"),
    "no name": (lambda m: m.update({NORM: ""}), "unsafe shard name"),
    "no string": (lambda m: m.update({NORM: None}), "a file that is not there"),
    "zero byte": (lambda m: m.update({NORM: "a\0b"}), "a file that is not there"),
    "endless name": (lambda m: m.update({NORM: "a" * 5000}), "a file that is not there"),
    "not weights": (lambda m: m.update({NORM: "config.json"}), "not a safetensors"),
    "another shard": (
        lambda m: m.update({EMBEDDING: m[NORM]} if m[NORM] != m[EMBEDDING] else {NORM: "?"}),
        "(holds|lacks) a tensor that the index",
    ),
    "unlisted tensor": (lambda m: m.pop(NORM), f"does not list for it: {NORM}"),
    "invented tensor": (lambda m: m.update(extra=m[NORM]), "index lists for it: extra"),
}  # fmt: skip


@pytest.mark.parametrize("lie", INDEX_LIES)
def test_lying_index(sharded, lie):
    change, message = INDEX_LIES[lie]
    change_index(sharded, change)
    with pytest.raises(CheckpointError, match=message):
        read(sharded)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"{}", b'{"weight_map": 3}', b'{"weight_map": ["a"]}', b"\xff", b"[" * 9**5],
)
def test_garbage_index(sharded, text):
    (sharded / INDEX).write_bytes(text)
    with pytest.raises(CheckpointError, match=rf"{INDEX}: (not an index of weights|damaged)"):
        read(sharded)


def test_weights_beside_an_index_of_others_are_ambiguous(sharded):
    """transformers loads the single file, others the index."""
    shutil.copyfile(shard_files(sharded)[0], sharded / SINGLE)
    with pytest.raises(CheckpointError, match="beside an index"):
        read(sharded)


def test_shards_may_be_links(sharded, tmp_path):
    """As in the hub's cache, where a snapshot links to blobs elsewhere."""
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(shard_files(sharded)):
        path.rename(tmp_path / "blobs" / str(number))
        path.symlink_to(tmp_path / "blobs" / str(number))
    read(sharded)
    (tmp_path / "blobs" / "1").unlink()
    with pytest.raises(CheckpointError, match="cannot read: No such file"):
        read(sharded)


TENSOR_CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda t: t.pop(NORM), f"tensors missing: {NORM}$"),
    "many missing": (
        lambda t: [t.pop(n) for n in list(t) if "mlp" in n], "up_proj.weight and 9 more$"
    ),
    "extra": (lambda t: t.update(x=torch.ones(1)), "tensors not part of the model: x$"),
    "bias": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(128)}), "q_proj.bias"
    ),
    "one layer more": (
        lambda t: t.update({"model.layers.4.input_layernorm.weight": torch.ones(64)}),
        r"not part of the model: model\.layers\.4",
    ),
    "wrong shape": (
        lambda t: t.update({NORM: torch.ones(65)}),
        rf"wrong shape of {NORM} \(expected \(64,\); found \(65,\)\)",
    ),
    "transposed": (
        lambda t: t.update({EMBEDDING: t[EMBEDDING].T.contiguous()}), "found \\(64, 512\\)"
    ),
    "another head": (
        lambda t: t.update({HEAD: t[EMBEDDING] + 1}), "lm_head.weight differs from the embedding"
    ),
    "head of another dtype": (
        lambda t: t.update({HEAD: t[EMBEDDING].bfloat16()}), "lm_head.weight differs"
    ),
    "head without embedding": (
        lambda t: t.update({HEAD: t.pop(EMBEDDING)}), f"tensors missing: {EMBEDDING}"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSOR_CHANGES)
def test_wrong_tensors(single, name):
    change, message = TENSOR_CHANGES[name]
    change_tensors(single, change)
    with pytest.raises(CheckpointError, match=message):
        read(single)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 5, "layer_types": None}, "tensors missing"),
        # Refused at once: no table of that many names is made.
        ({"num_hidden_layers": 2**53, "layer_types": None}, rf"expected {2**53} layers"),
        ({"tie_word_embeddings": False}, r"tensors missing: lm_head\.weight"),
    ],
)
def test_config_of_another_model(single, change, message):
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        read(single)


def test_parameters_of_another_shape_and_unknown_tensors(single):
    config, reader = ModelConfig.from_hf(single), HFReader(single)

    def load(parameters, tp=1):
        load_hf_weights(
            parameters.items(), reader, config, tp_rank=0, tp_size=tp, layer_offset=0
        )  # fmt: skip

    with pytest.raises(CheckpointError, match=r"expected \(63,\); found \(64,\)"):
        load({"decoder.final_layernorm.weight": torch.empty(63)})
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.4\."):
        load({"decoder.layers.4.input_layernorm.weight": torch.empty(64)})
    with pytest.raises(ConfigError, match=r"TP does not divide .*attention heads"):
        load({"decoder.final_layernorm.weight": torch.empty(64)}, tp=3)


@pytest.fixture(scope="module")
def smallest(tmp_path_factory) -> Path:
    """A model whose weights take a few kilobytes."""
    return tiny.save_qwen3(
        tmp_path_factory.mktemp("smallest") / "model", tied=True, vocab_size=8, hidden_size=4,
        intermediate_size=4, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=2,
    )  # fmt: skip


def refusal(directory: Path) -> str | None:
    """The line a user reads, or None; any other exception is a failure."""
    try:
        read(directory)
    except (CheckpointError, ConfigError) as error:
        return str(error)
    return None


@pytest.fixture
def copy(smallest, tmp_path) -> Path:
    return Path(shutil.copytree(smallest, tmp_path / "model"))


def test_every_flipped_byte_of_a_header_is_refused_or_harmless(copy):
    """Any of the first 200 bytes, three ways: read well, or CheckpointError, and nothing else."""
    path = copy / SINGLE
    content = path.read_bytes()
    refused = 0
    for place in range(200):
        for flip in (0x01, 0x20, 0xFF):
            damaged = bytearray(content)
            damaged[place] ^= flip
            path.write_bytes(damaged)
            line = refusal(copy)
            assert line is None or str(copy) in line
            refused += line is not None
    assert refused > 500  # what passes is in "__metadata__", or in white space


def test_every_truncation_is_refused(copy):
    content = (copy / SINGLE).read_bytes()
    for cut in range(50):
        (copy / SINGLE).write_bytes(content[: len(content) * cut // 50])
        with pytest.raises(CheckpointError, match=DAMAGED):
            read(copy)


def test_flipped_bytes_of_config_and_index_are_refused_or_harmless(copy):
    """A flipped bit of config.json may give another number, which the tensors' shapes refute."""
    names = load_file(copy / SINGLE).keys()
    (copy / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE)}))
    for path in (copy / "config.json", copy / INDEX):
        content = path.read_bytes()
        for place in range(0, len(content), 3):
            damaged = bytearray(content)
            damaged[place] ^= 0x10
            path.write_bytes(damaged)
            line = refusal(copy)
            assert line is None or any(word in line for word in (str(copy), "divide", "pairs"))
        path.write_bytes(content)
