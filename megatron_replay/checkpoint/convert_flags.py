"""The flags of ``convert_checkpoint``: MindSpeed-LLM's names, some of which mean nothing here."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from megatron_replay.checkpoint.directories import (
    LATEST,
    iteration_directory,
    latest_iteration,
)
from megatron_replay.checkpoint.model_files import FOLDER
from megatron_replay.checkpoint.retention import iterations
from megatron_replay.errors import CheckpointError, ConfigError
from megatron_replay.model.config import ModelConfig

#: As this project, and as MindSpeed-LLM calls them.
DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip
_TYPES = ("hf", "mg", "mcore")
#: MindSpeed-LLM's flags that are refused, and what to do.
_REFUSED = {
    r"use-mcore-models|model-type|spec": "Leave it out: names are always megatron-core's",
    r"tokenizer-model": "Leave it out: the tokenizer goes along with config.json",
    r"(target-)?expert-.*|moe-.*|first-k-dense-replace": "Leave it out: models here are dense",
    r"num-layers-per-virtual-pipeline-stage|pipeline-model-parallel-layout|schedules-method": (
        "Leave it out: stages are contiguous, --num-layer-list gives their layers"
    ),
    r"noop-layers|num-layers|mtp-num-layers": "Leave it out: layers are those of config.json",
    r"lora-.*|save-lora-to-hf": "Merge the adapter first, with peft's merge_and_unload",
    r"mla-.*|mamba-.*|hidden-size": "Leave it out: the shape is that of config.json",
    r"input-(tp|pp)-rank": "Leave it out: ranks are found in --load-dir",
    r"save-layer-by-layer": "Leave it out: memory is one rank's weights anyway",
    r"load-checkpoint-loosely|ckpt-format": "Leave it out: --load-model-type and "
    "--save-model-type say the format",
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """One line for a mistake, like all of the project's programs."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parse_arguments(
    description: str | None, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """The command line.

    Raises:
        ConfigError: a flag is unknown, refused, or of no use for what is converted.
    """
    parser = _Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_what(parser)
    _add_ranks(parser)
    model = parser.add_argument_group("hf <-> mcore", "the layout of the processes that load it")
    model.add_argument("--tensor-model-parallel-size", type=int, default=1)
    model.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    model.add_argument("--platform", default="auto")
    model.add_argument("--iteration", type=int, help="of mcore; default: the newest")
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        _refuse(unknown[0], parser)
    return options


def _add_what(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--load-dir", "--load", required=True, help="what to convert")
    add("--save-dir", "--save", required=True, help="directory to write")
    add("--load-model-type", choices=_TYPES, help="default: found out from --load-dir")
    add("--save-model-type", "--save-format", choices=_TYPES, default="hf", help="default: hf")
    add(
        "--params-dtype",
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="auto: with mg as stored, tensor by tensor, otherwise as config.json says",
    )
    add("--overwrite", action="store_true", help="replace an earlier conversion")
    add("--verify", action=argparse.BooleanOptionalAction, default=True)


def _add_ranks(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("mg").add_argument
    add("--target-tensor-parallel-size", type=int, default=1, metavar="TP")
    add("--target-pipeline-parallel-size", type=int, default=1, metavar="PP")
    add("--num-layer-list", type=_numbers, help="layers of each stage, 17,19 say; default: equal")
    add("--transformer-impl", choices=("local", "transformer_engine"), default="local")
    add(
        "--make-vocab-size-divisible-by",
        type=int,
        default=1,
        metavar="N",
        help="pad the vocabulary with zeros to a multiple of N x TP",
    )
    add("--hf-cfg-dir", help="config.json and tokenizer of an mg checkpoint that lacks hf/")
    add("--model-type-hf", choices=("qwen3", "llama2"), help="config.json says it; only checked")
    add("--trust-pickle", action="store_true", help="read mg files, which are pickles")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _refuse(flag: str, parser: argparse.ArgumentParser) -> NoReturn:
    name = flag.split("=")[0]
    for pattern, fix in _REFUSED.items():
        if re.fullmatch("--(" + pattern + ")", name):
            raise ConfigError("not used by this converter", where=name, fix=fix)
    known = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(name, known, 1)
    raise ConfigError(
        "no such flag", where=name, fix=f"Did you mean {near[0]}?" if near else "See --help"
    )


def find_type(options: argparse.Namespace) -> str:
    """What ``--load-dir`` holds, once it can be converted into what is asked for.

    Raises:
        ConfigError: it is something else, needs trust, or there is no such conversion.
        CheckpointError: it holds nothing that is known.
    """
    directory = Path(options.load_dir)
    found = _type_of(directory)
    named, target = options.load_model_type, options.save_model_type
    if found is None:
        raise CheckpointError(
            "no checkpoint here",
            where=directory,
            expected=f"config.json (Hugging Face) or {LATEST}",
            found="nothing of either" if directory.is_dir() else "no such directory",
        )
    if named not in (None, found):
        raise ConfigError(
            "the directory holds something else",
            where="--load-model-type",
            expected=found,
            found=named,
        )
    if found == target:
        raise ConfigError(f"{directory} is {target} already", where="--save-model-type")
    if {found, target} == {"mg", "mcore"}:
        raise ConfigError(
            f"no conversion from {found} to {target}",
            where="--save-model-type",
            fix="Convert to hf first",
        )
    _check_used(options, found)
    _check_iteration(options.iteration, found, directory)
    _check_model_type(options, found)
    if found == "mg" and not options.trust_pickle:
        raise ConfigError(
            "mg files are pickles: a crafted one can run any program on this machine when it is "
            "read carelessly",
            where=directory,
            fix="Give --trust-pickle if you know where they come from; even then only tensors "
            "and containers are built, and nothing that a file names is run",
        )
    return found


def _check_used(options: argparse.Namespace, found: str) -> None:
    target = options.save_model_type
    for is_used, why, flags in (
        (
            target == "mg",
            f"{target} is not cut into ranks; a layout is only given to write mg",
            {
                "target_tensor_parallel_size": 1,
                "target_pipeline_parallel_size": 1,
                "num_layer_list": None,
                "transformer_impl": "local",
                "make_vocab_size_divisible_by": 1,
            },
        ),
        (
            found == "mg",
            f"{found} has its own config.json and no pickles; this is only given to read mg",
            {"hf_cfg_dir": None, "trust_pickle": False},
        ),
        (
            "mg" not in (found, target),
            "one process converts mg; this is the layout of several, between hf and mcore",
            {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1},
        ),
    ):
        for flag, default in flags.items():
            if not is_used and getattr(options, flag) != default:
                raise ConfigError(why, where="--" + flag.replace("_", "-"), fix="Leave it out")


def _type_of(directory: Path) -> str | None:
    number = latest_iteration(directory)
    if number is not None:
        iteration = iteration_directory(directory, number)
        return "mg" if any(iteration.glob("mp_rank_*")) else "mcore"
    return "hf" if (directory / "config.json").exists() else None


def _check_iteration(iteration: int | None, found: str, directory: Path) -> None:
    there = iterations(directory) if found == "mcore" else []
    if iteration is not None and iteration not in there:
        raise ConfigError(
            "no such iteration" if there else f"{found} has one set of weights",
            where="--iteration",
            expected=", ".join(map(str, there)) or "no number",
            found=iteration,
        )


def _check_model_type(options: argparse.Namespace, found: str) -> None:
    named, directory = options.model_type_hf, Path(options.load_dir)
    files = Path(options.hf_cfg_dir or (directory if found == "hf" else directory / FOLDER))
    if named is None or not (files / "config.json").exists():
        return
    model = "qwen3" if ModelConfig.from_hf(files).qk_layernorm else "llama2"
    if named != model:
        raise ConfigError(
            "config.json is of another model", where="--model-type-hf", expected=model, found=named
        )
