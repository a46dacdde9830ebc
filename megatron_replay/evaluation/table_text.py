"""Tables as Markdown, CSV and JSON, and where each line's numbers come from."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_replay.evaluation.comparison import Spread
from megatron_replay.evaluation.curve_tables import CurveComparison
from megatron_replay.evaluation.report import markdown_row
from megatron_replay.evaluation.rows import Row
from megatron_replay.evaluation.tables import Cell, Column, Line, Table, ranking

FORMAT = 1
_MARKS = {1: "**{}**", 2: "<u>{}</u>"}


def written(value: float, form: str) -> str:
    """A number, never −0; "∞" and "–" for what is not finite."""
    if math.isfinite(value):
        text = format(value, form)
        return format(0.0, form) if float(text) == 0 else text
    return "–" if math.isnan(value) else "∞"


def markdown_cell(cell: Cell, column: Column, mark: int | None, seeds: int) -> str:
    """``**21.0 ± 1.2** (+0.5)``; the seeds of a cell that has not all of its line's are told."""
    value, form = cell.value, column.quantity.form
    if value is None:
        return "–"
    mean = written(value.mean, form)
    if column.form == "spread":
        text = mean if value.std is None else f"{mean} ± {written(value.std, form.lstrip('+'))}"
    else:
        text = mean if value.half_width is None else f"{mean} {interval(value, form)}"
    text = _MARKS[mark].format(text) if mark else text
    if cell.difference is not None:
        text += f" ({written(cell.difference, '+' + form.lstrip('+'))})"
    return text if value.n == seeds else f"{text} [n = {value.n}]"


def interval(value: Spread, form: str) -> str:
    """``[19.8, 22.2]``: the 95 % interval of the mean."""
    half = value.half_width or 0.0
    return f"[{written(value.mean - half, form)}, {written(value.mean + half, form)}]"


def markdown_table(table: Table) -> list[str]:
    """Title, lines, and what the marks mean; the last column counts the seeds."""
    where = ", ".join(part for part in (table.base, table.size) if part)
    columns = table.columns
    lines = [
        f"## {table.title}" + (f" ({where})" if where else ""),
        "",
        markdown_row([*table.labels, *(column.title for column in columns), "n"]),
        "|" + "---|" * len(table.labels) + "---:|" * (len(columns) + 1),
    ]
    marks = [
        ranking(table, i, lambda value, form=column.quantity.form: written(value, form))  # type: ignore[misc]
        for i, column in enumerate(columns)
    ]
    for number, line in enumerate(table.lines):
        cells = [
            markdown_cell(cell, column, marks[i].get(number), len(line.rows))
            for i, (cell, column) in enumerate(zip(line.cells, columns, strict=True))
        ]
        lines.append(markdown_row([*line.label, *cells, str(len(line.rows))]))
    return [*lines, "", *_note(table, any(marks))]


def _note(table: Table, marked: bool) -> list[str]:
    forms = {column.form for column in table.columns}
    sentences = []
    if "spread" in forms and any(len(line.rows) > 1 for line in table.lines):
        sentences.append("± is the sample standard deviation over n seeds.")
    if forms & {"interval", "paired"} and any(len(line.rows) > 1 for line in table.lines):
        sentences.append("In brackets: the 95 % confidence interval of the mean over n seeds.")
    if "paired" in forms:
        sentences.append(f"Paired: difference from {table.reference}, seed by seed.")
    if any(cell.difference is not None for line in table.lines for cell in line.cells):
        sentences.append(f"In parentheses: difference from {table.reference}.")
    if marked:
        sentences.append("**Best**, <u>second best</u>.")
    return [" ".join(sentences), ""] if sentences else []


def markdown_comparisons(comparisons: Sequence[CurveComparison]) -> list[str]:
    """The curves' table; nothing without sweeps."""
    if not comparisons:
        return []
    lines = [
        "## Forgetting at equal gain",
        "",
        "| base | size | method | against | domain mean, % | ΔPPL difference ↓ | n |",
        "|---|---|---|---|---:|---:|---:|",
    ]
    for c in comparisons:
        at = "–" if c.at is None else f"{c.at:.1f}" + (" (its own)" if c.own_score else "")
        value, n = c.why_not or "–", "–"
        if c.difference:
            n = str(c.difference.n)
            value = written(c.difference.mean, "+.2f")
            value += f" {interval(c.difference, '+.2f')}" if c.difference.n > 1 else ""
        lines.append(markdown_row([c.base, c.size, c.method, c.reference, at, value, n]))
    return [
        *lines,
        "",
        "ΔPPL of the method's sweep less the reference's, where both have the domain score of the "
        "line, interpolated between neighbouring learning rates of one seed and paired by seed "
        "(where a higher rate lowers the score, the stretch between does not count); the 95 % "
        "confidence interval of the mean over n seeds. Nothing is extrapolated. A method "
        'with one learning rate is compared at "its own" score of each seed.',
        "",
    ]


def sources(tables: Sequence[Table]) -> list[str]:
    """Of each line, once: tables, seeds, configuration, its hash, the first seed's command.

    The seeds are those of all these tables; each counts its own in its last column.
    """
    listed: dict[tuple[Any, ...], tuple[Row, dict[int, Row], list[str]]] = {}
    for table in tables:
        for line in table.lines:
            first = line.first
            key = (*_identity(line), first.lr, first.config_hash)
            _, by_seed, names = listed.setdefault(key, (first, {}, []))
            by_seed |= {row.seed: row for row in line.rows}
            names += [table.name] if table.name not in names else []
    lines = ["## Where the numbers come from", ""]
    for row, by_seed, names in listed.values():
        rows = list(by_seed.values())
        name = ", ".join(p for p in (row.method, row.variant, row.base, row.size) if p)
        told = [f"in {', '.join(names)}"]
        if not row.is_base:
            seeds = ", ".join(str(seed) for seed in sorted(by_seed))
            rates = sorted({r.lr for r in rows if r.lr is not None})
            rate = f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g}"
            told += [
                f"loss {row.loss}",
                f"{row.optimizer}, learning rate {rate}",
                f"seed{'s'[: len(rows) > 1]} {seeds}",
            ]
            one = "" if len({r.config_hash for r in rows}) == 1 else "first seed's "
            told += [f"{one}configuration `{row.config_hash[:12]}`"]
        lines += [f"- {name} ({'; '.join(told)}): `{row.command}`"]
    return [*lines, ""]


def _identity(line: Line) -> tuple[str, ...]:
    return line.first.method, line.first.variant, line.first.base, line.first.size


def to_csv(tables: Sequence[Table]) -> str:
    """All tables of one name as one CSV; a column is empty where a base has no such benchmark."""
    found: list[dict[str, Any]] = []
    for table in tables:
        for line in table.lines:
            first = line.first
            values: dict[str, Any] = {
                "base": first.base,
                "size": first.size,
                "method": first.method,
                "variant": first.variant,
                "lr": first.lr,
                "n": len(line.rows),
            }
            for cell, column in zip(line.cells, table.columns, strict=True):
                values |= _csv_values(cell, column)
            found.append(values | {"config_hash": first.config_hash, "command": first.command})
    header = list(dict.fromkeys(name for values in found for name in values))
    header = [*(h for h in header if h not in ("config_hash", "command")), "config_hash", "command"]
    text = io.StringIO()
    writer = csv.DictWriter(text, header, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()


def _csv_values(cell: Cell, column: Column) -> dict[str, Any]:
    value = cell.value
    values: dict[str, Any] = {
        column.name: value.mean if value else None,
        f"{column.name} std": value.std if value else None,
    }
    if column.form != "spread":
        values[f"{column.name} 95% half-width"] = value.half_width if value else None
    if column.with_difference:
        values[f"{column.name} difference"] = cell.difference
    return values


def to_json(table: Table) -> dict[str, Any]:
    """A table with every number unrounded."""
    return {
        "name": table.name,
        "title": table.title,
        "base": table.base,
        "size": table.size,
        "reference": table.reference,
        "columns": [
            {"name": c.name, "title": c.quantity.title, "better": c.quantity.better}
            for c in table.columns
        ],
        "lines": [_line_json(line, table.columns) for line in table.lines],
    }


def _line_json(line: Line, columns: Sequence[Column]) -> dict[str, Any]:
    first = line.first
    rows = sorted(line.rows, key=lambda row: row.seed)
    return {
        "label": list(line.label),
        "method": first.method,
        "variant": first.variant,
        "base": first.base,
        "size": first.size,
        "loss": first.loss,
        "optimizer": first.optimizer,
        "seeds": [row.seed for row in rows],
        "lrs": [row.lr for row in rows],
        "config_hashes": [row.config_hash for row in rows],
        "commands": [row.command for row in rows],
        "cells": {
            column.name: None
            if cell.value is None
            else {
                "mean": cell.value.mean,
                "std": cell.value.std,
                "half_width_95": cell.value.half_width,
                "n": cell.value.n,
                "difference": cell.difference,
                "values": None
                if column.form == "paired"
                else [column.quantity.measure(row) for row in rows],
            }
            for cell, column in zip(line.cells, columns, strict=True)
        },
    }


def comparison_json(comparison: CurveComparison) -> dict[str, Any]:
    """A comparison with every number unrounded."""
    return asdict(comparison)
