#!/usr/bin/env python3
"""Convert between Hugging Face directories and training checkpoints, in both directions.

    python tools/convert_checkpoint.py --load runs/stage1 --save exported      # to Hugging Face
    python tools/convert_checkpoint.py --load Qwen3-4B --save mcore --save-format mcore

Models larger than one device's memory: run it with torchrun and the layout's flags. What was
written is loaded with transformers and compared on a few tokens, unless ``--no-verify``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay import cli, parallel, platform
from megatron_replay.config import ModelConfigSource, ParallelConfig
from megatron_replay.errors import CheckpointError, ConfigError, ReplayError
from megatron_replay.parallel import Parallel

if TYPE_CHECKING:
    from megatron_replay.checkpoint.load import LoadedModel

#: Largest difference of logits, relative to the largest one: rounding, by a wide margin.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
_VERIFIED_TOKENS = 32


def main() -> int:
    """Convert; returns the exit code."""
    options = parse_arguments()
    config = ParallelConfig(
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        platform=options.platform,
    )
    try:
        groups = parallel.initialize(config, platform.select(config.platform))
        convert(options, config, groups)
        parallel.shutdown()
    except ReplayError as error:
        cli.report_error(str(error))
        return error.exit_code
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load", required=True, help="what to convert")
    parser.add_argument("--save", required=True, help="directory to write")
    parser.add_argument("--save-format", choices=("hf", "mcore"), default="hf")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: as config.json says",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what --save holds")
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--platform", default="auto")
    return parser.parse_args()


def convert(options: argparse.Namespace, config: ParallelConfig, groups: Parallel) -> None:
    """Load this rank's part, write it in the other format, verify."""
    from megatron_replay.checkpoint.export import export_hf
    from megatron_replay.checkpoint.load import load_model, model_files
    from megatron_replay.checkpoint.training import (
        TrainState,
        keep_model_files,
        latest_iteration,
        save_checkpoint,
    )

    to_hf = options.save_format == "hf"
    is_checkpoint = latest_iteration(Path(options.load)) is not None
    if to_hf != is_checkpoint:
        raise ConfigError(
            f"--load is {'a training checkpoint' if is_checkpoint else 'a Hugging Face directory'} "
            "already",
            where="--save-format",
            expected="hf" if is_checkpoint else "mcore",
            found=options.save_format,
        )
    target = Path(options.save)
    dtype = _dtype(options.dtype, model_files(options.load))
    source = ModelConfigSource(load=options.load, bf16=dtype is torch.bfloat16)
    model = load_model(source, config, groups)
    if to_hf:
        export_hf(
            model.module.named_parameters(),
            model.shape,
            target,
            groups,
            layer_offset=model.layer_offset,
            source=model.files,
            dtype=dtype,
            overwrite=options.overwrite,
        )
    else:
        if groups.rank == 0:
            keep_model_files(model.files, target)
        save_checkpoint(target, TrainState(0, 0, 0, {}), model.module, None, groups)
    if options.verify:
        verify(model, target if to_hf else Path(options.load), groups)
    if groups.rank == 0:
        print(f"wrote {target} ({options.save_format}, {dtype})")


def _dtype(name: str, files: Path) -> torch.dtype:
    """The dtype asked for, or the one config.json names (float32 when it names none)."""
    if name == "auto":
        content = json.loads((files / "config.json").read_text(encoding="utf-8"))
        name = content.get("dtype") or content.get("torch_dtype") or "float32"
    if name not in ("float32", "bfloat16"):
        raise ConfigError(
            "unsupported dtype", where="--dtype", expected="float32 or bfloat16", found=name
        )
    return torch.float32 if name == "float32" else torch.bfloat16


@torch.no_grad()
def verify(model: LoadedModel, hf_directory: Path, groups: Parallel) -> None:
    """Compare this model's logits with those transformers computes from ``hf_directory``.

    Raises:
        CheckpointError: they differ by more than rounding.
    """
    from megatron_replay.data.packing import PackedBatch
    from megatron_replay.forward import forward_only

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.shape.vocab_size, (1, _VERIFIED_TOKENS), generator=generator)
    zeros = torch.zeros_like(tokens)
    positions = torch.arange(_VERIFIED_TOKENS, dtype=torch.int32)[None]
    batch = PackedBatch(tokens, zeros, zeros.bool(), zeros.int(), positions).to(groups.device)
    outputs = forward_only(model.module, [(batch, lambda hidden, weight: hidden.all() @ weight.T)])
    if outputs:
        shards = [torch.empty_like(outputs[0]) for _ in range(groups.tp_size)]
        dist.all_gather(shards, outputs[0].contiguous(), group=groups.tp_group)
        if groups.tp_rank == 0 and groups.dp_rank == 0:
            _compare(torch.cat(shards, 1).float().cpu(), tokens, hf_directory, outputs[0].dtype)
    dist.barrier()


def _compare(logits_TV: Tensor, tokens: Tensor, directory: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    expected_TV = reference(tokens).logits[0].float()
    error = ((logits_TV - expected_TV).abs().max() / expected_TV.abs().max()).item()
    if not error <= _TOLERANCE[dtype]:
        raise CheckpointError(
            "the converted model's logits differ from transformers'",
            where=directory,
            expected=f"a relative error of at most {_TOLERANCE[dtype]}",
            found=f"{error:.2e}",
        )
    print(f"verified: logits equal transformers' within {error:.1e} of the largest")


if __name__ == "__main__":
    cli.exit_now(main())
