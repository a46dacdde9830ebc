"""Generated SQL is untrusted: it may neither change anything nor match by luck."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_replay.errors import DataError
from megatron_replay.evaluation.sql.database import open_read_only
from megatron_replay.evaluation.sql.execution import (
    execution_match,
    with_answers,
)
from megatron_replay.evaluation.sql.server import (
    Limits,
    QueryError,
    Row,
    is_ordered,
    run_query,
    same_answer,
)
from megatron_replay.evaluation.sql.sets import SqlQuestion


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "shop?#.sqlite"  # characters that mean something in a URI
    connection = sqlite3.connect(path)
    connection.execute("create table book (title text, pages integer)")
    connection.executemany("insert into book values (?, ?)", [("b", 20), ("a", 10), ("a", 10)])
    connection.execute("insert into book values (?, ?)", ("none", None))
    connection.commit()
    connection.close()
    return path


def match(database: Path, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    questions = [
        SqlQuestion(where=f"question {i}", database=database, prompt="", gold=gold)
        for i, (gold, _) in enumerate(pairs, start=1)
    ]
    limits = Limits(seconds=600)  # of a machine that may be busy
    return execution_match(questions, [predicted for _, predicted in pairs], limits)


def answer(database: Path, sql: str, **limits: float) -> list[Row]:
    with open_read_only(database) as connection:
        return run_query(connection, sql, Limits(**{"seconds": 600} | limits))  # type: ignore[arg-type]


def reason(database: Path, sql: str, **limits: float) -> str:
    with pytest.raises(QueryError) as caught:
        answer(database, sql, **limits)
    return caught.value.reason


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("", "not a query"),
        ("-- nothing", "not a query"),
        ("drop table book", "not a query"),
        ("delete from book", "not a query"),
        ("explain select 1", "not a query"),
        ("pragma writable_schema=1", "not a query"),
        ("attach 'x.db' as y", "not a query"),
        ("vacuum into 'x.db'", "not a query"),
        ("/* select */ insert into book values ('x', 1)", "not a query"),
        ("with x as (select 1) insert into book select 'x', 1", "denied"),
        ("select * from pragma_table_info('book')", "denied"),
        ("select * from pragma_database_list, json_each('[]')", "denied"),
        ("select load_extension('x')", "denied"),
        ("select random()", "denied"),
        ("select 1; drop table book", "sql error"),
        ("select nothing from book", "sql error"),
        ("select 'a\0b'", "sql error"),
        ("select '\ud800'", "sql error"),
        ("select zeroblob(900000000)", "too large"),
        ("select hex(zeroblob(6000000))", "too large"),
    ],
)
def test_refuses(database: Path, sql: str, expected: str) -> None:
    before = hashlib.sha256(database.read_bytes()).digest()
    assert reason(database, sql) == expected
    assert hashlib.sha256(database.read_bytes()).digest() == before
    assert [p.name for p in database.parent.iterdir()] == [database.name]


def test_connection_itself_cannot_write(database: Path) -> None:
    with open_read_only(database) as connection, pytest.raises(sqlite3.OperationalError):
        connection.execute("delete from book")


ENDLESS = "with recursive t(i) as (select 1 union all select i + 1 from t) select sum(i) from t"


@pytest.mark.parametrize(
    ("sql", "limits", "expected"),
    [
        (ENDLESS, {"seconds": 0.05}, "timeout"),
        # One instruction that takes too long.
        ("select instr(hex(zeroblob(60000)), hex(zeroblob(25000)) || '1')", {"seconds": 0.001},
         "timeout"),
        ("select zeroblob(1000001)", {}, "too large"),
        ("select zeroblob(999999)", {}, ""),
        (f"select '{'a' * 99_991}'", {}, ""),
        (f"select '{'a' * 99_992}'", {}, "too large"),
        ("select zeroblob(100000) from book a, book b", {"max_bytes": 1_700_000}, ""),
        ("select zeroblob(100000) from book a, book b", {"max_bytes": 1_600_000}, "too large"),
        ("select * from book", {"max_rows": 4}, ""),
        ("select * from book", {"max_rows": 3}, "too large"),
    ],
)  # fmt: skip
def test_limits(database: Path, sql: str, limits: dict[str, float], expected: str) -> None:
    if expected:
        assert reason(database, sql, **limits) == expected
    else:
        assert answer(database, sql, **limits)


def test_deadline_of_one_query_does_not_reach_the_next(database: Path) -> None:
    with open_read_only(database) as connection:
        with pytest.raises(QueryError) as caught:
            run_query(connection, "select 1", Limits(seconds=1e-9))
        assert caught.value.reason == "timeout"
        later = Limits(seconds=600)
        sql = "select count(*) from book a, book b, book c"
        assert run_query(connection, sql, later) == [(64,)]


@pytest.mark.parametrize("unclosed", ["[", "'", '"', "`", "/*", "--", "(", "['", '[" --\n'])
def test_a_query_is_read_in_time_linear_in_its_length(database: Path, unclosed: str) -> None:
    """As many as a query may hold: once, 60,000 of ``[`` were minutes of work."""
    text = unclosed * (99_000 // len(unclosed))
    assert not is_ordered(f"select {text}")
    assert reason(database, f"select 1 from {text}") == "sql error"

    def cpu_seconds(length: int) -> float:
        """Of the fastest of some readings: another process on this core takes none of it."""
        seconds = []
        for _ in range(5):
            start = time.thread_time()
            is_ordered(f"select {text[:length]}")
            seconds.append(time.thread_time() - start)
        return min(seconds)

    assert cpu_seconds(96_000) < 40 * cpu_seconds(12_000)  # 8 if linear, 64 if quadratic


@pytest.mark.parametrize(
    "sql",
    [
        "select avg(pages), upper(title) from book where title like 'a%' group by title",
        "select title, row_number() over (order by pages) from book",
        "WITH t AS (SELECT * FROM book) SELECT count(*) FROM t",
        "select(1)",
        "select date('2020-01-01'), coalesce(null, 1), '{}' -> '$'",
        "select title, value from book, json_each('[1, 2]') where pages > 0",
        "select t.key from json_tree('{\"a\": [1]}') t where t.atom = 1",
    ],
)
def test_allows_reading(database: Path, sql: str) -> None:
    assert answer(database, sql)


@pytest.mark.parametrize(
    ("sql", "ordered"),
    [
        ("select a from t order by a", True),
        ("select a from t ORDER\n BY a limit 1", True),
        ("select a from (select a from t order by a)", False),
        ("select row_number() over (order by a) from t", False),
        ("select 'order by' from t", False),
        ('select "order by" from t -- order by', False),
        ("select ')' from t order by a", True),
    ],
)
def test_order_is_that_of_the_outermost_query(sql: str, ordered: bool) -> None:
    assert is_ordered(sql) is ordered


rows = st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["x", None])), max_size=5)


@given(rows, rows, st.randoms())
def test_multisets(gold: list, predicted: list, rng: object) -> None:
    shuffled = list(gold)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    assert same_answer(gold, shuffled, ordered=False)
    assert same_answer(gold, shuffled, ordered=True) == (gold == shuffled)
    assert same_answer(gold, predicted, ordered=False) == (
        sorted(map(repr, gold)) == sorted(map(repr, predicted))
    )


def test_counts(database: Path) -> None:
    titles = "select title from book where pages = 10"
    result = match(
        database,
        [
            (titles, "select 'a' from book where pages = 10"),
            (titles, "select distinct title from book where pages = 10"),  # a set would match
            ("select pages from book where pages > 0 order by pages", titles),
            ("select title from book order by title", "select title from book"),
            (titles, "drop table book"),
        ],
    )
    assert (result["matches"], result["questions"]) == (1, 5)
    assert result["failures"] == {"other answer": 3, "not a query": 1}
    assert result["accuracy"] == 0.2
    # Agresti-Coull by hand: p = 3/9, √(3/9 · 6/9 / 9).
    assert result["standard_error"] == pytest.approx(0.15713484026)


def test_questions_without_an_answer_are_left_out(database: Path) -> None:
    empty = ("select title from book where pages > 99", "select max(pages) from book where 0")
    gold = ("select 1", *empty, "select null, 0")
    asked = [
        SqlQuestion(where=str(i), database=database, prompt="", gold=g) for i, g in enumerate(gold)
    ]
    found = with_answers(asked, Limits(seconds=600))
    assert [question.where for question in found] == ["0", "3"]
    with pytest.raises(DataError, match=r"every gold answer is empty \(found 2 questions\)"):
        with_answers(asked[1:3])


def test_sets_are_compared_beside(database: Path) -> None:
    """As BIRD's evaluator does, whether or not the gold query has an ORDER BY."""
    pairs = [
        ("select title from book where pages = 10", "select 'a'"),
        ("select pages from book order by pages desc", "select pages from book order by pages"),
        ("select 1", "select 2"),
    ]
    result = match(database, pairs)
    assert (result["matches"], result["set_accuracy"]) == (0, pytest.approx(2 / 3))


def test_user_mistakes(database: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such database"):
        match(tmp_path / "missing", [("select 1", "select 1")])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"expected a regular file; found a pipe \(FIFO\)"):
        match(tmp_path / "pipe", [("select 1", "select 1")])
    text = tmp_path / "text"
    text.write_text("no database at all, but long enough to look like one" * 40)
    with pytest.raises(DataError, match="not an SQLite database"):
        match(text, [("select 1", "select 1")])
    with pytest.raises(DataError, match=r"question 2: the gold query fails.*no such table"):
        match(database, [("select 1", ""), ("select 1 from shelf", "")])
    with pytest.raises(DataError, match=r"question 1: the gold answer is empty: select null"):
        match(database, [("select null", "select null")])
    database.with_name(database.name + "-wal").write_bytes(b"pending")
    with pytest.raises(DataError, match="unfinished transaction"):
        match(database, [("select 1", "select 1")])


def test_bytes_that_are_not_utf8_stay_distinct(database: Path) -> None:
    connection = sqlite3.connect(database)
    for stored in ("ed", "ec"):
        connection.execute(f"insert into book values (cast(x'61{stored}' as text), 7)")
    connection.commit()
    connection.close()
    sevens = "select title from book where pages = 7"
    first, second = (f"{sevens} order by hex(title) {way} limit 1" for way in ("asc", "desc"))
    assert match(database, [(sevens, sevens), (first, first), (first, second)])["matches"] == 2


def test_a_file_name_that_is_not_utf8(database: Path) -> None:
    place = Path(os.fsdecode(os.fsencode(database.parent) + b"/\xe9%?#"))
    moved = database.rename(place)
    assert match(moved, [("select 1 from book", "select 1 from book")])["matches"] == 1
    with pytest.raises(DataError, match="no such table"):
        match(moved, [("select 1 from shelf", "select 1")])


def renamed(database: Path, old: bytes, new: bytes) -> Path:
    """``database`` with bytes of its schema changed, as no statement can."""
    content = database.read_bytes()
    assert content.count(old) == 1
    database.write_bytes(content.replace(old, new))
    return database


@pytest.mark.parametrize("old", [b"(title text", b"pages", b"TABLE book"])
def test_a_name_that_is_not_utf8_is_one_line(database: Path, old: bytes) -> None:
    """Python's sqlite3 cannot run a query that returns such a column, nor authorize one."""
    damaged = renamed(database, old, old[:-1] + b"\xe9")
    if old.startswith(b"TABLE"):  # in sqlite_master's own column too, and SQLite compares them
        with pytest.raises(DataError, match=r"or a damaged one"):
            match(damaged, [("select 1", "select 1")])
        return
    with pytest.raises(DataError, match=r"shop.*a name .* is not UTF-8 .*\\xe9.*Rename it"):
        match(damaged, [("select 1", "select 1")])


def test_a_database_that_is_damaged_further_on(database: Path) -> None:
    """Not the prediction's fault, so nothing is counted."""
    connection = sqlite3.connect(database)
    connection.execute("create table log (line text)")
    connection.executemany("insert into log values (?)", [("x" * 500,)] * 1000)
    connection.commit()
    connection.close()
    with open(database, "r+b") as handle:
        handle.seek(200_000)
        handle.write(b"\xff" * 100_000)
    whole, damaged = "select title from book", "select count(line) from log"
    assert match(database, [(whole, whole)])["matches"] == 1
    for pair in ((whole, damaged), (damaged, whole)):
        with pytest.raises(DataError, match=r"shop.*cannot read the database: .*malformed"):
            match(database, [pair])
