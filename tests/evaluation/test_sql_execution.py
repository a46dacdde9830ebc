"""Generated SQL is untrusted: it may neither change anything nor match by luck."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_replay.errors import DataError
from megatron_replay.evaluation.sql.database import open_read_only
from megatron_replay.evaluation.sql.execution import execution_match, with_answers
from megatron_replay.evaluation.sql.gold_answers import GoldAnswers
from megatron_replay.evaluation.sql.server import (
    Limits,
    QueryError,
    is_ordered,
    run_query,
    same_answer,
)
from megatron_replay.evaluation.sql.sets import SqlQuestion
from tests.evaluation.site import write_database

LENGTHS = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="Python 3.10's sqlite3 limits no length"
)
BOOKS = (
    "create table book (title text, pages integer)",
    "insert into book values ('b', 20), ('a', 10), ('a', 10), ('none', null)",
)


@pytest.fixture
def database(tmp_path):
    return write_database(tmp_path / "shop?#.sqlite", *BOOKS)  # characters of a URI


def questions(database, *gold):
    return [
        SqlQuestion(where=f"question {i}", database=database, prompt="", gold=sql)
        for i, sql in enumerate(gold, start=1)
    ]


def match(database, *pairs):
    asked = questions(database, *(gold for gold, _ in pairs))
    return execution_match(
        asked, [predicted for _, predicted in pairs], Limits(seconds=600, gold_seconds=600)
    )


def outcome(database, sql, **limits):
    """The reason for which it is refused, or its answer."""
    with open_read_only(database) as connection:
        try:
            return run_query(connection, sql, Limits(**{"seconds": 600} | limits))
        except QueryError as error:
            return error.reason


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("", "not a query"),
        ("-- nothing", "not a query"),
        ("drop table book", "not a query"),
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
        pytest.param("select hex(zeroblob(6000000))", "too large", marks=LENGTHS),
    ],
)
def test_refuses(database, sql, expected):
    before = hashlib.sha256(database.read_bytes()).digest()
    assert outcome(database, sql) == expected
    assert hashlib.sha256(database.read_bytes()).digest() == before
    assert [p.name for p in database.parent.iterdir()] == [database.name]


def test_the_connection_itself_cannot_write(database):
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
        pytest.param("select zeroblob(1000001)", {}, "too large", marks=LENGTHS),
        ("select zeroblob(999999)", {}, None),
        (f"select '{'a' * 99_991}'", {}, None),
        (f"select '{'a' * 99_992}'", {}, "too large"),
        ("select zeroblob(100000) from book a, book b", {"max_bytes": 1_700_000}, None),
        ("select zeroblob(100000) from book a, book b", {"max_bytes": 1_600_000}, "too large"),
        ("select * from book", {"max_rows": 4}, None),
        ("select * from book", {"max_rows": 3}, "too large"),
        # What is allowed.
        ("select avg(pages), upper(title) from book where title like 'a%' group by 2", {}, None),
        ("select title, row_number() over (order by pages) from book", {}, None),
        ("WITH t AS (SELECT * FROM book) SELECT count(*) FROM t", {}, None),
        ("select(1)", {}, None),
        ("select date('2020-01-01'), coalesce(null, 1), '{}' -> '$'", {}, None),
        ("select title, value from book, json_each('[1, 2]') where pages > 0", {}, None),
        ("select t.key from json_tree('{\"a\": [1]}') t where t.atom = 1", {}, None),
    ],
)  # fmt: skip
def test_limits(database, sql, limits, expected):
    found = outcome(database, sql, **limits)
    assert found == expected if expected else isinstance(found, list) and found


def test_deadline_of_one_query_does_not_reach_the_next(database):
    with open_read_only(database) as connection:
        with pytest.raises(QueryError) as caught:
            run_query(connection, "select 1", Limits(seconds=1e-9))
        assert caught.value.reason == "timeout"
        sql = "select count(*) from book a, book b, book c"
        assert run_query(connection, sql, Limits(seconds=600, gold_seconds=600)) == [(64,)]


@pytest.mark.parametrize("unclosed", ["[", "'", '"', "`", "/*", "--", "(", "['", '[" --\n'])
def test_a_query_is_read_in_time_linear_in_its_length(database, unclosed):
    """As many as a query may hold: once, 60,000 of ``[`` were minutes of work."""
    text = unclosed * (99_000 // len(unclosed))
    assert not is_ordered(f"select {text}")
    assert outcome(database, f"select 1 from {text}") == "sql error"

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
def test_order_is_that_of_the_outermost_query(sql, ordered):
    assert is_ordered(sql) is ordered


rows = st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["x", None])), max_size=5)


@given(rows, rows, st.randoms())
def test_multisets(gold, predicted, rng):
    shuffled = list(gold)
    rng.shuffle(shuffled)
    assert same_answer(gold, shuffled, ordered=False)
    assert same_answer(gold, shuffled, ordered=True) == (gold == shuffled)
    assert same_answer(gold, predicted, ordered=False) == (
        sorted(map(repr, gold)) == sorted(map(repr, predicted))
    )


TENS = "select title from book where pages = 10"


def test_counts(database):
    result = match(
        database,
        (TENS, "select 'a' from book where pages = 10"),
        (TENS, "select distinct title from book where pages = 10"),  # equal as a set, as in BIRD
        ("select pages from book where pages > 0 order by pages", TENS),
        ("select title from book order by title", "select title from book"),  # equal as a set
        (TENS, "drop table book"),
    )
    assert (result["matches"], result["questions"], result["hits"]) == (1, 5, "10000")
    assert result["failures"] == {"other answer": 3, "not a query": 1}
    assert (result["accuracy"], result["set_accuracy"]) == (0.2, 0.6)
    # Agresti-Coull by hand: p = 3/9, √(3/9 · 6/9 / 9).
    assert result["standard_error"] == pytest.approx(0.15713484026)


def test_questions_without_an_answer_are_left_out(database):
    empty = ("select title from book where pages > 99", "select max(pages) from book where 0")
    asked = questions(database, "select 1", *empty, "select null, 0")
    assert with_answers(asked, Limits(seconds=600, gold_seconds=600)) == [asked[0], asked[3]]
    with pytest.raises(DataError, match=r"every gold answer is empty \(found 2 questions\)"):
        with_answers(asked[1:3])


def test_mistakes_of_a_set_are_one_line(database, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").write_text("no database at all, but long enough to look like one" * 40)
    pair, shelf = ("select 1", "select 1"), ("select 1 from shelf", "")
    for path, pairs, message in (
        (tmp_path / "missing", [pair], "no such database"),
        (tmp_path / "pipe", [pair], r"expected a regular file; found a pipe \(FIFO\)"),
        (tmp_path / "text", [pair], "not an SQLite database"),
        (database, [pair, shelf], r"question 2: the gold query fails.*no such table"),
        (database, [("select null", "")], r"question 1: the gold answer is empty: select null"),
    ):
        with pytest.raises(DataError, match=message):
            match(path, *pairs)
    database.with_name(database.name + "-wal").write_bytes(b"pending")
    with pytest.raises(DataError, match="unfinished transaction"):
        match(database, pair)


def test_bytes_that_are_not_utf8(database):
    """Stored ones stay distinct; a file's name may have them, too."""
    stored = (f"insert into book values (cast(x'61{end}' as text), 7)" for end in ("ed", "ec"))
    write_database(database, *stored)
    sevens = "select title from book where pages = 7"
    first, second = (f"{sevens} order by hex(title) {way} limit 1" for way in ("asc", "desc"))
    moved = os.fsdecode(os.fsencode(database.parent) + b"/\xe9%?#")
    pairs = [(sevens, sevens), (first, first), (first, second)]
    assert match(database.rename(moved), *pairs)["matches"] == 2


def test_a_database_that_is_damaged_further_on(database):
    """Not the prediction's fault, so nothing is counted."""
    numbers = "with recursive t(i) as (select 1 union all select i + 1 from t where i < 1000)"
    fill = f"insert into log {numbers} select '{'x' * 500}' from t"
    write_database(database, "create table log (line text)", fill)
    with open(database, "r+b") as handle:
        handle.seek(200_000)
        handle.write(b"\xff" * 100_000)
    whole, damaged = "select title from book", "select count(line) from log"
    assert match(database, (whole, whole))["matches"] == 1
    for pair in ((whole, damaged), (damaged, whole)):
        with pytest.raises(DataError, match=r"shop.*cannot read the database: .*malformed"):
            match(database, pair)


STORED = "select title, pages, 0.1, 9e999, x'00ff' from book order by pages, title"


def test_slow_gold_answers_are_kept_in_a_file(database, tmp_path):
    """Recalled, they are what they were: text that is not UTF-8, null, float, infinity, bytes."""
    write_database(database, "insert into book values (cast(x'61ed' as text), 7)")
    file, asked = tmp_path / "eval.gold.json", questions(database, STORED)
    all_slow = Limits(seconds=600, gold_seconds=600, slow_seconds=-1.0)
    no_time = Limits(seconds=600, gold_seconds=1e-9)
    with_answers(asked, all_slow, GoldAnswers(file))
    found = execution_match(asked, [STORED], no_time, GoldAnswers(file))
    assert (found["matches"], found["failures"]) == (1, {})
    other = STORED.replace("0.1", "0.10000000000000002")
    found = execution_match(asked, [other], no_time, GoldAnswers(file))
    assert found["failures"] == {"other answer": 1}
    found = execution_match(
        asked, [f"select * from ({STORED}) order by 2 desc"], no_time, GoldAnswers(file)
    )
    assert (found["matches"], found["set_accuracy"]) == (0, 1.0)
    write_database(database, "insert into book values ('new', 8)")
    with pytest.raises(DataError, match="the gold query fails"):
        with_answers(asked, no_time, GoldAnswers(file))


def test_fast_and_large_gold_answers_are_not_kept(database, tmp_path):
    file, asked = tmp_path / "eval.gold.json", questions(database, STORED)
    slow = {"seconds": 600, "gold_seconds": 600, "slow_seconds": -1.0}
    for limits in (
        Limits(seconds=600, gold_seconds=600, slow_seconds=600),
        Limits(**slow, max_kept_rows=3),
        Limits(**slow, max_kept_length=20),
    ):
        assert with_answers(asked, limits, GoldAnswers(file)) == asked
        assert not file.exists()


@pytest.mark.parametrize("sql", ["select date('now')", "select Current_Date", "select time()"])
def test_gold_answers_that_time_changes_are_not_kept(database, tmp_path, sql):
    file, asked = tmp_path / "eval.gold.json", questions(database, sql)
    all_slow = Limits(seconds=600, gold_seconds=600, slow_seconds=-1.0)
    assert with_answers(asked, all_slow, GoldAnswers(file)) == asked
    assert not file.exists()


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"gold_answers": {"a": [1, "b"]}}', '{"gold_answers": {"a": 1}}']
)
def test_gold_answers_that_are_damaged_or_another_file(tmp_path, content):
    (tmp_path / "file").write_text(content)
    with pytest.raises(DataError, match=r"file: damaged.*Remove it, or choose another --output"):
        GoldAnswers(tmp_path / "file")
