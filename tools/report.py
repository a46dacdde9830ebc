"""Report what each method gained, what it kept and what it cost.

    python tools/report.py --evaluation eval.json --run full=runs/full --run replay=runs/replay \
        --output-dir runs/report

Writes ``report.json``, ``report.md`` and ``report.png``. Names are those given to
``tools/evaluate.py``; a run's directory holds ``metrics.jsonl`` and ``resolved_config.yaml``.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from megatron_replay.errors import EXIT_INTERRUPTED, ReplayError
from megatron_replay.evaluation.figure import draw_report
from megatron_replay.evaluation.inputs import named_paths
from megatron_replay.evaluation.report import build_report, read_timings, render_markdown
from megatron_replay.evaluation.run_log import summarize_run
from megatron_replay.evaluation.suite import read_evaluation
from megatron_replay.files import atomic_file, make_directory, write_json


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--evaluation", type=Path, required=True, help="from tools/evaluate.py")
    flags.add_argument("--run", action="append", default=[], metavar="NAME=DIR", help="repeatable")
    flags.add_argument("--timings", type=Path, help='JSON: {"part": seconds, …}')
    flags.add_argument("--output-dir", type=Path, required=True, help="directory to write")
    return flags


def main(argv: list[str] | None = None) -> int:
    """Write the report and print its tables."""
    argv = sys.argv[1:] if argv is None else argv
    given = parser().parse_args(argv)
    try:
        runs = named_paths(given.run, flag="--run")
        report = build_report(
            read_evaluation(given.evaluation),
            {name: summarize_run(directory) for name, directory in runs.items()},
            timings=read_timings(given.timings) if given.timings else {},
            command=shlex.join(["python", "tools/report.py", *argv]),
        )
        markdown = render_markdown(report)
        output = make_directory(given.output_dir)
        draw_report(report, output / "report.png")
        with atomic_file(output / "report.md", "w") as handle:
            handle.write(markdown)
        write_json(output / "report.json", report)
    except ReplayError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(markdown, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
