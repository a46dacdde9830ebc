"""Measure a base and the models made from it: what they gained, and what they kept.

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

from megatron_replay.errors import EXIT_INTERRUPTED, ConfigError, ReplayError
from megatron_replay.evaluation.inputs import Inputs, Settings, flag_of, named_paths
from megatron_replay.evaluation.outputs import printable
from megatron_replay.evaluation.scores import domain_scores, value_at
from megatron_replay.evaluation.suite import BASE, evaluate
from megatron_replay.files import make_directory

#: Inputs of which each has a name: what is given beside it, and what it is.
_NAMED = {
    "sql": ("DIR", "questions and databases, in the layout of Spider, of BIRD, or plain"),
    "choices": ("FILE", "multiple-choice rows of the domain"),
    "general_choices": ("FILE", "multiple-choice rows of general abilities, for retention"),
}
_TASKS = {
    "lm_eval_tasks": "lm-eval tasks of general abilities, for retention",
    "lm_eval_domain_tasks": "lm-eval tasks of the domain",
}
_PATHS = {
    "lm_eval_include_path": "directory of these tasks' YAML files",
    "general_text": "text rows that show what is forgotten",
    "data": "held-out rows of the domain, of any format",
    "data_path": "prefix of the corpus whose outside mass is measured",
    "store": "candidate store of that corpus",
}
_SETTINGS = {
    "device": "torch device; auto: this machine's accelerator, or its CPU",
    "dtype": "float32 or bfloat16: the number format of the models",
    "batch_size": "documents or prompts in a batch",
    "max_new_tokens": "most tokens of a generated query",
    "query_seconds": "time limit of a query",
}
#: The inputs that read a setting; the others are read by all.
_READ_BY = {
    "batch_size": {*_NAMED, *_TASKS, "general_text", "data"},
    "max_new_tokens": {"sql"},
    "query_seconds": {"sql"},
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--base", type=Path, required=True, help="Hugging Face directory")
    flags.add_argument(
        "--model", action="append", default=[], metavar="NAME=DIR", help="repeatable"
    )
    flags.add_argument("--output", type=Path, required=True, help="the JSON to write")
    inputs = flags.add_argument_group("inputs")
    for name, (kind, what) in _NAMED.items():
        text = f"{what}; repeatable"
        inputs.add_argument(
            flag_of(name), action="append", default=[], metavar=f"NAME={kind}", help=text
        )
    for name, what in _TASKS.items():
        inputs.add_argument(flag_of(name), default="", metavar="TASK,…", help=what)
    for name, what in _PATHS.items():
        inputs.add_argument(flag_of(name), type=Path, metavar="PATH", help=what)
    how = flags.add_argument_group("settings")
    for name, what in _SETTINGS.items():
        default = getattr(Settings(), name)
        text = f"{what} (default: {default})"
        how.add_argument(flag_of(name), type=type(default), default=argparse.SUPPRESS, help=text)
    return flags


def _inputs(given: Mapping[str, Any]) -> Inputs:
    values: dict[str, Any] = {name: given[name] for name in _PATHS}
    for name, (kind, _) in _NAMED.items():
        values[name] = named_paths(given[name], flag=flag_of(name), kind=kind)
    for name in _TASKS:
        values[name] = tuple(filter(None, given[name].split(",")))
    return Inputs(**values)


def _settings(given: Mapping[str, Any]) -> Settings:
    for name, readers in _READ_BY.items():
        if name in given and not any(given[reader] for reader in readers):
            flags = " or ".join(map(flag_of, sorted(readers)))
            raise ConfigError(
                "has no effect on what is measured",
                where=flag_of(name),
                fix=f"Add {flags}, or leave it out",
            )
    return Settings(**{name: given[name] for name in _SETTINGS if name in given})


def _line(model: Mapping[str, Any]) -> str:
    """The model's scores in the domain, and its distance from the base on general text."""
    found = [f"{name} {score:.1f} %" for name, score in domain_scores(model).items()]
    change = value_at(model, "general.delta_perplexity")
    if change is not None:
        found.append(f"ΔPPL {change:+.2f}")
    found.append(f"relative L2 {model['relative_l2_percent']:.2f} %")
    return f"{model['name']}: {', '.join(found)}"


def main(argv: list[str] | None = None) -> int:
    """Evaluate, and print one line per model."""
    argv = sys.argv[1:] if argv is None else argv
    given = vars(parser().parse_args(argv))
    try:
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
    except ReplayError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; finished models are not measured again", file=sys.stderr)
        return EXIT_INTERRUPTED
    for model in document["models"]:
        print(_line(model))
    print(printable(f"{given['output']}: {len(document['models'])} models"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
