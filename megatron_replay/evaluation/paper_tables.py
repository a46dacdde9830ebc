"""Which tables the paper has, and those that the method's limits need beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_replay.evaluation import scores
from megatron_replay.evaluation.comparison import spread
from megatron_replay.evaluation.rows import Row
from megatron_replay.evaluation.scores import Quantity
from megatron_replay.evaluation.tables import (
    Column,
    Group,
    LineKey,
    Table,
    by_method,
    groups_of,
    in_table,
    make_table,
    reference_of,
)

#: What a row without a variant has in these tables: the project's defaults.
DEFAULT_VARIANTS = {"positions": "bucket", "angles": "45", "coverage": "0.95"}


def paper_tables(rows: Sequence[Row], *, reference: str | None = None) -> list[Table]:
    """Tables 1 to 6, coverage, stability, efficiency and sweep of each base and size; remedies."""
    tables: list[Table | None] = []
    domain = scores.domain_quantity(rows)
    for group in groups_of(rows):
        tables += _methods_tables(in_table(rows, "methods", group), domain, group, reference)
        tables += [_variants_table(rows, domain, kind, group) for kind in DEFAULT_VARIANTS]
    tables.append(_remedies(in_table(rows, "remedies"), domain, reference))
    tables += [_sweep(in_table(rows, "sweep", group), domain, group) for group in groups_of(rows)]
    return [table for table in tables if table]


def task_columns(rows: Sequence[Row]) -> list[Column]:
    """One for each task of the domain, then for each of its scores that are no shares."""
    names = scores.names_of(scores.domain_scores(row.evaluation) for row in rows)
    others = scores.other_quantities(row.evaluation for row in rows)
    return [Column(quantity) for quantity in (*map(scores.task_quantity, names), *others)]


def _methods_tables(
    rows: Sequence[Row], domain: Quantity, group: Group, reference: str | None
) -> list[Table | None]:
    reference = reference_of(rows, reference)
    trained = [row for row in rows if not row.is_base]
    gained = [*task_columns(rows), Column(domain)]
    general = scores.names_of(scores.general_scores(row.evaluation) for row in rows)
    specifications: list[tuple[str, str, Sequence[Row], list[Column]]] = [
        (
            "table1", "Table 1: domain scores", rows,
            [replace(column, with_difference=True) for column in gained],
        ),
        (
            "table2", "Table 2: general benchmarks", rows,
            [
                *(Column(scores.general_quantity(name)) for name in general),
                Column(scores.RETENTION), Column(scores.PERPLEXITY),
            ],
        ),
        (
            "table3", "Table 3: distance to the base, change of general perplexity", trained,
            [Column(scores.DISTANCE), Column(scores.FORGETTING)],
        ),
        (
            "table6", "Table 6: ablation", trained,
            [*gained, Column(scores.RETENTION), Column(scores.LOSS_STD)],
        ),
        ("stability", "Stability", trained, [Column(q) for q in scores.STABILITY]),
        ("efficiency", "Efficiency", trained, [Column(q) for q in scores.EFFICIENCY]),
    ]  # fmt: skip
    return [
        make_table(name, title, of, columns, group=group, reference=reference)
        for name, title, of, columns in specifications
    ]


_FORGETTING = (Column(scores.FORGETTING), Column(scores.OUTSIDE_MASS))
#: Kind of rows: name, title, label and last columns of their table.
_VARIANTS = {
    "positions": ("table4", "Table 4: positions that Stage 0 takes", "positions", _FORGETTING),
    "angles": (
        "table5", "Table 5: the largest angle", "Δ_max, °",
        (Column(scores.RETENTION), Column(scores.LOSS_STD)),
    ),
    "coverage": ("coverage", "Coverage of the candidate sets", "τ", _FORGETTING),
}  # fmt: skip


def variants(rows: Sequence[Row], kind: str, group: Group) -> list[Row]:
    """The rows of a table of variants, each with its variant, numbers by size."""
    own = [row for row in in_table(rows, kind, group) if not row.is_base]
    own = [replace(row, variant=row.variant or DEFAULT_VARIANTS[kind]) for row in own]
    return sorted(own, key=lambda row: _numbers_first(row.variant))


def _numbers_first(text: str) -> tuple[float, str]:
    try:
        return float(text), ""
    except ValueError:
        return float("inf"), text


def _variants_table(rows: Sequence[Row], domain: Quantity, kind: str, group: Group) -> Table | None:
    name, title, label, more = _VARIANTS[kind]
    own = variants(rows, kind, group)
    columns = [*task_columns(own), Column(domain), *more]
    labels: tuple[str, ...] = (label,)
    key: LineKey = lambda row: (row.variant,)  # noqa: E731
    if len({row.method for row in own}) > 1:
        labels, key = (label, "method"), lambda row: (row.variant, row.method)
    return make_table(name, title, own, columns, labels=labels, key=key, group=group)


def _remedies(rows: Sequence[Row], domain: Quantity, reference: str | None) -> Table | None:
    reference = reference_of(rows, reference)
    quantities = (
        domain, scores.FORGETTING, scores.DISTANCE, scores.OUTSIDE_MASS, scores.PROBED_OUTSIDE_MASS
    )  # fmt: skip
    columns = [Column(quantity, "interval") for quantity in quantities]
    if reference:
        columns += [Column(replace(domain, form="+.1f"), "paired")]
        columns += [Column(scores.FORGETTING, "paired")]
    groups = groups_of(rows)
    return make_table(
        "remedies",
        "Remedies",
        sorted(rows, key=lambda row: groups.index((row.base, row.size))),
        columns,
        labels=("base", "size", "method"),
        key=lambda row: (row.base, row.size, *by_method(row)),
        reference=reference,
    )


def sweeps(rows: Sequence[Row], group: Group) -> dict[str, list[Row]]:
    """Rows by method, each in the order of its learning rates."""
    found: dict[str, list[Row]] = {}
    for row in in_table(rows, "sweep", group):
        if not row.is_base:
            found.setdefault(by_method(row)[0], []).append(row)
    return {name: sorted(own, key=lambda row: row.lr or 0.0) for name, own in found.items()}


def _sweep(rows: Sequence[Row], domain: Quantity, group: Group) -> Table | None:
    columns = [Column(domain), Column(scores.FORGETTING), Column(scores.DISTANCE)]
    base = spread([domain.measure(row) for row in rows if row.is_base])
    if base:
        start = base.mean
        gain = Quantity(
            name="domain_gain", title="domain gain, points", form="+.1f", better=1,
            measure=lambda row: None if (v := domain.measure(row)) is None else v - start,
        )  # fmt: skip
        columns.insert(1, Column(gain))
    # Lines differ in their rate: a best one would be a choice made on the test.
    columns = [replace(c, quantity=replace(c.quantity, better=0)) for c in columns]
    return make_table(
        "sweep",
        "Sweep of learning rates",
        [row for own in sweeps(rows, group).values() for row in own],
        columns,
        labels=("method", "learning rate"),
        key=lambda row: (*by_method(row), f"{row.lr:g}"),
        group=group,
    )
