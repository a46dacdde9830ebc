"""Markdown tables as dictionaries, so that tests look at values and not at the layout."""

from __future__ import annotations


def table(text: str, title: str) -> list[dict[str, str]]:
    """The lines of the first table after the heading ``title``, each a cell by column."""
    _, found, after = text.partition(f"# {title}\n")
    assert found, f"no heading {title}"
    return parsed(after.strip().partition("\n\n")[0])


def parsed(lines: str) -> list[dict[str, str]]:
    """A table's lines; of columns of one title, the last."""
    header, _, *rows = cells(lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def cells(lines: str) -> list[list[str]]:
    """A table's lines, header and rule included, each a list of cells."""
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines.splitlines()]
