"""A Hugging Face directory, looked at before transformers allocates what its config.json says.

The directory is untrusted: its files may be pipes, and its sizes anything. The shapes in the
headers of the weights, which are as long as the files are, decide what is believed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_replay.checkpoint.hf import HFReader
from megatron_replay.errors import CheckpointError
from megatron_replay.files import read_json, require_regular

CONFIG, GENERATION = "config.json", "generation_config.json"
#: Numbers that something is made as often of, while a configuration or a model is made: layers,
#: heads, experts, labels.
_COUNT = re.compile(r"(num|n)_\w+|(en|de)coder_layers")
#: A model may have so many times more numbers than its weights, or fewer (a tied head that is
#: stored too, buffers); quantized ones are packed.
_RATIO, _PACKED_RATIO, _FEW = 2, 16, 1 << 20

Shapes = Mapping[str, list[int]]


def require_model(directory: Path) -> None:
    """Check that a directory holds a model, and that its weights have the sizes of config.json.

    Costs as much as the model's modules without memory, and reads headers only.

    Raises:
        CheckpointError: something is missing, damaged, or no regular file, or the sizes differ.
    """
    require_regular_files(directory)
    if not (directory / CONFIG).is_file():
        raise CheckpointError("no Hugging Face model here", where=directory, expected=CONFIG)
    config = read_json(directory / CONFIG, CheckpointError)
    if (directory / GENERATION).exists():  # transformers takes its defaults for a damaged one
        read_json(directory / GENERATION, CheckpointError)
    try:
        reader = HFReader(directory)
    except RuntimeError as error:  # more than can be mapped
        raise CheckpointError(f"cannot read the weights: {error}", where=directory) from error
    shapes = {name: reader.slice(name).get_shape() for name in reader.names()}
    _require_counts(config, shapes, directory)
    model, is_packed = _without_memory(directory), "quantization_config" in config
    _require_shapes(model, shapes, is_packed, directory)
    if not is_packed:
        _require_dtypes(model, reader)


def require_regular_files(directory: Path) -> None:
    """Raise CheckpointError if a directory that transformers reads holds a pipe or a device."""
    for file in sorted(directory.glob("*")):
        if file.exists() and not file.is_dir():
            require_regular(file, CheckpointError)


def _require_counts(config: Mapping[str, Any], shapes: Shapes, directory: Path) -> None:
    """Raise CheckpointError where config.json counts more than the weights can be."""
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    for name, count in _counts(config):
        most = len(shapes) if "layer" in name else max(largest, len(shapes))
        if count > most:
            raise CheckpointError(
                f"{CONFIG} does not fit the weights",
                where=directory,
                expected=f"{name} of at most {most}, for {len(shapes)} tensors",
                found=count,
            )


def _counts(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _counts(value)
        elif isinstance(value, int) and _COUNT.fullmatch(name):
            yield name, value


def _without_memory(directory: Path) -> torch.nn.Module:
    """The model that config.json describes, on the device that has no memory."""
    try:
        config = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            model: torch.nn.Module = AutoModelForCausalLM.from_config(
                config, trust_remote_code=False
            )
    except Exception as error:  # transformers promises no type here
        raise CheckpointError(
            f"{CONFIG} describes no model: {type(error).__name__}: {error}", where=directory
        ) from error
    return model


def _require_shapes(
    model: torch.nn.Module, shapes: Shapes, is_packed: bool, directory: Path
) -> None:
    for name, tensor in model.state_dict().items():
        if name in shapes and list(tensor.shape) != shapes[name] and not is_packed:
            raise CheckpointError(
                f"{CONFIG} does not fit the weights: {name} has another shape",
                where=directory,
                expected=list(tensor.shape),
                found=shapes[name],
            )
    described = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    stored = sum(math.prod(shape) for shape in shapes.values())
    ratio = _PACKED_RATIO if is_packed else _RATIO
    if not stored / ratio - _FEW <= described <= stored * ratio + _FEW:
        raise CheckpointError(
            f"{CONFIG} does not fit the weights",
            where=directory,
            expected=f"about {described} numbers",
            found=stored,
        )


def _require_dtypes(model: torch.nn.Module, reader: HFReader) -> None:
    """Raise CheckpointError where transformers would cast what is no weight to one."""
    known = model.state_dict()
    for name in sorted(reader.names()):
        if known[name].is_floating_point() if name in known else name.endswith("weight"):
            reader.slice(name).torch_dtype()
