"""Report what each method gained, what it kept and what it cost.

    python tools/report.py --evaluation eval.json --run full=runs/full --run replay=runs/replay \
        --output-dir runs/report

Writes ``report.json``, ``report.md`` and ``report.png``. Names are those given to
``tools/evaluate.py``; a run's directory holds ``metrics.jsonl`` and ``resolved_config.yaml``.

For tables over seeds, keep every run as a row, the base model too, and make the tables of the rows
(``row --help``, ``tables --help``):

    python tools/report.py row --evaluation eval.json --model base --base mine --rows rows.jsonl
    python tools/report.py row --evaluation eval.json --model full --run runs/full --base mine \
        --method AdamW --table methods --rows rows.jsonl
    python tools/report.py tables --rows rows.jsonl --output-dir runs/tables
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_replay.errors import EXIT_INTERRUPTED, ConfigError, ReplayError
from megatron_replay.evaluation.entries import strict
from megatron_replay.evaluation.figure import report_figure
from megatron_replay.evaluation.figure_style import save
from megatron_replay.evaluation.inputs import named_paths, require_utf8
from megatron_replay.evaluation.outputs import printable, require_replaceable
from megatron_replay.evaluation.report import build_report, read_timings, render_markdown
from megatron_replay.evaluation.rows import (
    TABLES,
    Row,
    append_row,
    base_row,
    read_configuration,
    read_rows,
    row_of_run,
)
from megatron_replay.evaluation.suite import read_evaluation
from megatron_replay.evaluation.write_tables import write_tables
from megatron_replay.files import atomic_file, make_directory, require_apart, write_json
from megatron_replay.run_log import CONFIG, METRICS, summarize_run

#: What earlier reports left, and what stands in it.
_SIGNS = {
    "report.json": ('"methods": ', '"timings": ', '"commands": '),
    "report.md": ("# Report\n\n![gain against forgetting](report.png)",),
}


def parser() -> argparse.ArgumentParser:
    """The command line of one report."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--evaluation", type=Path, required=True, help="from tools/evaluate.py")
    flags.add_argument("--run", action="append", default=[], metavar="NAME=DIR", help="repeatable")
    flags.add_argument("--timings", type=Path, help='JSON: {"part": seconds, …}')
    flags.add_argument("--output-dir", type=Path, required=True, help="directory to write")
    return flags


def row_parser() -> argparse.ArgumentParser:
    """The command line of ``row``."""
    flags = argparse.ArgumentParser(
        prog="report.py row", description="Append a run, or a base model, to a file of rows."
    )
    flags.add_argument("--evaluation", type=Path, required=True, help="from tools/evaluate.py")
    flags.add_argument("--model", required=True, help="its name in the evaluation")
    flags.add_argument("--run", type=Path, help="the run's directory; none for a base model")
    flags.add_argument("--method", help="of the run, as in the tables")
    flags.add_argument("--table", action="append", choices=TABLES, help="that lists it; repeatable")
    flags.add_argument("--variant", default="", help="what differs within the table: 45, bucket")
    flags.add_argument("--base", default="", help="name of the base model: tables never mix two")
    flags.add_argument("--size", default="", help="of the model, as 4B: tables never mix two")
    flags.add_argument("--seed", type=int, help="default: the run's --seed")
    flags.add_argument("--stage0-seconds", type=float, help="what collecting candidates took")
    flags.add_argument("--command", help="that makes the run; default: Stage 1 with its settings")
    flags.add_argument("--rows", type=Path, required=True, help="file to append to")
    return flags


def tables_parser() -> argparse.ArgumentParser:
    """The command line of ``tables``."""
    flags = argparse.ArgumentParser(
        prog="report.py tables",
        description="Make the paper's tables and figures from rows: tables.md, tables.json, "
        "a CSV for each table and a PNG for each figure.",
    )
    flags.add_argument("--rows", type=Path, required=True, action="append", help="repeatable")
    flags.add_argument("--output-dir", type=Path, required=True, help="directory to write")
    flags.add_argument("--reference", help="method that others are compared with: default AdamW")
    flags.add_argument(
        "--at-score", type=float, action="append", default=[], metavar="PERCENT",
        help="domain score at which sweeps are compared; repeatable",
    )  # fmt: skip
    flags.add_argument("--no-figures", action="store_true", help="tables only")
    return flags


def one_report(argv: list[str], command: str) -> str:
    """Write a report of one evaluation and return its tables."""
    given = parser().parse_args(argv)
    runs = named_paths(given.run, flag="--run")
    report = build_report(
        read_evaluation(given.evaluation),
        {name: summarize_run(directory) for name, directory in runs.items()},
        timings=read_timings(given.timings) if given.timings else {},
        command=command,
    )
    figure, markdown = report_figure(report), printable(render_markdown(report))
    inputs = [("--evaluation", given.evaluation), *_run_files(runs.values())]
    inputs += [("--timings", given.timings)] if given.timings else []
    files = ("report.json", "report.md", "report.png")
    require_replaceable(given.output_dir, files, _SIGNS, inputs)
    output = make_directory(given.output_dir)
    # First: it proves that what is beside it is ours.
    write_json(output / "report.json", strict(report))
    with atomic_file(output / "report.md", "w") as handle:
        handle.write(markdown)
    save(figure, output / "report.png")
    return markdown


def _run_files(runs: Iterable[Path]) -> list[tuple[str, Path]]:
    return [("--run", run / name) for run in runs for name in (METRICS, CONFIG)]


def add_row(argv: list[str], command: str) -> str:
    """Append a row and say which."""
    given = row_parser().parse_args(argv)
    evaluation = read_evaluation(given.evaluation)
    entries = {entry["name"]: entry for entry in evaluation["models"]}
    if given.model not in entries:
        raise ConfigError(
            "no such model in the evaluation",
            where="--model",
            expected=" or ".join(entries),
            found=given.model,
        )
    runs = [given.run] if given.run else []
    inputs = [("--evaluation", given.evaluation), *_run_files(runs)]
    require_apart(given.rows, inputs, flag="--rows")
    for name in ("method", "variant", "base", "size"):
        require_utf8(getattr(given, name) or "", where=f"--{name}")
    row = _make_row(given, entries[given.model], evaluation["command"])
    append_row(given.rows, row)
    return f"{given.rows}: {row.method}, seed {row.seed}\n"


def _make_row(given: argparse.Namespace, entry: Mapping[str, Any], evaluated: str) -> Row:
    where = {"base": given.base, "size": given.size}
    if given.run is None:
        for flag in ("method", "variant", "stage0_seconds"):
            if getattr(given, flag):
                raise ConfigError(f"--{flag.replace('_', '-')} is of a run: --run is missing")
        tables = {"tables": given.table} if given.table else {}
        return base_row(
            entry, **tables, **where, seed=given.seed or 0, command=given.command or evaluated
        )
    if not given.method or not given.table:
        raise ConfigError("a run's row needs --method and --table")
    if given.seed is None:
        given.seed = read_configuration(given.run).get("training", {}).get("seed")
        if not isinstance(given.seed, int):
            raise ConfigError("no training seed in the run's configuration: give --seed")
    config = shlex.quote(str(given.run / CONFIG))
    return row_of_run(
        given.run,
        entry,
        method=given.method,
        tables=given.table,
        variant=given.variant,
        seed=given.seed,
        stage0_seconds=given.stage0_seconds,
        command=given.command or f"python -m megatron_replay.stage1 --config {config}",
        **where,
    )


def all_tables(argv: list[str], command: str) -> str:
    """Write the tables and figures of rows, and return the tables and where the rest is."""
    given = tables_parser().parse_args(argv)
    rows = [row for path in given.rows for row in read_rows(path)]
    shown = write_tables(
        rows,
        given.output_dir,
        reference=given.reference,
        at_scores=given.at_score,
        figures=not given.no_figures,
        inputs=[("--rows", path) for path in given.rows],
        command=command,
    )
    where = given.output_dir / "tables.md"
    return f"{shown}{where}: these, and the command and hash behind each line\n"


SUBCOMMANDS = {"row": add_row, "tables": all_tables}


def main(argv: list[str] | None = None) -> int:
    """Do what was asked and print it."""
    argv = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "tools/report.py", *argv])
    try:
        if argv and argv[0] in SUBCOMMANDS:
            text = SUBCOMMANDS[argv[0]](argv[1:], command)
        else:
            text = one_report(argv, command)
    except ReplayError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(printable(text), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
