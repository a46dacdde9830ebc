"""Tables from rows: lines of seeds, columns of quantities; bases and sizes never mixed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_replay.errors import DataError
from megatron_replay.evaluation.comparison import Spread, paired_difference, spread
from megatron_replay.evaluation.rows import Row
from megatron_replay.evaluation.scores import Quantity

#: Lines in the paper's order; other methods follow in the order of their rows.
METHODS = (
    "Base", "AdamW", "AdamW (SFT)", "full softmax", "AdamW, matched", "MoClip (SFT)", "MoFO", "TAM",
    "AdaMuon", "MuonClip", "Dyn. Top-K", "Dyn. Top-K + MoClip",
)  # fmt: skip
#: What the others are compared with, where no name is given: the first of these that is there.
REFERENCES = ("AdamW", "AdamW (SFT)", "full softmax")

#: How a cell is written: mean ± std over seeds, the 95 % interval of the mean, or the difference
#: from the reference paired by seed, with its 95 % interval.
Form = Literal["spread", "interval", "paired"]
Group = tuple[str, str]


@dataclass(frozen=True)
class Column:
    """A quantity, how it is written, and whether the difference from the reference follows it."""

    quantity: Quantity
    form: Form = "spread"
    with_difference: bool = False

    @property
    def title(self) -> str:
        """With an arrow to where it is better."""
        prefix = "paired: " if self.form == "paired" else ""
        return prefix + self.quantity.title + {1: " ↑", -1: " ↓", 0: ""}[self.quantity.better]

    @property
    def name(self) -> str:
        """Key in JSON and CSV."""
        return f"paired_{self.quantity.name}" if self.form == "paired" else self.quantity.name


@dataclass(frozen=True)
class Cell:
    """Over the line's seeds; ``difference`` is of means, from the reference's."""

    value: Spread | None
    difference: float | None = None


@dataclass(frozen=True)
class Line:
    """The seeds of one method, variant, base and size."""

    label: tuple[str, ...]
    rows: tuple[Row, ...]
    cells: tuple[Cell, ...]

    @property
    def first(self) -> Row:
        """The row of the first seed."""
        return min(self.rows, key=lambda row: row.seed)

    @property
    def is_base(self) -> bool:
        """Shown, but not ranked."""
        return self.first.is_base


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table; ``base`` and ``size`` are None where its lines name theirs."""

    name: str
    title: str
    base: str | None
    size: str | None
    labels: tuple[str, ...]
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    reference: str | None
    note: str = ""


LineKey = Callable[[Row], tuple[str, ...]]


def groups_of(rows: Iterable[Row]) -> list[Group]:
    """Bases and sizes, in the order in which they are first met."""
    return list(dict.fromkeys((row.base, row.size) for row in rows))


def in_table(rows: Iterable[Row], table: str, group: Group | None = None) -> list[Row]:
    """The rows listed in one of `rows.TABLES`, of one base and size if given, in the paper's order.

    Of several rows of one run the last is taken: a study that was cut may add one twice.
    """
    found = {
        (row.method, row.variant, row.base, row.size, row.seed, row.lr, row.config_hash): row
        for row in rows
        if table in row.tables and (group is None or (row.base, row.size) == group)
    }
    return sorted(found.values(), key=lambda row: (_rank(row.method), row.variant != ""))


def reference_of(rows: Iterable[Row], asked: str | None) -> str | None:
    """The method that the others are compared with; None where it is not among them."""
    present = {row.method for row in rows}
    return next((m for m in ([asked] if asked else REFERENCES) if m in present), None)


def by_method(row: Row) -> tuple[str, ...]:
    """A line's label: the method, with its variant."""
    return (f"{row.method}, {row.variant}" if row.variant else row.method,)


def lines_of(rows: Iterable[Row], key: LineKey) -> dict[tuple[str, ...], list[Row]]:
    """Rows by line, in the order in which lines are first met.

    Raises:
        DataError: a line would hold two runs of one seed.
    """
    lines: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        line = lines.setdefault(key(row), [])
        for same in line:
            if same.seed == row.seed:
                raise DataError(
                    f"two runs in one line of a table, with learning rates {same.lr} and {row.lr}",
                    where=_name(row),
                    fix="Give one another --variant or --method, or list it in another --table",
                )
        line.append(row)
    return lines


def _rank(method: str) -> int:
    return METHODS.index(method) if method in METHODS else len(METHODS)


def _name(row: Row) -> str:
    return ", ".join(
        part for part in (*by_method(row), row.base, row.size, f"seed {row.seed}") if part
    )


def make_table(
    name: str,
    title: str,
    rows: Sequence[Row],
    columns: Sequence[Column],
    *,
    labels: tuple[str, ...] = ("method",),
    key: LineKey = by_method,
    group: Group | None = None,
    reference: str | None = None,
    note: str = "",
) -> Table | None:
    """Fill a table; None without a run in it. Columns without any value are left out."""
    lines = lines_of(rows, key)
    columns = [c for c in columns if any(c.quantity.measure(row) is not None for row in rows)]
    filled = [
        Line(
            label,
            tuple(line),
            tuple(_cell(column, line, reference_rows(rows, line, reference)) for column in columns),
        )
        for label, line in lines.items()
    ]
    filled = [line for line in filled if any(cell.value for cell in line.cells)]
    if all(line.is_base for line in filled):
        return None
    return Table(
        name=name,
        title=title,
        base=group[0] if group else None,
        size=group[1] if group else None,
        labels=labels,
        columns=tuple(columns),
        lines=tuple(filled),
        reference=reference,
        note=note,
    )


def reference_rows(rows: Sequence[Row], line: Sequence[Row], method: str | None) -> list[Row]:
    """The reference's rows for a line: of its base, size and, where there is one, variant.

    None for the reference's own: neither for itself nor for another variant of it.
    """
    if line[0].method == method or line[0].is_base:
        return []
    of = (line[0].base, line[0].size)
    own = [row for row in rows if row.method == method and (row.base, row.size) == of]
    same = [row for row in own if row.variant == line[0].variant]
    return same or [row for row in own if not row.variant]


def _cell(column: Column, rows: Sequence[Row], reference: Sequence[Row]) -> Cell:
    measure = column.quantity.measure
    if column.form == "paired":
        return Cell(paired_difference(rows, reference, measure) if reference else None)
    value = spread([measure(row) for row in rows])
    base = spread([measure(row) for row in reference]) if column.with_difference else None
    return Cell(value, value.mean - base.mean if value and base else None)


def ranking(table: Table, column: int, shown: Callable[[float], str]) -> dict[int, int]:
    """Line → 1 for the best and 2 for the second best, ties of what is shown included.

    None for a base model, nor for a mean that is no number (of a run that diverged), nor in a table
    whose lines are of several bases.
    """
    better = table.columns[column].quantity.better
    if better == 0 or table.base is None or table.columns[column].form == "paired":
        return {}
    means = {
        i: value.mean
        for i, line in enumerate(table.lines)
        if (value := line.cells[column].value) and not line.is_base and not math.isnan(value.mean)
    }
    order = list(dict.fromkeys(shown(v) for v in sorted(means.values(), key=lambda v: -better * v)))
    if len(order) < 2:
        return {}
    return {i: 1 + order.index(shown(v)) for i, v in means.items() if shown(v) in order[:2]}
