"""Megatron's oldest layout: one pickle per rank, as MindSpeed-LLM's converter and scripts use it.

::

    latest_checkpointed_iteration.txt
    iter_0000001/mp_rank_00/model_optim_rng.pt         TP rank 0
    iter_0000001/mp_rank_03_001/model_optim_rng.pt     TP rank 3, pipeline stage 1
    hf/                                                config.json and tokenizer; ours only

A file of ``torch.save`` holds {"model": {parameter: tensor}, "checkpoint_version": 3.0,
"iteration": 1}, and what training adds. Parameters have megatron-core's names; each stage counts
its layers from 0.

``torch.load(weights_only=True)`` does not read such files: it implements pickle protocol 2 only
(MindSpeed-LLM writes 4), and refuses the numpy states, enumerations and namespaces that Megatron
stores with the weights. The reader here builds tensors and plain containers; everything else that
a file names becomes an object that does nothing, so no code of the file runs.
"""

from __future__ import annotations

import errno
import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_replay.checkpoint.hf import refuse_tensors
from megatron_replay.checkpoint.names import Mapping, hf_tensor_shapes, layer_mappings, mapping_of
from megatron_replay.errors import CheckpointError
from megatron_replay.files import require_regular
from megatron_replay.model.config import ModelConfig

FILE = "model_optim_rng.pt"
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_LOCAL_NORMS = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
_TE_NORMS = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")


def rank_path(stage: int, rank: int, stages: int) -> str:
    """A rank's file, relative to the iteration."""
    suffix = f"_{stage:03d}" if stages > 1 else ""
    return f"mp_rank_{rank:02d}{suffix}/{FILE}"


def rank_paths(iteration: Path) -> dict[tuple[int, int], Path]:
    """The files of a checkpoint, {(stage, TP rank): file}.

    Raises:
        CheckpointError: a rank is missing, or there are others than a dense model's.
    """
    paths: dict[tuple[int, int], Path] = {}
    for folder in sorted(iteration.glob("mp_rank_*")):
        match = _RANK.fullmatch(folder.name)
        if match is None:
            raise CheckpointError(
                "not a rank of a dense model's checkpoint",
                where=folder,
                expected="mp_rank_<TP> or mp_rank_<TP>_<PP>",
                fix="Models with experts are not converted",
            )
        place = int(match[2] or 0), int(match[1])
        if place in paths:
            raise CheckpointError(
                f"{paths[place].parent.name} and {folder.name} are the same rank", where=iteration
            )
        paths[place] = folder / FILE
    stages, tp = max(s for s, _ in paths) + 1, max(r for _, r in paths) + 1
    if missing := [(s, r) for s in range(stages) for r in range(tp) if (s, r) not in paths]:
        stage, rank = missing[0]
        raise CheckpointError(
            "a rank is missing",
            where=iteration / rank_path(stage, rank, stages),
            expected=f"{stages * tp} ranks, TP {tp} x PP {stages}",
            found=f"{len(paths)} ranks",
        )
    return paths


@dataclass(frozen=True)
class Grid:
    """How a checkpoint of the model ``config`` is divided among ranks.

    Attributes:
        tp: tensor parallel ranks.
        layers: of each pipeline stage.
        vocabulary: rows of the embedding over all ranks, padding included.
        transformer_engine: whether norms have TransformerEngine's names.
    """

    config: ModelConfig
    tp: int
    layers: tuple[int, ...]
    vocabulary: int
    transformer_engine: bool = False

    @property
    def pp(self) -> int:
        """Pipeline stages."""
        return len(self.layers)

    @property
    def num_parameters(self) -> int:
        """Parameters of all stages, as names."""
        return sum(len(self.parameters(stage)) for stage in range(self.pp))

    def parameters(self, stage: int) -> list[str]:
        """Names of a stage's parameters, in the model's order."""
        others = _LOCAL_NORMS if self.transformer_engine else _TE_NORMS
        layer = [name for name in layer_mappings(self.config) if name not in others]
        names = [EMBEDDING] if stage == 0 else []
        names += [f"decoder.layers.{i}.{name}" for i in range(self.layers[stage]) for name in layer]
        if stage == self.pp - 1:
            names.append("decoder.final_layernorm.weight")
            if stage or not self.config.tie_embeddings:
                names.append(HEAD)
        return names

    def mapping(self, parameter: str, stage: int) -> Mapping:
        """The Hugging Face tensors of a stage's parameter."""
        return mapping_of(parameter, self.config, sum(self.layers[:stage]))

    def shard_shape(self, parameter: str) -> tuple[int, ...]:
        """A parameter's shape on each rank."""
        if parameter in (EMBEDDING, HEAD):
            return (self.vocabulary // self.tp, self.config.hidden_size)
        mapping, shapes = self.mapping(parameter, 0), hf_tensor_shapes(self.config)
        return mapping.shard_shape([shapes[name] for name in mapping.names], self.tp)


class RankFile:
    """The weights in one rank's file.

    Raises:
        CheckpointError: the file is missing, damaged, or holds no plain model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _require_intact(path)
        tensors = self._tensors()
        self.shapes = {name: tuple(held.shape) for name, held in tensors.items()}
        self.dtypes = {name: held.dtype for name, held in tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        """A tensor, mapped from the file; its pages are released together with it."""
        return self._tensors()[name]

    def _tensors(self) -> dict[str, Tensor]:
        content = _load(self.path)
        model = content.get("model") if isinstance(content, dict) else None
        if not isinstance(model, dict):
            parts = sorted(map(str, content))[:4] if isinstance(content, dict) else []
            raise CheckpointError(
                "the file holds no plain model",
                where=self.path,
                expected="model",
                found=", ".join(parts) or type(content).__name__,
                fix="Virtual pipelines (model0, model1) are not supported: merge them with the "
                "tool that wrote them"
                if "model0" in parts
                else None,
            )
        tensors = {}
        for name, value in model.items():
            if str(name).endswith("_extra_state"):  # TransformerEngine's fp8 scales
                continue
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise CheckpointError(f"{name} is not a floating-point tensor", where=self.path)
            tensors[str(name)] = value.detach()
        return tensors


def open_ranks(
    iteration: Path, config: ModelConfig
) -> tuple[Grid, dict[tuple[int, int], RankFile]]:
    """Find and check a checkpoint's files: {(stage, TP rank): file}.

    Raises:
        CheckpointError: a rank is missing, or its tensors are not those of ``config``.
    """
    files = {place: RankFile(path) for place, path in sorted(rank_paths(iteration).items())}
    stages, tp = (most + 1 for most in max(files))
    embedding = files[0, 0].shapes.get(EMBEDDING, (0,))
    grid = Grid(
        config,
        tp=tp,
        layers=tuple(_num_layers(files[stage, 0]) for stage in range(stages)),
        vocabulary=embedding[0] * tp if embedding else 0,
        transformer_engine=any(name.endswith(_TE_NORMS) for name in files[0, 0].shapes),
    )
    if sum(grid.layers) != config.num_layers or grid.vocabulary < config.vocab_size:
        raise CheckpointError(
            "config.json describes another model than the checkpoint",
            where=iteration,
            expected=f"{config.num_layers} layers, {config.vocab_size} tokens",
            found=f"{sum(grid.layers)} layers, {grid.vocabulary} tokens",
        )
    for (stage, _), file in files.items():
        _check(file, files[stage, 0], grid, stage)
    return grid, files


def _num_layers(file: RankFile) -> int:
    matches = (re.match(r"decoder\.layers\.(\d{1,6})\.", name) for name in file.shapes)
    return len({int(match[1]) for match in matches if match})


def _check(file: RankFile, first: RankFile, grid: Grid, stage: int) -> None:
    """Raise CheckpointError unless the tensors are the stage's, in the dtypes of TP rank 0."""
    expected = set(grid.parameters(stage))
    refuse_tensors("missing", expected - file.shapes.keys(), file.path)
    if grid.config.tie_embeddings and stage == grid.pp - 1:
        expected.add(HEAD)  # a copy, which is compared with the embedding
    refuse_tensors("not part of the model", file.shapes.keys() - expected, file.path)
    for name, shape in file.shapes.items():
        for what, wanted, found in (
            ("wrong shape", grid.shard_shape(name), shape),
            ("not the dtype of TP rank 0", first.dtypes.get(name), file.dtypes[name]),
        ):
            if found != wanted:
                raise CheckpointError(
                    f"{what}: {name}", where=file.path, expected=wanted, found=found
                )


#: What makes up tensors: all that a file may name.
_BUILDS = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.Size",
}


class _Inert:
    """Replaces any other object; accepts every operation of a pickle and does nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def _accept(self, *_: object) -> None:
        pass

    append = extend = add = __setitem__ = __setstate__ = _accept


class _RestrictedPickle:
    """What torch.load expects of ``pickle_module``."""

    __name__ = "restricted_pickle"

    class Unpickler(pickle.Unpickler):
        """Resolves the parts of tensors only."""

        def find_class(self, module_name: str, global_name: str, /) -> Any:
            """The named object if it is part of a tensor, otherwise an inert one."""
            is_dtype = module_name == "torch" and isinstance(
                getattr(torch, global_name, None), torch.dtype
            )
            if is_dtype or f"{module_name}.{global_name}" in _BUILDS:
                return super().find_class(module_name, global_name)
            return _Inert


def _load(path: Path) -> Any:
    """The content of a file of ``torch.save``, its tensors mapped from the file."""
    try:
        with warnings.catch_warnings():
            # Otherwise torch.load passes TorchScript, which is code, to another reader, and warns.
            warnings.filterwarnings("error", message=".*TorchScript")
            return torch.load(
                path,
                map_location="cpu",
                mmap=True,
                weights_only=False,
                pickle_module=_RestrictedPickle,
            )
    except Exception as error:  # damaged zip files and pickles raise many types
        raise _unreadable(path, error) from error


def _require_intact(path: Path) -> None:
    """Compare the content with the crc32 that torch.save stores for each tensor.

    torch does not, and would load a weight with a flipped bit.
    """
    require_regular(path, CheckpointError)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # damaged archives raise many types
        raise _unreadable(path, error) from error
    if damaged is not None:
        raise CheckpointError(
            f"damaged: the crc32 of {damaged} differs",
            where=path,
            fix="Copy it again from an intact copy (torch.save omits the crc32 only under "
            "torch.serialization.set_crc32_options(False))",
        )


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    # In a truncated file torch may seek beyond the end (EINVAL).
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        return CheckpointError(f"cannot read: {error.strerror}", where=path)
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return CheckpointError(f"truncated, or not a file of torch.save: {reason}", where=path)
