#!/usr/bin/env python3
"""Convert between Hugging Face directories and training checkpoints, in every direction.

    python tools/convert_checkpoint.py --load runs/stage1 --save exported      # to Hugging Face
    python tools/convert_checkpoint.py --load Qwen3-4B --save mcore --save-format mcore
    python tools/convert_checkpoint.py --load-model-type hf --save-model-type mg \\
        --load-dir Qwen3-4B --save-dir mg --target-tensor-parallel-size 4

mg is Megatron's file a rank, as MindSpeed-LLM has it and with its flags: converted by one process,
a parameter at a time. mcore is megatron-core's resharding format, that of Stage 1's checkpoints;
models larger than one device's memory: with torchrun and the layout's flags. What was written is
compared with what was read, unless ``--no-verify``.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay import cli
from megatron_replay.checkpoint.convert_flags import DTYPES, find_type, parse_arguments
from megatron_replay.checkpoint.directories import iteration_directory, latest_iteration
from megatron_replay.checkpoint.hf import HFReader
from megatron_replay.checkpoint.names import hf_tensor_shapes
from megatron_replay.checkpoint.rank_files import open_grid
from megatron_replay.config import ModelConfigSource, ParallelConfig
from megatron_replay.errors import CheckpointError, ConfigError, ReplayError
from megatron_replay.files import read_json, require_apart
from megatron_replay.model.config import ModelConfig

if TYPE_CHECKING:
    from megatron_replay.checkpoint.load import LoadedModel
    from megatron_replay.parallel import Parallel

#: Largest difference of logits, relative to the largest one: rounding, by a wide margin.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_VERIFIED_TOKENS = 32
#: Models of up to so many parameters are run to compare logits after a conversion without a model.
_LARGEST_RUN = 50_000_000


def main() -> int:
    """Convert; returns the exit code."""
    try:
        options = parse_arguments(__doc__)
        require_apart(options.save_dir, [("--load-dir", options.load_dir)], flag="--save-dir")
        load_type = find_type(options)
        if "mg" in (load_type, options.save_model_type):
            convert_ranks(options, load_type)
        else:
            convert_models(options)
    except ReplayError as error:
        cli.report_error(str(error))
        return error.exit_code
    return 0


def convert_models(options: argparse.Namespace) -> None:
    """Convert through a real model in a real layout: with mcore on one side."""
    from megatron_replay import parallel, platform

    config = ParallelConfig(
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        platform=options.platform,
    )
    groups = parallel.initialize(config, platform.select(config.platform))
    convert(options, config, groups)
    parallel.shutdown()


def convert(options: argparse.Namespace, config: ParallelConfig, groups: Parallel) -> None:
    """Load this rank's part, write it in the other format, verify."""
    from megatron_replay.checkpoint.load import load_model, model_files

    dtype = _dtype(options.params_dtype, model_files(options.load_dir))
    source = ModelConfigSource(load=options.load_dir, bf16=dtype is torch.bfloat16)
    model = load_model(source, config, groups, iteration=options.iteration)
    if options.save_model_type == "hf":
        write_hf(model, options, groups, dtype)
    else:
        write_mcore(model, options, config, groups, source)
    if groups.rank == 0:
        print(f"wrote {options.save_dir} ({options.save_model_type}, {dtype})")


def write_hf(
    model: LoadedModel, options: argparse.Namespace, groups: Parallel, dtype: torch.dtype
) -> None:
    """Export, once transformers computes this model's logits from what is to be published."""
    from megatron_replay.checkpoint.export import export_hf

    export_hf(
        model.module.named_parameters(),
        model.shape,
        options.save_dir,
        groups,
        layer_offset=model.layer_offset,
        source=model.files,
        dtype=dtype,
        overwrite=options.overwrite,
        verify=(lambda staged: verify(model, staged, groups, dtype)) if options.verify else None,
    )


def write_mcore(
    model: LoadedModel,
    options: argparse.Namespace,
    config: ParallelConfig,
    groups: Parallel,
    source: ModelConfigSource,
) -> None:
    """Write a checkpoint beside its name, read it again into another model, verify, rename."""
    from megatron_replay.checkpoint.load import base_fingerprint, load_model
    from megatron_replay.checkpoint.model_files import fingerprints, keep_model_files
    from megatron_replay.checkpoint.staging import publish, staging_directory, start_directory
    from megatron_replay.checkpoint.training import CONVERTED_FROM, TrainState, save_checkpoint

    target = Path(options.save_dir)
    staged = staging_directory(target)
    groups.on_rank_zero(lambda: start_directory(target, overwrite=options.overwrite))
    groups.on_rank_zero(lambda: keep_model_files(model.files, staged))
    is_exact = held_exactly(model, torch.bfloat16 if source.bf16 else torch.float32)
    origin = groups.from_rank_zero(lambda: base_fingerprint(options.load_dir) if is_exact else "")
    identity = {CONVERTED_FROM: origin} if origin else {}
    state = TrainState(0, 0, 0, identity, model_files=fingerprints(model.files))
    save_checkpoint(staged, state, model.module, None, groups)
    if options.verify:
        written = load_model(dataclasses.replace(source, load=str(staged)), config, groups)
        groups.agreed(lambda: require_same_weights(written, model))
        verify(written, Path(options.load_dir), groups, torch.float32)
    groups.on_rank_zero(lambda: publish(staged, target.resolve(), overwrite=options.overwrite))


def held_exactly(model: LoadedModel, dtype: torch.dtype) -> bool:
    """Whether no weight of the Hugging Face directory is rounded by ``dtype``, as it is stored."""
    reader = HFReader(model.files)
    stored = {reader.slice(name).torch_dtype() for name in hf_tensor_shapes(model.shape)}
    return all(torch.promote_types(one, dtype) is dtype for one in stored)


def require_same_weights(written: LoadedModel, model: LoadedModel) -> None:
    """Raise CheckpointError unless both hold the same bits on this rank."""
    from megatron_replay.checkpoint.hf import same_bits

    expected = dict(model.module.named_parameters())
    for name, parameter in written.module.named_parameters():
        if not same_bits(parameter.detach(), expected[name].detach()):
            raise CheckpointError(
                f"{name} was written, and reads differently", where=written.files.parent
            )


def convert_ranks(options: argparse.Namespace, load_type: str) -> None:
    """Convert from or to files of ranks, in this process, without a model."""
    from megatron_replay.checkpoint.stream import grid_for, hf_to_ranks, ranks_to_hf

    source, target = Path(options.load_dir), Path(options.save_dir)
    dtype = None if options.params_dtype == "auto" else DTYPES[options.params_dtype]
    common: dict[str, Any] = {
        "dtype": dtype,
        "overwrite": options.overwrite,
        "verify": options.verify,
    }
    if load_type == "hf":
        grid = grid_for(
            ModelConfig.from_hf(source),
            tp=options.target_tensor_parallel_size,
            pp=options.target_pipeline_parallel_size,
            layers=options.num_layer_list,
            transformer_engine=options.transformer_impl == "transformer_engine",
            vocabulary_multiple=options.make_vocab_size_divisible_by,
        )
        done = hf_to_ranks(source, target, grid, **common)
    else:
        files = Path(options.hf_cfg_dir) if options.hf_cfg_dir else None
        done = ranks_to_hf(source, target, config_directory=files, **common)
    grid = done.grid
    stages = ", ".join(map(str, grid.layers))
    print(
        f"wrote {target} ({options.save_model_type}); ranks: TP {grid.tp} x PP {grid.pp}, layers "
        f"{stages}, vocabulary {grid.vocabulary}"
    )
    if not done.num_verified:
        print("not verified, as asked")
        return
    print(f"verified: {done.num_verified} tensors read back, every bit compared")
    hf, ranks = (source, target) if load_type == "hf" else (target, source)
    verify_logits(hf, ranks, options.platform)


def verify_logits(hf_directory: Path, ranks_directory: Path, platform_name: str) -> None:
    """Put the ranks together in a model and compare its logits; says so if it is too large.

    Raises:
        CheckpointError: they differ from those of transformers by more than rounding.
    """
    shape = ModelConfig.from_hf(hf_directory)
    if shape.num_parameters() > _LARGEST_RUN:
        print(
            f"logits: not compared, the model has more than {_LARGEST_RUN / 1e6:.0f} million "
            "parameters"
        )
        return
    from megatron_replay import parallel, platform

    config = ParallelConfig(platform=platform_name)
    groups = parallel.initialize(config, platform.select(config.platform))
    from megatron_replay.checkpoint.compare import whole_parameter
    from megatron_replay.checkpoint.load import load_model

    grid, files = open_grid(
        iteration_directory(ranks_directory, latest_iteration(ranks_directory) or 0), shape
    )
    source = ModelConfigSource(load=str(hf_directory), bf16=False)
    model = load_model(source, config, groups)
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            parameter.copy_(whole_parameter(name, files, shape, grid))
    verify(model, hf_directory, groups, torch.float32)
    parallel.shutdown()


def _dtype(name: str, files: Path) -> torch.dtype:
    """The dtype asked for, or the one config.json names (float32 when it names none).

    Raises:
        ConfigError: config.json names another.
    """
    if name == "auto":
        content = read_json(files / "config.json", CheckpointError)
        name = str(content.get("dtype") or content.get("torch_dtype") or "float32")
    if name not in DTYPES:
        raise ConfigError(
            "config.json names a dtype that no weights are written in",
            where=files / "config.json",
            expected=" or ".join(DTYPES),
            found=name,
            fix="Give --params-dtype",
        )
    return DTYPES[name]


@torch.no_grad()
def verify(model: LoadedModel, hf_directory: Path, groups: Parallel, dtype: torch.dtype) -> None:
    """Compare this model's logits with those transformers computes from ``hf_directory``.

    ``dtype``: what the directory's weights were rounded to.

    Raises:
        CheckpointError: they differ by more than rounding.
    """
    from megatron_replay.data.packing import PackedBatch
    from megatron_replay.forward import Work, forward_only
    from megatron_replay.functional.packed_attention import segments_of

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.shape.vocab_size, (1, _VERIFIED_TOKENS), generator=generator)
    zeros = torch.zeros_like(tokens)
    positions = torch.arange(_VERIFIED_TOKENS, dtype=torch.int32)[None]
    segments = segments_of([[0, _VERIFIED_TOKENS]], _VERIFIED_TOKENS)
    batch = PackedBatch(tokens, zeros, zeros.bool(), zeros.int(), positions, segments)
    batch = batch.to(groups.device)
    outputs = forward_only(
        model.module, [Work(batch, lambda hidden, weight: hidden.all() @ weight.T)]
    )

    def compare() -> None:
        if outputs and groups.tp_rank == 0 and groups.dp_rank == 0:
            logits_TV = torch.cat(shards, 1).float().cpu()
            _compare(logits_TV, tokens, hf_directory, outputs[0].dtype, dtype)

    if outputs:
        shards = [torch.empty_like(outputs[0]) for _ in range(groups.tp_size)]
        dist.all_gather(shards, outputs[0].contiguous(), group=groups.tp_group)
    groups.agreed(compare)


def _compare(
    logits_TV: Tensor,
    tokens: Tensor,
    directory: Path,
    computed: torch.dtype,
    stored: torch.dtype,
) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=computed).eval()
    expected_TV = reference(tokens).logits[0].float()
    error = ((logits_TV - expected_TV).abs().max() / expected_TV.abs().max()).item()
    tolerance = max(_TOLERANCE[computed], _TOLERANCE[stored])
    if not error <= tolerance:
        raise CheckpointError(
            "the converted model's logits differ from transformers'",
            where=directory,
            expected=f"a relative error of at most {tolerance}",
            found=f"{error:.2e}",
        )
    print(f"verified: logits equal transformers' within {error:.1e} of the largest")


if __name__ == "__main__":
    cli.exit_now(main())
