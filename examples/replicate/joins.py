"""A second small language of questions and SQL, over pairs of tables that refer to each other.

Beside the one of the quick start: other questions, other forms (joins, groups, sub-queries),
another database. A parent has rows of children, ``child.parent_id = parent.id``.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

from examples.quickstart.nl2sql import (
    PRACTICE_CATEGORIES,
    PRACTICE_KEYS,
    PRACTICE_NAMES,
    PRACTICE_NUMBERS,
    PRACTICE_VALUES,
    Question,
)

PARENTS, CHILDREN = 20, 80
NUMBERS = range(5, 95, 5)
AGGREGATES = (("sum", "summed"), ("avg", "mean"), ("max", "largest"), ("min", "smallest"))


class Pair(NamedTuple):
    """A parent with a key and a place (four values); a child with a number and a kind (three)."""

    parent: str
    key: str
    place: str
    places: tuple[str, ...]
    child: str
    number: str
    kind: str
    kinds: tuple[str, ...]


NEW_PAIRS = tuple(
    Pair(*one[:3], tuple(one[3].split()), *one[4:7], tuple(one[7].split()))
    for one in (
        ("gateway", "host", "site", "oslo cairo quito delhi",
         "session", "bytes", "protocol", "sip http mqtt"),
        ("patient", "surname", "ward", "elm oak ash yew",
         "visit", "minutes", "outcome", "healed sent open"),
        ("vessel", "flag", "port", "genoa busan santos cadiz",
         "cargo", "tons", "goods", "ore grain fuel"),
    )
)  # fmt: skip


def practice_pairs(count: int, *, seed: int) -> tuple[Pair, ...]:
    """``count`` pairs of random words; they exist in questions only."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(count):
        parent, child = rng.sample(PRACTICE_NAMES.split(), 2)
        place, kind = rng.sample(PRACTICE_CATEGORIES.split(), 2)
        values = tuple(rng.sample(PRACTICE_VALUES.split(), 7))
        key, number = (rng.choice(words.split()) for words in (PRACTICE_KEYS, PRACTICE_NUMBERS))
        pairs.append(Pair(parent, key, place, values[:4], child, number, kind, values[4:]))
    return tuple(pairs)


def _aggregate_over_children(p: Pair) -> Iterator[Question]:
    for (function, word), value, n in product(AGGREGATES, p.places, NUMBERS):
        yield Question(
            text=f"{word} {p.number} over every {p.child} of a {p.parent} in {value}, "
            f"{p.number} above {n}",
            sql=f"select {function}(c.{p.number}) from {p.child} c join {p.parent} p "
            f"on c.{p.parent}_id = p.id where p.{p.place} = '{value}' and c.{p.number} > {n}",
        )


def _children_per_parent(p: Pair) -> Iterator[Question]:
    for kind, n in product(p.kinds, NUMBERS):
        yield Question(
            text=f"per {p.parent} {p.key}: the number of {kind} {p.child} rows "
            f"under {n} {p.number}",
            sql=f"select p.{p.key}, count(*) from {p.parent} p join {p.child} c "
            f"on c.{p.parent}_id = p.id where c.{p.kind} = '{kind}' and c.{p.number} < {n} "
            f"group by p.{p.key}",
        )


def _distinct_between(p: Pair) -> Iterator[Question]:
    for low, high in product(NUMBERS, NUMBERS):
        if low < high:
            yield Question(
                text=f"which different {p.kind} values occur in {p.child} "
                f"for {p.number} from {low} to {high}",
                sql=f"select distinct {p.kind} from {p.child} "
                f"where {p.number} between {low} and {high}",
            )


def _having(p: Pair) -> Iterator[Question]:
    for kind, n in product(p.kinds, range(1, 6)):
        yield Question(
            text=f"ids of each {p.parent} with {n} or more {kind} {p.child} rows",
            sql=f"select {p.parent}_id from {p.child} where {p.kind} = '{kind}' "
            f"group by {p.parent}_id having count(*) >= {n}",
        )


def _without(p: Pair) -> Iterator[Question]:
    for value, n in product(p.places, NUMBERS):
        yield Question(
            text=f"{p.key} of a {p.parent} in {value} lacking any {p.child} over {n} {p.number}",
            sql=f"select {p.key} from {p.parent} where {p.place} = '{value}' and id not in "
            f"(select {p.parent}_id from {p.child} where {p.number} > {n})",
        )


FORMS: tuple[Callable[[Pair], Iterator[Question]], ...] = (
    _aggregate_over_children,
    _children_per_parent,
    _distinct_between,
    _having,
    _without,
)


def question_pools(pairs: tuple[Pair, ...]) -> list[list[Question]]:
    """All questions over ``pairs``: one list for each form."""
    return [[q for p in pairs for q in form(p)] for form in FORMS]


def write_database(path: Path, *, seed: int) -> None:
    """Write the new pairs to a new SQLite file at ``path``."""
    rng = random.Random(seed)
    connection = sqlite3.connect(path)
    for p in NEW_PAIRS:
        connection.execute(
            f"create table {p.parent} (id integer primary key, {p.key} text, {p.place} text)"
        )
        connection.execute(
            f"create table {p.child} (id integer primary key, {p.parent}_id integer "
            f"references {p.parent}(id), {p.number} integer, {p.kind} text)"
        )
        connection.executemany(
            f"insert into {p.parent} values (?, ?, ?)",
            [(i, f"{p.key}{i}", rng.choice(p.places)) for i in range(PARENTS)],
        )
        connection.executemany(
            f"insert into {p.child} values (?, ?, ?, ?)",
            [
                (i, rng.randrange(PARENTS), rng.randrange(1, 100), rng.choice(p.kinds))
                for i in range(CHILDREN)
            ],
        )
    connection.commit()
    connection.close()
