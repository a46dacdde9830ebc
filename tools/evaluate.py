"""Measure models: what they gained, what they kept.

    python tools/evaluate.py --base runs/base --model full=runs/full --model replay=runs/replay \
        --sql domain=sql/ --choices telecom=choices.jsonl --general-choices cloze=cloze.jsonl \
        --general-text heldout.jsonl --output eval.json

Every input is optional, and what is not given is not measured; docs/evaluation.md has the formats.
A model that ``--output`` already holds a result for, made from the same files and settings, is not
measured again. Prints a line a model; the JSON has all of it.
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

_NAMED = (
    ("--sql", "DIR", "questions and databases: plain, Spider's or BIRD's layout"),
    ("--choices", "FILE", "multiple-choice rows of the domain"),
    ("--general-choices", "FILE", "multiple-choice rows of general abilities: retention"),
)

_SETTINGS = {
    "device": "torch device; auto: this machine's accelerator, or its CPU",
    "dtype": "what the models compute in, on any device",
    "batch_size": "documents or prompts at once",
    "max_new_tokens": "length of a generated query",
    "query_seconds": "time limit of one query",
}

#: Settings that only some inputs read, and these.
_TEXTS = ("general_text", "data", "choices", "general_choices", "sql")
_READ_BY = {
    "batch_size": (*_TEXTS, "lm_eval_tasks", "lm_eval_domain_tasks"),
    "max_new_tokens": ("sql",),
    "query_seconds": ("sql",),
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    settings = Settings()
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument(
        "--base", type=Path, required=True, help="Hugging Face directory; measured too"
    )
    flags.add_argument(
        "--model", action="append", default=[], metavar="NAME=DIR", help="repeatable"
    )
    flags.add_argument("--output", type=Path, required=True, help="the JSON to write")
    inputs = flags.add_argument_group("inputs")
    for flag, kind, what in _NAMED:
        inputs.add_argument(
            flag, action="append", default=[], metavar=f"NAME={kind}", help=f"{what}; repeatable"
        )
    inputs.add_argument(
        "--lm-eval-tasks", default="", metavar="TASK,…", help="lm-eval tasks: retention"
    )
    inputs.add_argument(
        "--lm-eval-domain-tasks", default="", metavar="TASK,…", help="lm-eval tasks of the domain"
    )
    inputs.add_argument(
        "--lm-eval-include-path", type=Path, metavar="DIR", help="YAML files of these tasks"
    )
    inputs.add_argument("--general-text", type=Path, help="text rows: forgetting")
    inputs.add_argument("--data", type=Path, help="held-out rows of any known format")
    inputs.add_argument("--data-path", type=Path, help="corpus prefix, for the outside mass")
    inputs.add_argument("--store", type=Path, help="candidate store of that corpus")
    how = flags.add_argument_group("settings")
    for name, what in _SETTINGS.items():
        default = getattr(settings, name)
        how.add_argument(
            flag_of(name), type=type(default), default=argparse.SUPPRESS,
            choices=("float32", "bfloat16") if name == "dtype" else None,
            help=f"{what} (default: {default})",
        )  # fmt: skip
    return flags


def _inputs(given: dict[str, Any]) -> Inputs:
    named = {
        flag.strip("-").replace("-", "_"): named_paths(
            given[flag.strip("-").replace("-", "_")], flag=flag, kind=kind
        )
        for flag, kind, _ in _NAMED
    }
    tasks = {
        name: tuple(task for task in given[name].split(",") if task)
        for name in ("lm_eval_tasks", "lm_eval_domain_tasks")
    }
    rest = {name: given[name] for name in Inputs.__dataclass_fields__}
    return Inputs(**rest | named | tasks)


def _require_read(given: Mapping[str, Any]) -> None:
    """Raise ConfigError where a setting is given that no input which is given reads."""
    for name, readers in _READ_BY.items():
        if name in given and not any(given[reader] for reader in readers):
            flags = " or ".join(map(flag_of, readers))
            raise ConfigError(
                "has no effect on what is measured",
                where=flag_of(name),
                fix=f"Add {flags}, or leave it out",
            )


def _line(model: Mapping[str, Any]) -> str:
    """The model's scores in the domain, and what general text costs it more than the base."""
    found = [f"{name} {score:.1f} %" for name, score in domain_scores(model).items()]
    change = value_at(model, "general.delta_perplexity")
    if change is not None:
        found.append(f"ΔPPL {change:+.2f}")
    found.append(f"relative L2 {model['relative_l2_percent']:.2f} %")
    return f"{model['name']}: {', '.join(found)}"


def main(argv: list[str] | None = None) -> int:
    """Evaluate and print one line a model, and where all of it is."""
    argv = sys.argv[1:] if argv is None else argv
    given = vars(parser().parse_args(argv))
    try:
        models = named_paths(given["model"], flag="--model")
        if BASE in models:
            raise ConfigError("this name is the base's own", where="--model", found=BASE)
        _require_read(given)
        make_directory(given["output"].absolute().parent)
        document = evaluate(
            given["base"],
            models,
            _inputs(given),
            Settings(
                **{name: given[name] for name in Settings.__dataclass_fields__ if name in given}
            ),
            output=given["output"],
            command=shlex.join(["python", "tools/evaluate.py", *argv]),
        )
    except ReplayError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; models that are done are not measured again", file=sys.stderr)
        return EXIT_INTERRUPTED
    for model in document["models"]:
        print(_line(model))
    print(printable(f"{given['output']}: {len(document['models'])} models"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
