#!/usr/bin/env python3
"""Convert between Hugging Face directories and Megatron checkpoints.

    python tools/convert_checkpoint.py --load runs/stage1 --save exported      # to Hugging Face
    python tools/convert_checkpoint.py --load run --save half --blend Qwen3-4B --blend-weight 0.5
    python tools/convert_checkpoint.py --load Qwen3-4B --save mcore --save-model-type mcore
    python tools/convert_checkpoint.py --load-model-type hf --save-model-type mg \\
        --load-dir Qwen3-4B --save-dir mg --target-tensor-parallel-size 4

mcore is megatron-core's resharding format, that of Stage 1's checkpoints; a model larger than one
device's memory needs torchrun and the layout's flags. mg is Megatron's one file per rank, with
MindSpeed-LLM's flags: one process converts it, a parameter at a time. What was written is read back
and compared with the source, unless --no-verify is given. --blend writes weights between a base and
the model of --load, an mcore or a Hugging Face directory; tools/blend.py finds the weight.
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_replay import cli
from megatron_replay.checkpoint.directories import checkpoint_type, iterations
from megatron_replay.config import ModelConfigSource, ParallelConfig
from megatron_replay.errors import CheckpointError, ConfigError, ReplayError
from megatron_replay.files import read_json, require_apart
from megatron_replay.flags import Parser
from megatron_replay.model.config import ModelConfig

#: The names that this project and MindSpeed-LLM use.
_DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip
_TYPES = ("hf", "mg", "mcore")


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns the exit code."""
    try:
        options = _parser().parse_args(argv)
        read = [("--load-dir", options.load_dir), ("--blend", options.blend)]
        require_apart(
            options.save_dir, [one for one in read if one[1] is not None], flag="--save-dir"
        )
        found = find_type(options)
        require_used(options, found)
        if "mg" in (found, options.save_model_type):
            convert_ranks(options, found)
        else:
            convert_models(options)
    except ReplayError as error:
        cli.report_error(str(error))
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="convert_checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--load-dir", "--load", required=True, help="the checkpoint to convert")
    add("--save-dir", "--save", required=True, help="directory to write")
    add("--load-model-type", choices=_TYPES, help="default: detected")
    add("--save-model-type", choices=_TYPES, default="hf", help="default: hf")
    add(
        "--params-dtype",
        choices=("auto", *_DTYPES),
        default="auto",
        help="auto: as stored, tensor by tensor (mg), or as in config.json (mcore)",
    )
    add("--blend", metavar="BASE", help="write (1-W)*BASE + W*(the model of --load); to hf only")
    add("--blend-weight", type=float, metavar="W", help="between 0, the base, and 1")
    add("--overwrite", action="store_true", help="replace an earlier conversion")
    add("--verify", action=argparse.BooleanOptionalAction, default=True,
        help="compare what was written with the source (default: on)")  # fmt: skip
    add = parser.add_argument_group("hf <-> mcore").add_argument
    add("--tensor-model-parallel-size", type=int, default=1, help="TP of this launch")
    add("--pipeline-model-parallel-size", type=int, default=1, help="PP of this launch")
    add("--platform", default="auto", help="auto, or the name of a platform (cpu, ...)")
    add("--iteration", type=int, help="which one of an mcore directory; default: the newest")
    add = parser.add_argument_group("mg").add_argument
    add("--target-tensor-parallel-size", type=_positive, default=1, metavar="TP",
        help="TP of the mg to write")  # fmt: skip
    add("--target-pipeline-parallel-size", type=_positive, default=1, metavar="PP",
        help="PP of the mg to write")  # fmt: skip
    add(
        "--num-layer-list",
        type=_numbers,
        help="layers of each stage, e.g. 17,19; default: as even as can be",
    )
    add("--transformer-impl", choices=("local", "transformer_engine"), default="local",
        help="whose names of norms to write; both are read")  # fmt: skip
    add(
        "--make-vocab-size-divisible-by",
        type=_positive,
        default=1,
        metavar="N",
        help="pad the vocabulary with zeros to a multiple of N x TP",
    )
    add("--hf-cfg-dir", help="config.json and tokenizer of an mg checkpoint without hf/")
    add("--trust-pickle", action="store_true", help="read mg files, which are pickles")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1; found {text}")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"expected numbers as in 17,19; found {text}")
    return tuple(int(part) for part in text.split(","))


def find_type(options: argparse.Namespace) -> str:
    """The type of checkpoint in ``--load-dir``.

    Raises:
        ConfigError: it is not of ``--load-model-type``, or there is no such conversion.
        CheckpointError: it holds no checkpoint.
    """
    directory, target = Path(options.load_dir), options.save_model_type
    found = checkpoint_type(directory)
    if options.load_model_type not in (None, found):
        raise ConfigError(
            "the directory holds another type of checkpoint",
            where="--load-model-type",
            expected=found,
            found=options.load_model_type,
        )
    if found == target and options.blend is None:
        raise ConfigError(f"{directory} is {target} already", where="--save-model-type")
    if {found, target} == {"mg", "mcore"}:
        raise ConfigError(
            f"no conversion from {found} to {target}",
            where="--save-model-type",
            fix="Convert to hf first",
        )
    return found


#: Flags that apply to some conversions only, and to which.
_APPLIES = {
    "writing mg": (
        "target_tensor_parallel_size",
        "target_pipeline_parallel_size",
        "num_layer_list",
        "transformer_impl",
        "make_vocab_size_divisible_by",
    ),
    "reading mg": ("hf_cfg_dir", "trust_pickle"),
    "reading mcore": ("iteration",),
    "writing hf from mcore or hf": ("blend", "blend_weight"),
    "hf <-> mcore": ("tensor_model_parallel_size", "pipeline_model_parallel_size", "platform"),
}


def require_used(options: argparse.Namespace, found: str) -> None:
    """Raise ConfigError for a flag without effect, a missing iteration, or a pickle not trusted."""
    target, directory = options.save_model_type, Path(options.load_dir)
    applying = {f"writing {target}", f"reading {found}"}
    applying |= set() if "mg" in (found, target) else {"hf <-> mcore"}
    applying |= {"writing hf from mcore or hf"} if found != "mg" and target == "hf" else set()
    defaults = _parser()
    for use, flags in _APPLIES.items():
        for flag in flags:
            if use not in applying and getattr(options, flag) != defaults.get_default(flag):
                raise ConfigError(
                    f"this flag only applies to {use}",
                    where="--" + flag.replace("_", "-"),
                    found=f"{found} to {target}",
                    fix="Leave it out",
                )
    if (options.blend is None) != (options.blend_weight is None):
        raise ConfigError("--blend and --blend-weight are given together or not")
    if options.blend is not None and not 0 < options.blend_weight < 1:
        raise ConfigError(
            "not a blend of the two",
            where="--blend-weight",
            expected="a number between 0 and 1",
            found=options.blend_weight,
        )
    if options.iteration is not None and options.iteration not in iterations(directory):
        raise ConfigError(
            "no such iteration",
            where="--iteration",
            expected=", ".join(map(str, iterations(directory))),
            found=options.iteration,
        )
    if found == "mg" and not options.trust_pickle:
        raise ConfigError(
            "mg files are pickles, and a crafted pickle can run any program when it is read "
            "carelessly",
            where=directory,
            fix="Give --trust-pickle if you trust their origin; the reader then builds only "
            "tensors and containers, and runs nothing that a file names",
        )


def convert_models(options: argparse.Namespace) -> None:
    """Convert between hf and mcore, through a model in the layout of this launch."""
    from megatron_replay import parallel, platform

    config = ParallelConfig(
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        platform=options.platform,
    )
    groups = parallel.initialize(config, platform.select(config.platform))
    # These import megatron.core, which the platform must be prepared for.
    from megatron_replay.checkpoint.blend import blend_into
    from megatron_replay.checkpoint.convert_models import require_logits, write_mcore
    from megatron_replay.checkpoint.export import export_hf
    from megatron_replay.checkpoint.load import load_model, model_files

    dtype = _dtype(options.params_dtype, model_files(options.load_dir))
    source = ModelConfigSource(load=options.load_dir, bf16=dtype is torch.bfloat16)
    model = load_model(source, config, groups, iteration=options.iteration)
    if options.blend is not None:
        groups.agreed(lambda: blend_into(model, options.blend, options.blend_weight, groups))
    target, overwrite = Path(options.save_dir), options.overwrite
    if options.save_model_type == "mcore":
        write_mcore(
            model, target, groups, source, config, overwrite=overwrite, verify=options.verify
        )
    else:
        compare = functools.partial(require_logits, model, groups=groups, dtype=dtype)
        verify = compare if options.verify else None
        export_hf(model, target, groups, dtype=dtype, overwrite=overwrite, verify=verify)
    if groups.rank == 0:
        print(f"wrote {options.save_dir} ({options.save_model_type}, {dtype})")
    parallel.shutdown()


def _dtype(name: str, files: Path) -> torch.dtype:
    """The requested dtype, or the one in config.json (float32 where it has none).

    Raises:
        ConfigError: config.json names another.
    """
    if name == "auto":
        content = read_json(files / "config.json", CheckpointError)
        name = str(content.get("dtype") or content.get("torch_dtype") or "float32")
    if name not in _DTYPES:
        raise ConfigError(
            "config.json names a dtype that no weights are written in",
            where=files / "config.json",
            expected=" or ".join(_DTYPES),
            found=name,
            fix="Give --params-dtype",
        )
    return _DTYPES[name]


def convert_ranks(options: argparse.Namespace, found: str) -> None:
    """Convert from or to files of ranks, in this process, without a model."""
    from megatron_replay.checkpoint.convert_ranks import grid_for, hf_to_ranks, ranks_to_hf

    source, target = Path(options.load_dir), Path(options.save_dir)
    common: dict[str, Any] = {
        "dtype": None if options.params_dtype == "auto" else _DTYPES[options.params_dtype],
        "overwrite": options.overwrite,
        "verify": options.verify,
    }
    if found == "hf":
        grid = grid_for(
            ModelConfig.from_hf(source),
            tp=options.target_tensor_parallel_size,
            pp=options.target_pipeline_parallel_size,
            layers=options.num_layer_list,
            transformer_engine=options.transformer_impl == "transformer_engine",
            vocabulary_multiple=options.make_vocab_size_divisible_by,
        )
        hf_to_ranks(source, target, grid, **common)
    else:
        files = Path(options.hf_cfg_dir) if options.hf_cfg_dir else None
        grid = ranks_to_hf(source, target, config_directory=files, **common)
    stages = ", ".join(map(str, grid.layers))
    print(
        f"wrote {target} ({options.save_model_type}); ranks: TP {grid.tp} x PP {grid.pp}, layers "
        f"{stages}, vocabulary {grid.vocabulary}"
    )
    is_verified = "verified: every tensor read back and compared bit for bit"
    print(is_verified if options.verify else "not verified (--no-verify)")


if __name__ == "__main__":
    cli.exit_now(main())
