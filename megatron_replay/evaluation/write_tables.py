"""``tables.md``, ``tables.json``, a CSV a table, a PNG a figure: all that rows tell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_replay.errors import ConfigError, DataError
from megatron_replay.evaluation import table_text
from megatron_replay.evaluation.curve_tables import compare_curves
from megatron_replay.evaluation.paper_figures import draw_figures
from megatron_replay.evaluation.paper_tables import paper_tables
from megatron_replay.evaluation.rows import Row
from megatron_replay.files import atomic_file, write_json


def write_tables(
    rows: Sequence[Row],
    output: Path,
    *,
    reference: str | None = None,
    at_scores: Sequence[float] = (),
    figures: bool = True,
    command: str,
) -> str:
    """Write everything into ``output`` and return the tables alone, for a terminal.

    Raises:
        ConfigError: no row is of ``reference``.
        DataError: no row is in any table, or two runs claim one place in a line.
    """
    methods = dict.fromkeys(row.method for row in rows)
    if reference and reference not in methods:
        raise ConfigError(
            "no row of this method",
            where="--reference",
            expected=" or ".join(methods),
            found=reference,
        )
    tables = paper_tables(rows, reference=reference)
    if not tables:
        raise DataError("no table has a line", expected="rows with --table and scores")
    comparisons = compare_curves(rows, reference=reference, at_scores=at_scores)
    lines: list[str] = []
    for table in tables:
        lines += table_text.markdown_table(table)
    lines += table_text.markdown_comparisons(comparisons)
    shown = "\n".join(lines) + "\n"
    lines = ["# Tables", "", *lines]
    if figures:
        lines += ["## Figures", ""]
        lines += [f"![{name.removesuffix('.png')}]({name})" for name in draw_figures(rows, output)]
        lines += [""]
    lines += table_text.sources(tables)
    lines += ["Made by", "", "```", command, "```"]
    with atomic_file(output / "tables.md", "w") as handle:
        handle.write("\n".join(lines) + "\n")
    for name in dict.fromkeys(table.name for table in tables):
        with atomic_file(output / f"{name}.csv", "w") as handle:
            handle.write(table_text.to_csv([table for table in tables if table.name == name]))
    write_json(
        output / "tables.json",
        {
            "format": table_text.FORMAT,
            "command": command,
            "tables": [table_text.to_json(table) for table in tables],
            "curves": [table_text.comparison_json(comparison) for comparison in comparisons],
        },
    )
    return shown
