"""Write the quick start's data: questions about a database, general text, general abilities.

    python -m examples.quickstart.make_data --output runs/quickstart/data

Nothing is downloaded. The same arguments give the same files under the same version of Python.
The directory appears whole; one that is not empty is left as it is.

    domain_train.jsonl     {"prompt", "completion"}: questions and their SQL
    domain_test/           questions.jsonl: held-out questions; database.sqlite: what they ask about
    general_heldout.jsonl  {"text"}: forgetting is measured here
    capitals.jsonl, opposites.jsonl   {"prompt", "options", "answer"}: and here
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from examples.quickstart import abilities, network
from examples.quickstart.general_text import general_texts
from megatron_replay.checkpoint.staging import publish, start_directory
from megatron_replay.cli import exit_code_of
from megatron_replay.errors import ConfigError
from megatron_replay.files import atomic_file, make_directory

COUNTS = {"train": 128, "test": 100, "general": 12}


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line."""
    with atomic_file(path, "w") as handle:
        handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_everything(output: Path, *, train: int, test: int, general: int, seed: int) -> None:
    """Write all files into directory ``output``."""
    domain_test = output / "domain_test"
    make_directory(domain_test)
    database = domain_test / "database.sqlite"
    network.write_database(database, seed=seed)
    try:
        drawn = network.drawn(database, train=train, test=test, seed=seed)
    except ValueError as error:
        raise ConfigError(str(error), where="--train, --test", fix="Ask for fewer") from error
    for path, questions in zip(
        (output / "domain_train.jsonl", domain_test / "questions.jsonl"), drawn, strict=True
    ):
        write_rows(path, ({"prompt": network.prompt(q), "completion": q.sql} for q in questions))
    write_rows(output / "general_heldout.jsonl", ({"text": t} for t in general_texts(general)))
    for ability in abilities.ABILITIES:
        write_rows(output / f"{ability}.jsonl", abilities.questions(ability, seed=seed))


def main(argv: list[str] | None = None) -> int:
    """Write the data; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0, help="decides every draw")
    for name, count in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=count, help=f"rows (default {count})")
    given = vars(parser.parse_args(argv))
    output: Path = given.pop("output")

    def write() -> str:
        for name in COUNTS:
            if given[name] < 1:
                raise ConfigError("must be positive", where=f"--{name}", found=given[name])
        staged = start_directory(output)
        write_everything(staged, **given)
        publish(staged, output, overwrite=False)
        return f"{output}: {given['train']} questions to train on, {given['test']} held out"

    return exit_code_of(write)


if __name__ == "__main__":
    sys.exit(main())
