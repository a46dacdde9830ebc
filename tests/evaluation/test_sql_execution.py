"""Generated SQL is untrusted: it may neither change anything nor match by luck."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_replay.data.database import open_read_only
from megatron_replay.data.sql_sets import SqlQuestion
from megatron_replay.errors import DataError
from megatron_replay.evaluation.sql_execution import (
    ExecutionMatch,
    Limits,
    QueryError,
    execution_match,
    is_ordered,
    run_query,
    same_answer,
    with_answers,
)


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


def match(database: Path, pairs: list[tuple[str, str]], **how: bool) -> ExecutionMatch:
    questions = [
        SqlQuestion(where=f"question {i}", database=database, prompt="", gold=gold)
        for i, (gold, _) in enumerate(pairs, start=1)
    ]
    return execution_match(questions, [predicted for _, predicted in pairs], **how)


def reason(database: Path, sql: str, **limits: float) -> str:
    with open_read_only(database) as connection, pytest.raises(QueryError) as caught:
        run_query(connection, sql, limits=Limits(**limits))  # type: ignore[arg-type]
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


def test_deadline(database: Path) -> None:
    endless = "with recursive t(i) as (select 1 union all select i + 1 from t) select sum(i) from t"
    assert reason(database, endless, seconds=0.05) == "timeout"


def test_deadline_of_slow_instructions(database: Path) -> None:
    # 64 calls of 0.17 s, and no more instructions than there are between two calls of the handler.
    rowids = "a.rowid + b.rowid + c.rowid"
    slow = f"instr(hex(zeroblob(60000 + {rowids})), hex(zeroblob(25000)) || '1')"
    joined = "from book a, book b, book c"
    for sql in (f"select count(*) {joined} where {slow}", f"select {slow} {joined}"):
        before = time.process_time()
        assert reason(database, sql, seconds=0.05) == "timeout"
        assert time.process_time() - before < 1.5


def test_a_query_that_takes_too_long_in_one_instruction(database: Path) -> None:
    slow = "select instr(hex(zeroblob(60000)), hex(zeroblob(25000)) || '1')"
    assert reason(database, slow, seconds=0.001) == "timeout"


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("select zeroblob(1000001)", "too large"),
        ("select zeroblob(999999)", ""),
        (f"select 'a' like '{'%a' * 500}'", ""),
        (f"select 'a' like '{'%a' * 501}'", "sql error"),
        (f"select trim('ab', '{'b' * 1000}')", ""),
        (f"select trim('ab', '{'b' * 1001}')", "too large"),
        ("select rtrim('ab', hex(zeroblob(501)))", "too large"),
    ],
)
def test_limits_of_values(database: Path, sql: str, expected: str) -> None:
    if expected:
        assert reason(database, sql) == expected
    else:
        with open_read_only(database) as connection:
            assert len(run_query(connection, sql)) == 1


def test_limit_of_an_answer(database: Path) -> None:
    sql = "select zeroblob(100000) from book a, book b"
    with open_read_only(database) as connection:
        assert len(run_query(connection, sql, limits=Limits(max_bytes=1_700_000))) == 16
    assert reason(database, sql, max_bytes=1_600_000) == "too large"


@pytest.mark.parametrize("name", ["trim", "ltrim", "rtrim"])
def test_trimming_is_sqlite_s(database: Path, name: str) -> None:
    values = ["", "xxaxbxx", "éaé", None, 1.50, 10, b"xAx", "x"]
    characters = ["", "x", "xa", "é", None, 0, b"x", "5."]
    plain = sqlite3.connect(":memory:")
    with open_read_only(database) as connection:
        for value, taken in product(values, characters):
            (sql,) = plain.execute(
                f"select 'select {name}(' || quote(?) || ',' || quote(?) || ')'", (value, taken)
            ).fetchone()
            assert run_query(connection, sql) == plain.execute(sql).fetchall()
    plain.close()


def test_row_limit(database: Path) -> None:
    with open_read_only(database) as connection:
        assert len(run_query(connection, "select * from book", limits=Limits(max_rows=4))) == 4
    assert reason(database, "select * from book", max_rows=3) == "too large"


def test_deadline_of_one_query_does_not_reach_the_next(database: Path) -> None:
    with open_read_only(database) as connection:
        with pytest.raises(QueryError) as caught:
            run_query(connection, "select 1", limits=Limits(seconds=1e-9))
        assert caught.value.reason == "timeout"  # the clock's or the thread's
        assert run_query(connection, "select count(*) from book a, book b, book c") == [(64,)]


@pytest.mark.parametrize(
    "sql",
    [
        "select avg(pages), upper(title) from book where title like 'a%' group by title",
        "select title, row_number() over (order by pages) from book",
        "WITH t AS (SELECT * FROM book) SELECT count(*) FROM t",
        "select(1)",
        "select date('2020-01-01'), coalesce(null, 1), '{}' -> '$'",
    ],
)
def test_allows_reading(database: Path, sql: str) -> None:
    with open_read_only(database) as connection:
        assert run_query(connection, sql)


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
    assert same_answer(gold, gold * 2, ordered=False, bird_compat=True)


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
    assert (result.matches, result.questions) == (1, 5)
    assert Counter(result.failures) == {"other answer": 3, "not a query": 1}
    assert result.accuracy == 0.2
    # Agresti-Coull by hand: p = 3/9, √(3/9 · 6/9 / 9).
    assert result.standard_error == pytest.approx(0.15713484026)


def test_questions_without_an_answer_are_left_out(database: Path) -> None:
    empty = ("select title from book where pages > 99", "select max(pages) from book where 0")
    gold = ("select 1", *empty, "select null, 0")
    asked = [
        SqlQuestion(where=str(i), database=database, prompt="", gold=g) for i, g in enumerate(gold)
    ]
    assert [question.where for question in with_answers(asked)] == ["0", "3"]
    with pytest.raises(DataError, match=r"every gold answer is empty \(found 2 questions\)"):
        with_answers(asked[1:3])


def test_bird_compat_matches_sets(database: Path) -> None:
    pair = ("select title from book where pages = 10", "select distinct title from book limit 1")
    other = ("select 'a' union all select 'a'", "select 'a'")
    assert match(database, [pair, other], bird_compat=True).matches == 1
    assert match(database, [pair, other]).matches == 0


def test_user_mistakes(database: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such database"):
        match(tmp_path / "missing", [("select 1", "select 1")])
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
