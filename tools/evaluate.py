r"""Measure a base and the models made from it: what they gained, and what they kept.

    python tools/evaluate.py --base runs/base --model full=runs/full --model replay=runs/replay \
        --sql domain=sql/ --choices telecom=choices.jsonl --general-choices cloze=cloze.jsonl \
        --general-text heldout.jsonl --output eval.json

Only the inputs that are given are measured; docs/evaluation.md describes their formats. A result
that --output already has, made from the same files and settings, is reused. Prints one line per
model; the JSON has every number.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_replay.cli import exit_code_of
from megatron_replay.config import flag_name
from megatron_replay.errors import ConfigError
from megatron_replay.evaluation.inputs import FLAGS, Inputs, Settings, named_paths
from megatron_replay.evaluation.results import BASE, printable, scores, value_at
from megatron_replay.evaluation.suite import evaluate
from megatron_replay.files import make_directory
from megatron_replay.flags import Parser, add_flags, from_flags

_TEXTS = FLAGS.keys() - {"data_path", "store", "lm_eval_include_path"}
_PROMPTS = _TEXTS - {"general_choices", "general_text"}
_LM_EVAL = {"lm_eval_tasks", "lm_eval_domain_tasks"}
#: The inputs that read a setting; the others are read by all.
_READ_BY = {
    "batch_size": _TEXTS,
    "chat_template": _PROMPTS,
    "system_prompt": _PROMPTS - _LM_EVAL,
    "add_bos": _TEXTS,
    "max_new_tokens": {"sql"},
    "unwrap": {"sql"},
    "query_seconds": {"sql"},
    "gold_seconds": {"sql"},
    "leave_out": {"sql"},
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument(
        "--base", type=Path, required=True, help="the base model's Hugging Face directory"
    )
    flags.add_argument("--model", action="append", default=[], metavar="NAME=DIR",
        help="a tuned model, as a Hugging Face directory; repeatable")  # fmt: skip
    flags.add_argument("--output", type=Path, required=True, help="the JSON to write")
    inputs = flags.add_argument_group("inputs")
    for name, (metavar, text) in FLAGS.items():
        how: dict[str, Any] = {"metavar": metavar, "help": text}
        if metavar.startswith("NAME="):
            how |= {"action": "append", "default": [], "help": f"{text}; repeatable"}
        elif metavar == "PATH":
            how["type"] = Path
        inputs.add_argument(flag_name(name), **how)
    add_flags(flags.add_argument_group("settings"), Settings)
    return flags


def _inputs(given: Mapping[str, Any]) -> Inputs:
    values: dict[str, Any] = {}
    for name, (metavar, _) in FLAGS.items():
        value = given[name]
        if metavar.startswith("NAME="):
            value = named_paths(value, flag=flag_name(name), metavar=metavar)
        elif metavar != "PATH":
            value = tuple(filter(None, (value or "").split(",")))
        values[name] = value
    return Inputs(**values)


def _settings(given: Mapping[str, Any]) -> Settings:
    for name, readers in _READ_BY.items():
        if name == "system_prompt" and given.get("chat_template"):
            readers = readers | _LM_EVAL  # plain text otherwise
        if name in given and not any(given[reader] for reader in readers):
            flags = " or ".join(map(flag_name, sorted(readers)))
            raise ConfigError(
                "has no effect on what is measured",
                where=flag_name(name),
                fix=f"Add {flags}, or leave it out",
            )
    return from_flags(Settings, given)


def _line(model: Mapping[str, Any]) -> str:
    """The model's scores in the domain, and its distance from the base."""
    found = [f"{name} {score:.1f} %" for name, score in scores(model, general=False).items()]
    held_out = value_at(model, "data.perplexity")
    if held_out is not None:
        found.append(f"held-out perplexity {held_out:.2f}")
    change = value_at(model, "general.delta_perplexity")
    if change is not None:
        found.append(f"ΔPPL {change:+.2f}")
    found.append(f"relative L2 {model['relative_l2_percent']:.2f} %")
    return f"{model['name']}: {', '.join(found)}"


def run(argv: list[str]) -> str:
    """Evaluate, and return one line per model."""
    given = vars(parser().parse_args(argv))
    models = named_paths(given["model"], flag="--model")
    if BASE in models:
        raise ConfigError("this name is the base's own", where="--model", found=BASE)
    settings, inputs = _settings(given), _inputs(given)
    make_directory(given["output"].absolute().parent)
    document = evaluate(
        given["base"],
        models,
        inputs,
        settings,
        output=given["output"],
        command=shlex.join(["python", "tools/evaluate.py", *argv]),
    )
    written = printable(f"{given['output']}: {len(document['models'])} models")
    return "\n".join([*map(_line, document["models"]), written])


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    given = sys.argv[1:] if argv is None else argv
    return exit_code_of(lambda: run(given), interrupted="finished models are not measured again")


if __name__ == "__main__":
    sys.exit(main())
