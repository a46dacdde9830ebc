"""The quick start's domain: a mobile network's database, and questions about it with their SQL.

Six tables of one shape and twelve forms of questions. A third of the pairs of table and form is
held out: every table and every form is trained, but a held-out question needs a query whose like
was never seen of its table.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

#: Rows of a table that have its first, second, ... category: distinct, so "the most" is one.
ROWS_BY_CATEGORY = (17, 12, 8, 5)
HELD_OUT_EVERY = 3


@dataclass(frozen=True)
class Table:
    """A table with the columns name, a category of four values, and two integers.

    Attributes:
        which: what narrows the rows to a category's value, in English.
        numbers: each integer column, and what a question calls it.
    """

    name: str
    plural: str
    category: str
    values: tuple[str, str, str, str]
    which: str
    numbers: tuple[tuple[str, str], tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question in English and the SQL that answers it."""

    text: str
    sql: str


TABLES = (
    Table(
        "site", "sites", "region", ("north", "south", "east", "west"), "in the {} region",
        (("height", "height in metres"), ("cells", "number of cells")),
    ),
    Table(
        "cell", "cells", "technology", ("GSM", "UMTS", "LTE", "NR"), "that use {}",
        (("users", "number of users"), ("power", "transmit power")),
    ),
    Table(
        "router", "routers", "vendor", ("Acme", "Globex", "Initech", "Umbra"), "made by {}",
        (("ports", "number of ports"), ("load_percent", "load")),
    ),
    Table(
        "customer", "customers", "plan", ("basic", "family", "business", "student"),
        "on the {} plan", (("age", "age"), ("data_gb", "monthly data volume")),
    ),
    Table(
        "engineer", "engineers", "team", ("radio", "core", "transport", "field"),
        "in the {} team", (("visits", "number of site visits"), ("years", "years of service")),
    ),
    Table(
        "alarm", "alarms", "severity", ("minor", "major", "critical", "warning"),
        "of {} severity", (("minutes", "duration in minutes"), ("repeats", "number of repeats")),
    ),
)  # fmt: skip
#: The choices of a form, as (SQL, English) where these differ.
CHOICES: dict[str, Sequence[Any]] = {
    "compare": ((">", "more than"), ("<", "less than")),
    "aggregate": (("avg", "average"), ("max", "maximum"), ("min", "minimum"), ("sum", "total")),
    "order": ((" DESC", "highest"), ("", "lowest")),
    "most": ((" DESC", "most"), ("", "fewest")),
    "side": ((">", "above"), ("<", "below")),
    "number": range(20, 90, 10),
    "few": range(2, 6),
    "rows": (6, 9, 14),
}
#: What a form varies; its question; its SQL. {t} is the table, {column} a (name, English).
FORMS = (
    ("value", "How many {t.plural} {which} are there?",
     "SELECT count(*) FROM {t.name} WHERE {t.category} = '{value}'"),
    ("column compare number", "Find all {t.plural} whose {column[1]} is {compare[1]} {number}.",
     "SELECT name FROM {t.name} WHERE {column[0]} {compare[0]} {number}"),
    ("column aggregate value", "What is the {aggregate[1]} {column[1]} of the {t.plural} {which}?",
     "SELECT {aggregate[0]}({column[0]}) FROM {t.name} WHERE {t.category} = '{value}'"),
    ("column order few", "Name the {few} {t.plural} with the {order[1]} {column[1]}.",
     "SELECT name FROM {t.name} ORDER BY {column[0]}{order[0]} LIMIT {few}"),
    ("column compare number",
     "For each {t.category}, count the {t.plural} whose {column[1]} is {compare[1]} {number}.",
     "SELECT {t.category}, count(*) FROM {t.name} WHERE {column[0]} {compare[0]} {number} "
     "GROUP BY {t.category}"),
    ("column aggregate", "Show the {aggregate[1]} {column[1]} of the {t.plural} per {t.category}.",
     "SELECT {t.category}, {aggregate[0]}({column[0]}) FROM {t.name} GROUP BY {t.category}"),
    ("column compare number value",
     "List the {t.plural} {which} whose {column[1]} is {compare[1]} {number}.",
     "SELECT name FROM {t.name} WHERE {t.category} = '{value}' "
     "AND {column[0]} {compare[0]} {number}"),
    ("most", "Which {t.category} has the {most[1]} {t.plural}?",
     "SELECT {t.category} FROM {t.name} GROUP BY {t.category} ORDER BY count(*){most[0]} LIMIT 1"),
    ("column side", "Which {t.plural} are {side[1]} the average {column[1]}?",
     "SELECT name FROM {t.name} WHERE {column[0]} {side[0]} (SELECT avg({column[0]}) "
     "FROM {t.name})"),
    ("column order", "What is the {t.category} of the {t.name} with the {order[1]} {column[1]}?",
     "SELECT {t.category} FROM {t.name} ORDER BY {column[0]}{order[0]} LIMIT 1"),
    ("compare rows", "Name each {t.category} that has {compare[1]} {rows} {t.plural}.",
     "SELECT {t.category} FROM {t.name} GROUP BY {t.category} "
     "HAVING count(*) {compare[0]} {rows}"),
    ("column value order", "Of the {t.plural} {which}, which one has the {order[1]} {column[1]}?",
     "SELECT name FROM {t.name} WHERE {t.category} = '{value}' "
     "ORDER BY {column[0]}{order[0]} LIMIT 1"),
)  # fmt: skip
SCHEMA = "".join(
    f"CREATE TABLE {t.name} (name text, {t.category} text, "
    f"{t.numbers[0][0]} integer, {t.numbers[1][0]} integer);\n"
    for t in TABLES
)


def prompt(question: Question) -> str:
    """What a model is asked: every prompt begins with the schema."""
    return f"{SCHEMA}\nAnswer with one SQL query and nothing else. {question.text}"


def questions(table: Table, form: tuple[str, str, str]) -> Iterator[Question]:
    """All questions of a form over a table."""
    choices = {**CHOICES, "column": table.numbers, "value": table.values}
    names = form[0].split()
    for chosen in product(*(choices[name] for name in names)):
        words = dict(zip(names, chosen, strict=True))
        words |= {"t": table, "which": table.which.format(words.get("value"))}
        yield Question(text=form[1].format(**words), sql=form[2].format(**words))


def write_database(path: Path, *, seed: int) -> None:
    """Write all tables to a new SQLite file; an integer column never has a value twice."""
    rng = random.Random(seed)
    connection = sqlite3.connect(path)
    connection.executescript(SCHEMA)
    for t in TABLES:
        counts = zip(rng.sample(t.values, 4), ROWS_BY_CATEGORY, strict=True)
        of_rows = [value for value, count in counts for _ in range(count)]
        rng.shuffle(of_rows)
        numbers = zip(*(rng.sample(range(1, 100), len(of_rows)) for _ in t.numbers), strict=True)
        connection.executemany(
            f"INSERT INTO {t.name} VALUES (?, ?, ?, ?)",
            [
                (f"{t.name}{row}", value, *pair)
                for row, (value, pair) in enumerate(zip(of_rows, numbers, strict=True), start=1)
            ],
        )
    connection.commit()
    connection.close()


def drawn(database: Path, *, train: int, test: int, seed: int) -> tuple[list[Question], ...]:
    """Questions to train on, and held-out ones, as evenly over pairs of table and form as can be.

    Left out are those whose answer has nothing but NULL and 0: a wrong query may well give these.

    Raises:
        ValueError: there are fewer questions than asked for.
    """
    rng = random.Random(seed)
    pools: tuple[list[list[Question]], ...] = ([], [])
    connection = sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)
    for (i, table), (j, form) in product(enumerate(TABLES), enumerate(FORMS)):
        answered = [
            question
            for question in questions(table, form)
            if any(any(row) for row in connection.execute(question.sql))
        ]
        is_held_out = (i + j) % HELD_OUT_EVERY == 0
        pools[is_held_out].append(rng.sample(answered, len(answered)))
    connection.close()
    found = []
    for asked_for, of in zip((train, test), pools, strict=True):
        if asked_for > (available := sum(map(len, of))):
            raise ValueError(f"{asked_for} questions asked for, there are {available}")
        rounds = range(max(map(len, of)))
        ordered = [pool[turn] for turn in rounds for pool in of if turn < len(pool)]
        found.append(rng.sample(ordered[:asked_for], asked_for))
    return tuple(found)
