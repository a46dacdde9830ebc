"""Write the study's tables and figures from its rows.

    python -m examples.replicate.report --rows OUT/rows.csv --output-dir OUT

Writes ``tables.md`` and the figures as PNG, and replaces only files of an earlier report.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from examples.replicate import tables
from examples.replicate.figures import draw_figures
from examples.replicate.results import read_rows
from megatron_replay.cli import exit_code_of
from megatron_replay.errors import DataError
from megatron_replay.files import atomic_file, make_directory
from tools.report import require_replaceable

_TITLE = "# Tables of the study\n"
_NOTE = """
In brackets is the 95 % interval of a bootstrap over questions, and over seeds where a rate has
several. Questions are drawn one by one, although some of Spider's share a query and each cause is
asked twice: the intervals are up to √2 too narrow. ΔPPL is the perplexity of
general text less the base's; retention is the mean over general benchmarks of the score in per cent
of the base's. α is the weight of the tuned model in its average with the base.

At equal gain: the method's curve over learning rates less that of full softmax with AdamW, at one
score, interpolated between neighbouring rates; below 0 the method forgets less. Nothing is
extrapolated.
"""


def write_report(path: Path, output: Path) -> list[str]:
    """Write ``tables.md`` and the figures into ``output``; returns the figures' names.

    Raises:
        DataError: the rows cannot be read, or there are none.
        OutputError: the directory holds files that are not from an earlier report.
    """
    rows = read_rows(path)
    if not rows:
        raise DataError("no rows", where=path)
    found = {
        f"Runs: {domain}": tables.runs(rows, domain)
        for domain in dict.fromkeys(row.domain for row in rows)
    }
    found["At equal gain"] = tables.equal_gain(rows)
    require_replaceable(output, ["tables.md"], {"tables.md": (_TITLE,)}, [("--rows", path)])
    make_directory(output)
    drawn = draw_figures(rows, output)
    parts = [_TITLE, _NOTE]
    parts += [f"\n## {name}\n\n{tables.markdown(table)}" for name, table in found.items() if table]
    parts += ["\n## Figures\n\n", *(f"![{name}]({name})\n" for name in drawn)]
    with atomic_file(output / "tables.md", "w") as handle:
        handle.writelines(parts)
    return drawn


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    options = parser.parse_args(argv)

    def write() -> str:
        drawn = write_report(options.rows, options.output_dir)
        return f"{options.output_dir}: tables.md and {len(drawn)} figures"

    return exit_code_of(write, interrupted="run the same command again")


if __name__ == "__main__":
    sys.exit(main())
