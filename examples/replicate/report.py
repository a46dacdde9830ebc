"""Write the study's tables and figures from its rows.

    python -m examples.replicate.report --rows docs/evidence/rows.csv --output-dir OUT

Writes ``tables.md`` and the figures as PNG, and replaces only files of an earlier report.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from examples.replicate import curves, tables
from examples.replicate.figures import draw_figures
from megatron_replay.errors import EXIT_INTERRUPTED, DataError, ReplayError
from megatron_replay.files import atomic_file, make_directory
from tools.report import require_replaceable

_TITLE = "# Tables of the study\n"
_NOTE = """
± is the sample standard deviation over the n seeds; in brackets is the 95 % confidence interval of
the mean. Differences are paired by seed. ΔPPL is the perplexity of general text less the base's.
Equal gain: ΔPPL of the method's sweep less the reference's at one domain score, interpolated
between neighbouring learning rates of each seed; nothing is extrapolated.
"""


def all_tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Every table that the rows suffice for, by title."""
    found = tables.paper_tables(rows) | {"Remedies": tables.remedies(rows)} | tables.sweeps(rows)
    found["Against full softmax at one rate"] = tables.at_one_rate(rows)
    found["Forgetting at equal gain"] = curves.equal_gain(rows)
    return {title: table for title, table in found.items() if not table.empty}


def write_report(paths: list[Path], output: Path) -> list[str]:
    """Write ``tables.md`` and the figures into ``output``; returns the figures' names.

    Raises:
        DataError: the rows cannot be read, or suffice for no table.
        OutputError: the directory holds files that are not from an earlier report.
    """
    rows = tables.load_rows(paths)
    found = all_tables(rows)
    if not found:
        raise DataError("no table has a line", where=", ".join(map(str, paths)))
    require_replaceable(
        output, ["tables.md"], {"tables.md": (_TITLE,)}, [("--rows", path) for path in paths]
    )
    make_directory(output)
    drawn = draw_figures(rows, output)
    parts = [_TITLE, _NOTE]
    parts += [f"\n## {title}\n\n{tables.markdown(table)}" for title, table in found.items()]
    parts += ["\n## Figures\n\n", *(f"![{name}]({name})\n" for name in drawn)]
    with atomic_file(output / "tables.md", "w") as handle:
        handle.writelines(parts)
    return drawn


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=Path, action="append", required=True, help="repeatable")
    parser.add_argument("--output-dir", type=Path, required=True)
    options = parser.parse_args(argv)
    try:
        drawn = write_report(options.rows, options.output_dir)
    except ReplayError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(f"{options.output_dir}: tables.md and {len(drawn)} figures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
