r"""Report what each model gained, what it kept and what its run cost.

    python tools/report.py --evaluation eval.json --run full=runs/full --run replay=runs/replay \
        --output-dir runs/report

Writes ``report.json``, ``report.md`` and ``report.png``. Names are those given to
``tools/evaluate.py``; a run's directory contains ``metrics.jsonl`` and ``resolved_config.yaml``.

For tables over seeds and learning rates, see examples/replicate.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megatron_replay.cli import exit_code_of
from megatron_replay.errors import DataError, OutputError
from megatron_replay.evaluation.inputs import named_paths
from megatron_replay.evaluation.report import build_report, render_markdown, report_figure
from megatron_replay.evaluation.results import printable, read_evaluation, strict
from megatron_replay.files import (
    atomic_file,
    is_number,
    make_directory,
    read_json,
    read_text,
    require_apart,
    write_json,
)
from megatron_replay.flags import Parser
from megatron_replay.run_log import CONFIG, METRICS, summarize_run

#: A thousand years: nothing longer was measured.
_LONGEST_SECONDS = 3e10
#: Texts that the files of an earlier report contain.
_SIGNS = {
    "report.json": ('"methods": ', '"timings": ', '"commands": '),
    "report.md": ("# Report\n\n![gain against forgetting](report.png)",),
}


def parser() -> argparse.ArgumentParser:
    """The command line of one report."""
    flags = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument(
        "--evaluation", type=Path, required=True, help="JSON that tools/evaluate.py wrote"
    )
    flags.add_argument("--run", action="append", default=[], metavar="NAME=DIR",
        help="Stage 1's --save of a model, for cost and stability; repeatable")  # fmt: skip
    flags.add_argument("--line", action="append", default=[], type=_line, metavar="NAME,NAME,…",
        help="models that a line joins, such as base, blends and tuned; repeatable")  # fmt: skip
    flags.add_argument("--timings", type=Path, help='JSON to report: {"part": seconds, …}')
    flags.add_argument("--note", default="", help="what a reader should know first")
    flags.add_argument("--output-dir", type=Path, required=True, help="directory to write")
    return flags


def _line(text: str) -> list[str]:
    names = text.split(",")
    if len(names) < 2:
        raise argparse.ArgumentTypeError(f"expected two names or more; found {text}")
    return names


def one_report(argv: list[str], command: str) -> str:
    """Write a report of one evaluation and return its tables."""
    given = parser().parse_args(argv)
    runs = named_paths(given.run, flag="--run")
    report = build_report(
        read_evaluation(given.evaluation),
        {name: summarize_run(directory) for name, directory in runs.items()},
        lines=given.line,
        timings=read_timings(given.timings) if given.timings else {},
        command=command,
        note=given.note,
    )
    figure, markdown = report_figure(report), printable(render_markdown(report))
    inputs = [("--evaluation", given.evaluation), *_run_files(runs.values())]
    inputs += [("--timings", given.timings)] if given.timings else []
    files = ("report.json", "report.md", "report.png")
    require_replaceable(given.output_dir, files, _SIGNS, inputs)
    output = make_directory(given.output_dir)
    # First: with it, the next report can replace an incomplete one.
    write_json(output / "report.json", strict(report))
    with atomic_file(output / "report.md", "w") as handle:
        handle.write(markdown)
    with atomic_file(output / "report.png") as handle:
        figure.savefig(handle, format="png")
    return markdown


def read_timings(path: Path) -> dict[str, float]:
    """Read ``{"part": seconds, …}``, in the order of the file.

    Raises:
        DataError: the file holds anything else.
    """
    timings = read_json(path, DataError)
    for name, seconds in timings.items():
        if not (is_number(seconds) and 0 <= seconds < _LONGEST_SECONDS):
            raise DataError(
                "not timings",
                where=path,
                expected='{"part": seconds, …}',
                found=f"{name!r}: {json.dumps(seconds)[:60]}",
            )
    return {name: float(seconds) for name, seconds in timings.items()}


def require_replaceable(
    directory: Path,
    names: Sequence[str],
    signs: Mapping[str, tuple[str, ...]],
    inputs: Sequence[tuple[str, Path]],
) -> None:
    """Check that writing ``names`` replaces no input, and only files of an earlier report.

    Args:
        signs: texts that files of an earlier report contain, by the file's name; one such file in
            the directory is enough.
        inputs: (flag, path) of each input.

    Raises:
        ConfigError: an output is an input.
        OutputError: a file is there that is not from an earlier report.
    """
    for name in names:
        require_apart(directory / name, inputs, flag="--output-dir")
    there = [name for name in names if os.path.lexists(directory / name)]
    if there and not any(_holds(directory / name, texts) for name, texts in signs.items()):
        raise OutputError(
            "these files are not from an earlier report of ours, so they are not replaced",
            where=directory,
            expected=f"{' or '.join(signs)} of an earlier report beside them",
            found=", ".join(there[:5]),
            fix="Give another --output-dir, or move them away",
        )


def _holds(path: Path, texts: tuple[str, ...]) -> bool:
    try:
        content = read_text(path, DataError)
    except DataError:
        return False
    return all(text in content for text in texts)


def _run_files(runs: Iterable[Path]) -> list[tuple[str, Path]]:
    return [("--run", run / name) for run in runs for name in (METRICS, CONFIG)]


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    given = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "tools/report.py", *given])
    return exit_code_of(
        lambda: printable(one_report(given, command)), interrupted="run the same command again"
    )


if __name__ == "__main__":
    sys.exit(main())
