"""``tables.md``, ``tables.json``, a CSV a table, a PNG a figure: all that rows tell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_replay.errors import ConfigError, DataError
from megatron_replay.evaluation import table_text
from megatron_replay.evaluation.curve_tables import compare_curves
from megatron_replay.evaluation.entries import strict
from megatron_replay.evaluation.outputs import printable, require_replaceable
from megatron_replay.evaluation.paper_figures import draw_figures, figure_files
from megatron_replay.evaluation.paper_tables import paper_tables
from megatron_replay.evaluation.rows import Row
from megatron_replay.files import atomic_file, make_directory, write_json

#: What earlier tables left, and what stands in it.
_SIGNS = {
    "tables.json": ('"curves": ', '"tables": ', '"command": '),
    "tables.md": ("# Tables\n", "## Where the numbers come from\n", "\nMade by\n"),
}


def write_tables(
    rows: Sequence[Row],
    output: Path,
    *,
    reference: str | None = None,
    at_scores: Sequence[float] = (),
    figures: bool = True,
    inputs: Sequence[tuple[str, Path]] = (),
    command: str,
) -> str:
    """Write everything into ``output`` and return the tables alone, for a terminal.

    Args:
        inputs: (flag, path) of the files that the rows are from.

    Raises:
        ConfigError: no row is of ``reference``, or an output is an input.
        DataError: no row is in any table, or two runs claim one place in a line.
        OutputError: a file of one of the names is there, and no tables of ours beside it.
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
    csv_files = {f"{name}.csv": name for name in dict.fromkeys(table.name for table in tables)}
    drawn = figure_files(rows) if figures else []
    require_replaceable(output, [*_SIGNS, *csv_files, *drawn], _SIGNS, inputs)
    make_directory(output)
    comparisons = compare_curves(rows, reference=reference, at_scores=at_scores)
    lines: list[str] = []
    for table in tables:
        lines += table_text.markdown_table(table)
    lines += table_text.markdown_comparisons(comparisons)
    shown = printable("\n".join(lines) + "\n")
    content = {
        "format": table_text.FORMAT,
        "command": command,
        "tables": [table_text.to_json(table) for table in tables],
        "curves": [table_text.comparison_json(comparison) for comparison in comparisons],
    }
    # First: it proves that what is beside it is ours.
    write_json(output / "tables.json", strict(content))
    lines = ["# Tables", "", *lines]
    if figures:
        lines += ["## Figures", ""]
        lines += [f"![{name.removesuffix('.png')}]({name})" for name in draw_figures(rows, output)]
        lines += [""]
    lines += table_text.sources(tables)
    lines += ["Made by", "", "```", command, "```"]
    with atomic_file(output / "tables.md", "w") as handle:
        handle.write(printable("\n".join(lines) + "\n"))
    for file, name in csv_files.items():
        with atomic_file(output / file, "w") as handle:
            own = [table for table in tables if table.name == name]
            handle.write(printable(table_text.to_csv(own)))
    return shown
