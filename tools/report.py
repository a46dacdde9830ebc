"""Report what each model gained, what it kept and what its run cost.

    python tools/report.py --evaluation eval.json --run full=runs/full --run replay=runs/replay \
        --output-dir runs/report

Writes ``report.json``, ``report.md`` and ``report.png``. Names are those given to
``tools/evaluate.py``; a run's directory contains ``metrics.jsonl`` and ``resolved_config.yaml``.

For tables over seeds and learning rates, see examples/replicate.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from megatron_replay.errors import EXIT_INTERRUPTED, ReplayError
from megatron_replay.evaluation.entries import strict
from megatron_replay.evaluation.figure import report_figure, save
from megatron_replay.evaluation.inputs import named_paths
from megatron_replay.evaluation.outputs import printable, require_replaceable
from megatron_replay.evaluation.report import build_report, read_timings, render_markdown
from megatron_replay.evaluation.suite import read_evaluation
from megatron_replay.files import atomic_file, make_directory, write_json
from megatron_replay.run_log import CONFIG, METRICS, summarize_run

#: Texts that the files of an earlier report contain.
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
    # First: with it, the next report can replace an incomplete one.
    write_json(output / "report.json", strict(report))
    with atomic_file(output / "report.md", "w") as handle:
        handle.write(markdown)
    save(figure, output / "report.png")
    return markdown


def _run_files(runs: Iterable[Path]) -> list[tuple[str, Path]]:
    return [("--run", run / name) for run in runs for name in (METRICS, CONFIG)]


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        text = one_report(argv, shlex.join(["python", "tools/report.py", *argv]))
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
