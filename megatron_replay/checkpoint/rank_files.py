"""Megatron's oldest layout: a pickle a rank, as MindSpeed-LLM's converter and scripts have it.

::

    latest_checkpointed_iteration.txt
    iter_0000001/mp_rank_00/model_optim_rng.pt         TP rank 0
    iter_0000001/mp_rank_03_001/model_optim_rng.pt     TP rank 3, pipeline stage 1
    hf/                                                config.json and tokenizer; ours only

A file holds {"model": {parameter: tensor}, "checkpoint_version": 3.0, "iteration": 1}, and what
training adds. Parameters have megatron-core's names, layers count from 0 in each stage. Files are
read with ``restricted_pickle``.
"""

from __future__ import annotations

import errno
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_replay.checkpoint import restricted_pickle
from megatron_replay.checkpoint.names import hf_tensor_shapes, mapping_of
from megatron_replay.errors import CheckpointError, OutputError, few
from megatron_replay.files import output_error, require_regular
from megatron_replay.model.config import ModelConfig

FILE = "model_optim_rng.pt"
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")
_LOCAL_NORMS = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
_TE_NORMS = (
    "self_attention.linear_qkv.layer_norm_weight",
    "mlp.linear_fc1.layer_norm_weight",
)
#: Pages that all files' tensors may fill before one is mapped anew, which lets go of its own.
_MAPPED_BYTES = 256 << 20


@dataclass(frozen=True)
class Grid:
    """How a checkpoint is cut.

    Attributes:
        tp: tensor parallel ranks.
        layers: of each pipeline stage.
        vocabulary: rows of the embedding over all ranks, padding included.
        transformer_engine: whether norms have TransformerEngine's names.
    """

    tp: int
    layers: tuple[int, ...]
    vocabulary: int
    transformer_engine: bool = False

    @property
    def pp(self) -> int:
        """Pipeline stages."""
        return len(self.layers)

    def offset(self, stage: int) -> int:
        """Global number of a stage's first layer."""
        return sum(self.layers[:stage])

    def file(self, stage: int, rank: int) -> str:
        """A rank's file, relative to the iteration."""
        suffix = f"_{stage:03d}" if self.pp > 1 else ""
        return f"mp_rank_{rank:02d}{suffix}/{FILE}"

    def parameters(self, config: ModelConfig, stage: int) -> Iterator[str]:
        """Names of a stage's parameters, in the model's order."""
        if stage == 0:
            yield VOCABULARY[0]
        before, after = _TE_NORMS if self.transformer_engine else _LOCAL_NORMS
        attention = ["linear_proj", "linear_qkv"]
        attention += ["q_layernorm", "k_layernorm"] if config.qk_layernorm else []
        for number in range(self.layers[stage]):
            for name in (
                before,
                *(f"self_attention.{part}.weight" for part in attention),
                after,
                "mlp.linear_fc1.weight",
                "mlp.linear_fc2.weight",
            ):
                yield f"decoder.layers.{number}.{name}"
        if stage == self.pp - 1:
            yield "decoder.final_layernorm.weight"
            if self.pp > 1 or not config.tie_embeddings:
                yield VOCABULARY[1]

    def shard_shape(self, parameter: str, config: ModelConfig) -> tuple[int, ...]:
        """A parameter's shape on each rank."""
        if parameter in VOCABULARY:
            return (self.vocabulary // self.tp, config.hidden_size)
        mapping, shapes = mapping_of(parameter, config, 0), hf_tensor_shapes(config)
        return mapping.layout.shard_shape([_Shape(shapes[name]) for name in mapping.names], self.tp)


class _Shape:
    """A tensor of which only the shape is known."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def __getitem__(self, index: object) -> Tensor:
        raise NotImplementedError


class RankFile:
    """The weights in one rank's file, mapped, and mapped anew after ``mapped_bytes``.

    Raises:
        CheckpointError: the file is missing, damaged, or holds no plain model.
    """

    def __init__(self, path: Path, mapped_bytes: int = _MAPPED_BYTES) -> None:
        self.path, self._mapped_bytes = path, mapped_bytes
        self._touched = 0
        _require_intact(path)
        self._tensors: dict[str, Tensor] | None = self._map()
        self.shapes = {name: tuple(held.shape) for name, held in self._tensors.items()}
        self.dtypes = {name: held.dtype for name, held in self._tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        """A tensor; a view of the file."""
        if self._tensors is None:
            self._tensors, self._touched = self._map(), 0
        tensor = self._tensors[name]
        self._touched += tensor.nbytes
        if self._touched > self._mapped_bytes:
            self._tensors = None  # the mapping goes with the last tensor that somebody holds
        return tensor

    def _map(self) -> dict[str, Tensor]:
        content = self._read()
        model = content.get("model") if isinstance(content, dict) else None
        if not isinstance(model, dict):
            parts = sorted(map(str, content))[:4] if isinstance(content, dict) else []
            raise CheckpointError(
                "the file holds no plain model",
                where=self.path,
                expected="model",
                found=", ".join(parts) or type(content).__name__,
                fix="Virtual pipelines (model0, model1) are not read: merge them with the tool "
                "that wrote them"
                if "model0" in parts
                else None,
            )
        tensors = {}
        for name, value in model.items():
            if str(name).endswith("_extra_state"):  # TransformerEngine's fp8 scales
                continue
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise CheckpointError(f"{name} is no floating-point tensor", where=self.path)
            tensors[str(name)] = value.detach()
        return tensors

    def _read(self) -> Any:
        try:
            return restricted_pickle.load(self.path)
        except Exception as error:  # of damaged zip files and pickles alike, by many names
            raise _unreadable(self.path, error) from error


def _require_intact(path: Path) -> None:
    """Compare the content with the crc32 that torch.save put beside each tensor.

    torch does not, and would load a weight with a flipped bit.
    """
    require_regular(path, CheckpointError)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # of damaged archives, by many names
        raise _unreadable(path, error) from error
    if damaged is not None:
        raise CheckpointError(
            f"damaged: the crc32 of {damaged} differs",
            where=path,
            fix="Copy it again from where it is whole (torch.save leaves out the crc32 only under "
            "torch.serialization.set_crc32_options(False))",
        )


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    # torch seeks in what it takes for an old file of its own, beyond the end of a truncated one.
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        return CheckpointError(f"cannot read: {error.strerror}", where=path)
    return CheckpointError(
        f"truncated, or not a file of torch.save: {_first_line(error)}", where=path
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def open_grid(iteration: Path, config: ModelConfig) -> tuple[Grid, dict[tuple[int, int], RankFile]]:
    """Find and check a checkpoint's files: {(stage, TP rank): file}.

    Raises:
        CheckpointError: a rank is missing, or its tensors are not those of ``config``.
    """
    places = _places(iteration)
    files = {
        place: RankFile(iteration / name / FILE, _MAPPED_BYTES // len(places))
        for place, name in sorted(places.items())
    }
    stages, tp = max(s for s, _ in files) + 1, max(r for _, r in files) + 1
    embedding = files[0, 0].shapes.get(VOCABULARY[0], (0,))
    grid = Grid(
        tp=tp,
        layers=tuple(_num_layers(files[stage, 0]) for stage in range(stages)),
        vocabulary=embedding[0] * tp if embedding else 0,
        transformer_engine=any(name.endswith(_TE_NORMS) for name in files[0, 0].shapes),
    )
    if sum(grid.layers) != config.num_layers or grid.vocabulary < config.vocab_size:
        raise CheckpointError(
            "the checkpoint is of another model than config.json",
            where=iteration,
            expected=f"{config.num_layers} layers, {config.vocab_size} tokens",
            found=f"{sum(grid.layers)} layers, {grid.vocabulary} tokens",
        )
    for (stage, _), file in files.items():
        _check(file, grid, config, stage)
        _require_equal_dtypes(file, files[stage, 0])
    return grid, files


def _places(iteration: Path) -> dict[tuple[int, int], str]:
    try:
        names = sorted(os.listdir(iteration))
    except OSError as error:
        raise CheckpointError(f"cannot read: {error.strerror}", where=iteration) from error
    places: dict[tuple[int, int], str] = {}
    for name in (name for name in names if name.startswith("mp_rank_")):
        match = _RANK.fullmatch(name)
        if match is None:
            raise CheckpointError(
                "not a rank of a dense model's checkpoint",
                where=iteration / name,
                expected="mp_rank_<TP> or mp_rank_<TP>_<PP>",
                fix="Experts are not converted",
            )
        place = int(match[2] or 0), int(match[1])
        if place in places:
            raise CheckpointError(f"{places[place]} and {name} are the same rank", where=iteration)
        places[place] = name
    if not places:
        raise CheckpointError("no ranks here", where=iteration, expected="mp_rank_00")
    stages, tp = max(s for s, _ in places) + 1, max(r for _, r in places) + 1
    if stages * tp != len(places):
        grid = Grid(tp=tp, layers=(0,) * stages, vocabulary=0)
        gone = next((s, r) for s in range(stages) for r in range(tp) if (s, r) not in places)
        raise CheckpointError(
            "a rank is missing",
            where=iteration / grid.file(*gone),
            expected=f"{stages * tp} ranks, TP {tp} x PP {stages}",
            found=f"{len(places)} ranks",
        )
    return places


def _num_layers(file: RankFile) -> int:
    numbers = {
        int(match[1])
        for name in file.shapes
        if (match := re.match(r"decoder\.layers\.(\d{1,6})\.", name))
    }
    return len(numbers)


def _check(file: RankFile, grid: Grid, config: ModelConfig, stage: int) -> None:
    expected = {name: grid.shard_shape(name, config) for name in grid.parameters(config, stage)}
    allowed = set(expected)
    if config.tie_embeddings and stage == grid.pp - 1:  # a copy, compared with the embedding
        allowed.add(VOCABULARY[1])
    for what, names in (
        ("missing", expected.keys() - file.shapes.keys()),
        ("not part of the model", file.shapes.keys() - allowed),
    ):
        if names:
            raise CheckpointError(f"tensors {what}: {few(sorted(names))}", where=file.path)
    for name, shape in file.shapes.items():
        wanted = grid.shard_shape(name, config)
        if shape != wanted:
            raise CheckpointError(
                f"wrong shape of {name}", where=file.path, expected=wanted, found=shape
            )


def _require_equal_dtypes(file: RankFile, first: RankFile) -> None:
    for name, dtype in file.dtypes.items():
        if dtype != first.dtypes.get(name):
            raise CheckpointError(
                f"{name} is of another dtype than on TP rank 0",
                where=file.path,
                expected=first.dtypes.get(name),
                found=dtype,
            )


def write_rank(path: Path, parameters: dict[str, Tensor], iteration: int = 1) -> None:
    """Write one rank's file and sync it.

    Raises:
        OutputError: it cannot be written.
    """
    content = {"model": parameters, "checkpoint_version": 3.0, "iteration": iteration}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as handle:
            torch.save(content, handle)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise output_error(path, error) from error
    except RuntimeError as error:  # the zip writer, after a write that failed
        cause = error.__context__
        if isinstance(cause, OSError):
            raise output_error(path, cause) from error
        raise OutputError(
            f"a file could not be written whole: {_first_line(error)}",
            where=path,
            fix="Is the disk full? Nothing was published",
        ) from error
