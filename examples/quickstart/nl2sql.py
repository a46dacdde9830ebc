"""A small language of questions about tables, each with its SQL, in eight forms.

The base model learns how SQL looks from four OLD tables and from practice tables made of random
words; the four NEW tables are the domain it is then fine-tuned for. The practice tables matter: a
base that has seen four tables only learns them by heart, and does not take a question about a fifth
for a question. Everything is enumerated and then drawn with a seed, so that the same
arguments give the same files on every machine.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

ROWS_PER_TABLE = 40


@dataclass(frozen=True)
class Table:
    """One table: a name column, a category with four values, and two integer columns."""

    name: str
    key: str
    category: str
    values: tuple[str, ...]
    numbers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question in English and the SQL that answers it."""

    text: str
    sql: str


#: The choices of a form, as (SQL, English) where these differ. Numbers are multiples of five: few
#: enough to be copied by a very small model, many enough to matter.
AXES: dict[str, Sequence[Any]] = {
    "comparison": ((">", "more than"), ("<", "less than"), ("=", "exactly")),
    "aggregate": (("avg", "average"), ("max", "maximum"), ("min", "minimum"), ("sum", "total")),
    "order": (("desc", "highest"), ("asc", "lowest")),
    "number": range(5, 100, 5),
    "limit": range(2, 10),
}


@dataclass(frozen=True)
class Form:
    """Templates of a question and its SQL; there is a question for every choice along ``axes``."""

    axes: str
    text: str
    sql: str

    def questions(self, table: Table) -> Iterator[Question]:
        """All questions of this form over ``table``."""
        choices = {**AXES, "column": table.numbers, "value": table.values}
        names = self.axes.split()
        for chosen in product(*(choices[name] for name in names)):
            words = {"t": table, **dict(zip(names, chosen, strict=True))}
            yield Question(text=self.text.format(**words), sql=self.sql.format(**words))


FORMS = (
    Form(
        "column comparison number",
        "how many {t.name}s have {column} {comparison[1]} {number}?",
        "select count(*) from {t.name} where {column} {comparison[0]} {number}",
    ),
    Form(
        "column comparison number",
        "list the {t.key} of every {t.name} with {column} {comparison[1]} {number}.",
        "select {t.key} from {t.name} where {column} {comparison[0]} {number}",
    ),
    Form(
        "column aggregate value",
        "what is the {aggregate[1]} {column} of {t.name}s whose {t.category} is {value}?",
        "select {aggregate[0]}({column}) from {t.name} where {t.category} = '{value}'",
    ),
    Form(
        "column order limit",
        "list the {t.key} of the {limit} {t.name}s with the {order[1]} {column}.",
        "select {t.key} from {t.name} order by {column} {order[0]} limit {limit}",
    ),
    Form(
        "column comparison number",
        "for each {t.category}, count the {t.name}s with {column} {comparison[1]} {number}.",
        "select {t.category}, count(*) from {t.name} where {column} {comparison[0]} {number} "
        "group by {t.category}",
    ),
    Form(
        "column aggregate",
        "show the {aggregate[1]} {column} of {t.name}s for each {t.category}.",
        "select {t.category}, {aggregate[0]}({column}) from {t.name} group by {t.category}",
    ),
    Form(
        "column comparison number value",
        "find the {t.key} of {t.name}s from {t.category} {value} "
        "with {column} {comparison[1]} {number}.",
        "select {t.key} from {t.name} where {t.category} = '{value}' "
        "and {column} {comparison[0]} {number}",
    ),
    Form(
        "column comparison number value",
        "how many {t.name}s from {t.category} {value} have {column} {comparison[1]} {number}?",
        "select count(*) from {t.name} where {t.category} = '{value}' "
        "and {column} {comparison[0]} {number}",
    ),
)
OLD_TABLES = (
    Table("singer", "name", "country", ("france", "japan", "spain", "peru"), ("age", "salary")),
    Table("concert", "title", "city", ("paris", "tokyo", "madrid", "lima"), ("year", "seats")),
    Table(
        "employee", "name", "department", ("sales", "support", "research", "legal"), ("age", "wage")
    ),
    Table("product", "label", "category", ("toys", "food", "tools", "games"), ("price", "stock")),
)
NEW_TABLES = (
    Table("station", "name", "region", ("north", "south", "east", "west"), ("trains", "platforms")),
    Table("course", "title", "teacher", ("smith", "jones", "brown", "lee"), ("credits", "hours")),
    Table(
        "router", "model", "vendor", ("acme", "globex", "initech", "umbra"), ("ports", "latency")
    ),
    Table("book", "title", "author", ("woolf", "orwell", "austen", "borges"), ("pages", "copies")),
)

# The words of practice tables. Except for the keys, none is a word of the NEW tables: the base must
# learn to copy words from the question.
PRACTICE_NAMES = """actor airport album animal apartment bakery bank bridge building camera castle
cinema clinic company computer dealer doctor driver engine factory farm festival film garden guitar
hotel island journal kitchen lake lawyer library market mountain movie museum nurse office painting
park patient phone planet player recipe restaurant river road sailor school shop song stadium
student theater tower tree truck village writer"""
PRACTICE_KEYS = """name title label model code"""
PRACTICE_CATEGORIES = """brand class color county district family genre kind language level
maker material origin owner role season sector shape state status style team type zone"""
PRACTICE_VALUES = """alpha amber april autumn basic beta black blue carbon cedar cobalt copper
coral delta desert double eagle emerald falcon final forest gamma glass golden granite green guest
harbor heavy indigo ivory junior lemon light lunar marble master medium metal modern native ocean
olive orange paper pearl plain prime purple quick red river royal senior silver simple single solar
spring steel stone summer triple velvet white winter yellow"""
PRACTICE_NUMBERS = """amount area balance budget capacity cost count depth distance duration
energy floors grade height income length level mass members mileage points population power profit
rank rate rating rent rooms sales score share size speed tax units value visits volume votes weight
width wins years"""


def practice_tables(count: int, *, seed: int) -> tuple[Table, ...]:
    """``count`` tables of random words; they exist in questions only, not in the database."""
    rng = random.Random(seed)
    return tuple(
        Table(
            name=rng.choice(PRACTICE_NAMES.split()),
            key=rng.choice(PRACTICE_KEYS.split()),
            category=rng.choice(PRACTICE_CATEGORIES.split()),
            values=tuple(rng.sample(PRACTICE_VALUES.split(), 4)),
            numbers=tuple(rng.sample(PRACTICE_NUMBERS.split(), 2)),
        )
        for _ in range(count)
    )


def write_database(path: Path, *, seed: int) -> None:
    """Write all eight tables to a new SQLite file at ``path``.

    The integers of a column are distinct, so ``order by`` has one right answer.
    """
    rng = random.Random(seed)
    connection = sqlite3.connect(path)
    for t in OLD_TABLES + NEW_TABLES:
        first, second = t.numbers
        connection.execute(
            f"create table {t.name} "
            f"({t.key} text, {t.category} text, {first} integer, {second} integer)"
        )
        columns = [rng.sample(range(1, 100), ROWS_PER_TABLE) for _ in t.numbers]
        connection.executemany(
            f"insert into {t.name} values (?, ?, ?, ?)",
            [
                (f"{t.name}{i}", rng.choice(t.values), a, b)
                for i, (a, b) in enumerate(zip(*columns, strict=True))
            ],
        )
    connection.commit()
    connection.close()


def question_pools(tables: tuple[Table, ...]) -> list[list[Question]]:
    """All questions over ``tables``: one list for each form."""
    return [[q for t in tables for q in form.questions(t)] for form in FORMS]


def only_answerable(pools: list[list[Question]], database: Path) -> list[list[Question]]:
    """Those questions of ``pools`` whose answer has anything but NULL and 0.

    A wrong query may well give these two, so such a question does not separate right from wrong.
    """
    connection = sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)

    def counts(question: Question) -> bool:
        rows = connection.execute(question.sql)
        return any(value is not None and value != 0 for row in rows for value in row)

    try:
        return [list(filter(counts, pool)) for pool in pools]
    finally:
        connection.close()


def hold_out(
    pools: list[list[Question]], *, every: int, seed: int
) -> tuple[list[list[Question]], list[list[Question]]]:
    """Shuffle each pool and hold out one of ``every`` questions: ``(rest, heldout)``."""
    rng = random.Random(seed)
    shuffled = [rng.sample(pool, len(pool)) for pool in pools]
    rest = [[q for i, q in enumerate(pool) if i % every] for pool in shuffled]
    return rest, [pool[::every] for pool in shuffled]


def draw(pools: list[list[Question]], count: int, *, seed: int) -> list[Question]:
    """``count`` questions, the forms in turn while they last, then shuffled.

    Raises:
        ValueError: there are fewer questions than asked for.
    """
    available = sum(map(len, pools))
    if count > available:
        raise ValueError(f"{count} questions asked for, the grammar has {available}")
    rng = random.Random(seed)
    queues = [rng.sample(pool, len(pool)) for pool in pools]
    chosen: list[Question] = []
    while len(chosen) < count:
        for queue in queues:
            if queue and len(chosen) < count:
                chosen.append(queue.pop())
    rng.shuffle(chosen)
    return chosen
