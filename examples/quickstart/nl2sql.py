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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

ROWS_PER_TABLE = 40
#: Multiples of five: few enough to be copied by a very small model, many enough to matter.
NUMBERS = range(5, 100, 5)
COMPARISONS = ((">", "more than"), ("<", "less than"), ("=", "exactly"))
AGGREGATES = (("avg", "average"), ("max", "maximum"), ("min", "minimum"), ("sum", "total"))
ORDERS = (("desc", "highest"), ("asc", "lowest"))


@dataclass(frozen=True, kw_only=True)
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


OLD_TABLES = (
    Table(
        name="singer",
        key="name",
        category="country",
        values=("france", "japan", "spain", "peru"),
        numbers=("age", "salary"),
    ),
    Table(
        name="concert",
        key="title",
        category="city",
        values=("paris", "tokyo", "madrid", "lima"),
        numbers=("year", "seats"),
    ),
    Table(
        name="employee",
        key="name",
        category="department",
        values=("sales", "support", "research", "legal"),
        numbers=("age", "wage"),
    ),
    Table(
        name="product",
        key="label",
        category="category",
        values=("toys", "food", "tools", "games"),
        numbers=("price", "stock"),
    ),
)
NEW_TABLES = (
    Table(
        name="station",
        key="name",
        category="region",
        values=("north", "south", "east", "west"),
        numbers=("trains", "platforms"),
    ),
    Table(
        name="course",
        key="title",
        category="teacher",
        values=("smith", "jones", "brown", "lee"),
        numbers=("credits", "hours"),
    ),
    Table(
        name="router",
        key="model",
        category="vendor",
        values=("acme", "globex", "initech", "umbra"),
        numbers=("ports", "latency"),
    ),
    Table(
        name="book",
        key="title",
        category="author",
        values=("woolf", "orwell", "austen", "borges"),
        numbers=("pages", "copies"),
    ),
)


# The words of practice tables. But for the keys, none is a word of the NEW tables: the base must
# learn to copy words from the question, not to know these.
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


def _count_where(t: Table) -> Iterator[Question]:
    for column, (op, words), n in product(t.numbers, COMPARISONS, NUMBERS):
        yield Question(
            text=f"how many {t.name}s have {column} {words} {n}?",
            sql=f"select count(*) from {t.name} where {column} {op} {n}",
        )


def _list_where(t: Table) -> Iterator[Question]:
    for column, (op, words), n in product(t.numbers, COMPARISONS, NUMBERS):
        yield Question(
            text=f"list the {t.key} of every {t.name} with {column} {words} {n}.",
            sql=f"select {t.key} from {t.name} where {column} {op} {n}",
        )


def _aggregate_of_category(t: Table) -> Iterator[Question]:
    for column, (function, word), value in product(t.numbers, AGGREGATES, t.values):
        yield Question(
            text=f"what is the {word} {column} of {t.name}s whose {t.category} is {value}?",
            sql=f"select {function}({column}) from {t.name} where {t.category} = '{value}'",
        )


def _top(t: Table) -> Iterator[Question]:
    for column, (order, word), k in product(t.numbers, ORDERS, range(2, 10)):
        yield Question(
            text=f"list the {t.key} of the {k} {t.name}s with the {word} {column}.",
            sql=f"select {t.key} from {t.name} order by {column} {order} limit {k}",
        )


def _count_by_category(t: Table) -> Iterator[Question]:
    for column, (op, words), n in product(t.numbers, COMPARISONS, NUMBERS):
        yield Question(
            text=f"for each {t.category}, count the {t.name}s with {column} {words} {n}.",
            sql=f"select {t.category}, count(*) from {t.name} where {column} {op} {n} "
            f"group by {t.category}",
        )


def _aggregate_by_category(t: Table) -> Iterator[Question]:
    for column, (function, word) in product(t.numbers, AGGREGATES):
        yield Question(
            text=f"show the {word} {column} of {t.name}s for each {t.category}.",
            sql=f"select {t.category}, {function}({column}) from {t.name} group by {t.category}",
        )


def _list_of_category_where(t: Table) -> Iterator[Question]:
    for column, (op, words), n, value in product(t.numbers, COMPARISONS, NUMBERS, t.values):
        yield Question(
            text=f"find the {t.key} of {t.name}s from {t.category} {value} "
            f"with {column} {words} {n}.",
            sql=f"select {t.key} from {t.name} where {t.category} = '{value}' "
            f"and {column} {op} {n}",
        )


def _count_of_category_where(t: Table) -> Iterator[Question]:
    for column, (op, words), n, value in product(t.numbers, COMPARISONS, NUMBERS, t.values):
        yield Question(
            text=f"how many {t.name}s from {t.category} {value} have {column} {words} {n}?",
            sql=f"select count(*) from {t.name} where {t.category} = '{value}' "
            f"and {column} {op} {n}",
        )


FORMS: tuple[Callable[[Table], Iterator[Question]], ...] = (
    _count_where,
    _list_where,
    _aggregate_of_category,
    _top,
    _count_by_category,
    _aggregate_by_category,
    _list_of_category_where,
    _count_of_category_where,
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


def answerable(connection: sqlite3.Connection, question: Question) -> bool:
    """True if the answer holds anything but NULL and 0: an answer a wrong query would not give."""
    return any(
        value is not None and value != 0
        for row in connection.execute(question.sql)
        for value in row
    )


def question_pools(tables: tuple[Table, ...]) -> list[list[Question]]:
    """All questions over ``tables``: one list for each form."""
    return [[q for t in tables for q in form(t)] for form in FORMS]


def answerable_pools(tables: tuple[Table, ...], database: Path) -> list[list[Question]]:
    """The questions over ``tables`` whose answer tells right from wrong (see `answerable`)."""
    return only_answerable(question_pools(tables), database)


def only_answerable(pools: list[list[Question]], database: Path) -> list[list[Question]]:
    """Those questions of ``pools`` that are `answerable` in ``database``."""
    connection = sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)
    try:
        return [[q for q in pool if answerable(connection, q)] for pool in pools]
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
