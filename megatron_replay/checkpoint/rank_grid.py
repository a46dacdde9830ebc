"""Megatron's oldest layout: one pickle per rank, as MindSpeed-LLM's converter and scripts use it.

::

    latest_checkpointed_iteration.txt
    iter_0000001/mp_rank_00/model_optim_rng.pt         TP rank 0
    iter_0000001/mp_rank_03_001/model_optim_rng.pt     TP rank 3, pipeline stage 1
    hf/                                                config.json and tokenizer; ours only

Parameters have megatron-core's names; each stage counts its layers from 0.
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_replay.checkpoint.names import hf_tensor_shapes, mapping_of
from megatron_replay.checkpoint.rank_file import RankFile
from megatron_replay.errors import CheckpointError, ConfigError, few
from megatron_replay.model.config import ModelConfig

FILE = "model_optim_rng.pt"
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")
_LOCAL_NORMS = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
_TE_NORMS = (
    "self_attention.linear_qkv.layer_norm_weight",
    "mlp.linear_fc1.layer_norm_weight",
)


@dataclass(frozen=True)
class Grid:
    """How a checkpoint is divided among ranks.

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

    def parameters(self, config: ModelConfig, stage: int) -> list[str]:
        """Names of a stage's parameters, in the model's order."""
        before, after = _TE_NORMS if self.transformer_engine else _LOCAL_NORMS
        attention = ["linear_proj", "linear_qkv"]
        attention += ["q_layernorm", "k_layernorm"] if config.qk_layernorm else []
        layer = [before, *(f"self_attention.{part}.weight" for part in attention)]
        layer += [after, "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
        names = [VOCABULARY[0]] if stage == 0 else []
        names += [f"decoder.layers.{i}.{name}" for i in range(self.layers[stage]) for name in layer]
        if stage == self.pp - 1:
            names.append("decoder.final_layernorm.weight")
            if self.pp > 1 or not config.tie_embeddings:
                names.append(VOCABULARY[1])
        return names

    def shard_shape(self, parameter: str, config: ModelConfig) -> tuple[int, ...]:
        """A parameter's shape on each rank."""
        if parameter in VOCABULARY:
            return (self.vocabulary // self.tp, config.hidden_size)
        mapping, shapes = mapping_of(parameter, config, 0), hf_tensor_shapes(config)
        return mapping.layout.shard_shape([shapes[name] for name in mapping.names], self.tp)


def grid_for(
    config: ModelConfig,
    *,
    tp: int,
    pp: int,
    layers: tuple[int, ...] | None = None,
    transformer_engine: bool = False,
    vocabulary_multiple: int = 1,
) -> Grid:
    """The layout to write; the vocabulary is padded to a multiple of ``vocabulary_multiple`` x TP.

    Raises:
        ConfigError: TP or PP do not divide the model, or ``layers`` do not add up to it.
    """
    for flag, number in (
        ("--target-tensor-parallel-size", tp),
        ("--target-pipeline-parallel-size", pp),
        ("--make-vocab-size-divisible-by", vocabulary_multiple),
    ):
        if number < 1:
            raise ConfigError("not a positive number", where=flag, found=number)
    multiple = vocabulary_multiple * tp
    vocabulary = -(-config.vocab_size // multiple) * multiple
    padded = dataclasses.replace(config, vocab_size=vocabulary)
    padded.check_layout(tp, pp if layers is None else 1, flag="--target-{}-parallel-size")
    layers = layers or (config.num_layers // pp,) * pp
    if len(layers) != pp or sum(layers) != config.num_layers or min(layers) < 1:
        raise ConfigError(
            "the stages' layers do not make up the model",
            where="--num-layer-list",
            expected=f"{pp} positive numbers, {config.num_layers} in all",
            found=",".join(map(str, layers)),
        )
    return Grid(tp, layers, vocabulary, transformer_engine)


def open_grid(iteration: Path, config: ModelConfig) -> tuple[Grid, dict[tuple[int, int], RankFile]]:
    """Find and check a checkpoint's files: {(stage, TP rank): file}.

    Raises:
        CheckpointError: a rank is missing, or its tensors are not those of ``config``.
    """
    files = {place: RankFile(path) for place, path in sorted(_paths(iteration).items())}
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
            "config.json describes another model than the checkpoint",
            where=iteration,
            expected=f"{config.num_layers} layers, {config.vocab_size} tokens",
            found=f"{sum(grid.layers)} layers, {grid.vocabulary} tokens",
        )
    for (stage, _), file in files.items():
        _check(file, files[stage, 0], grid, config, stage)
    return grid, files


def _paths(iteration: Path) -> dict[tuple[int, int], Path]:
    """{(stage, TP rank): file} of a whole grid of ranks."""
    try:
        names = sorted(os.listdir(iteration))
    except OSError as error:
        raise CheckpointError(f"cannot read: {error.strerror}", where=iteration) from error
    paths: dict[tuple[int, int], Path] = {}
    for name in (name for name in names if name.startswith("mp_rank_")):
        match = _RANK.fullmatch(name)
        if match is None:
            raise CheckpointError(
                "not a rank of a dense model's checkpoint",
                where=iteration / name,
                expected="mp_rank_<TP> or mp_rank_<TP>_<PP>",
                fix="Models with experts are not converted",
            )
        place = int(match[2] or 0), int(match[1])
        if place in paths:
            raise CheckpointError(
                f"{paths[place].parent.name} and {name} are the same rank", where=iteration
            )
        paths[place] = iteration / name / FILE
    if not paths:
        raise CheckpointError("no ranks here", where=iteration, expected="mp_rank_00")
    stages, tp = max(s for s, _ in paths) + 1, max(r for _, r in paths) + 1
    if stages * tp != len(paths):
        grid = Grid(tp=tp, layers=(0,) * stages, vocabulary=0)
        missing = next((s, r) for s in range(stages) for r in range(tp) if (s, r) not in paths)
        raise CheckpointError(
            "a rank is missing",
            where=iteration / grid.file(*missing),
            expected=f"{stages * tp} ranks, TP {tp} x PP {stages}",
            found=f"{len(paths)} ranks",
        )
    return paths


def _num_layers(file: RankFile) -> int:
    matches = (re.match(r"decoder\.layers\.(\d{1,6})\.", name) for name in file.shapes)
    return len({int(match[1]) for match in matches if match})


def _check(file: RankFile, first: RankFile, grid: Grid, config: ModelConfig, stage: int) -> None:
    """Raise CheckpointError unless the tensors are the stage's, in the dtypes of TP rank 0."""
    expected = set(grid.parameters(config, stage))
    allowed = set(expected)
    if config.tie_embeddings and stage == grid.pp - 1:  # a copy, compared with the embedding
        allowed.add(VOCABULARY[1])
    for what, names in (
        ("missing", expected - file.shapes.keys()),
        ("not part of the model", file.shapes.keys() - allowed),
    ):
        if names:
            raise CheckpointError(f"tensors {what}: {few(sorted(names))}", where=file.path)
    for name, shape in file.shapes.items():
        for what, wanted, found in (
            ("wrong shape", grid.shard_shape(name, config), shape),
            ("not the dtype of TP rank 0", first.dtypes.get(name), file.dtypes[name]),
        ):
            if found != wanted:
                raise CheckpointError(
                    f"{what}: {name}", where=file.path, expected=wanted, found=found
                )
