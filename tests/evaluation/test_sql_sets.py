"""Three layouts of SQL questions, one prompt, and the mistakes in them."""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from megatron_replay.data.corpus import Corpus
from megatron_replay.data.tokenizer import load_tokenizer
from megatron_replay.errors import DataError
from megatron_replay.evaluation.sql.database import schema_lines
from megatron_replay.evaluation.sql.sets import read_questions, read_sql_set, sql_set_files
from tests.data.tiny_tokenizers import save_sentencepiece
from tools import preprocess_data

BOOKS = 'create table book (\n  title text, -- as printed\n  "-- pages" integer /* > 0 */)'
QUESTION = {"db_id": "shop", "question": " How many? ", "query": "select 1", "SQL": "select 2"}


def write_database(path: Path, *statements: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()
    return path


def write_set(folder: Path, databases: str, rows: Any) -> Path:
    write_database(folder / databases / "shop" / "shop.sqlite", BOOKS, "create table b (x)")
    (folder / "dev.json").write_text(json.dumps(rows))
    return folder


def test_schema_lines(tmp_path: Path) -> None:
    counted = "create table n (i integer primary key autoincrement)"  # adds sqlite_sequence
    path = write_database(tmp_path / "d.sqlite", BOOKS, counted, "create index i on book (title)")
    assert schema_lines(path) == [
        'CREATE TABLE book ( title text, "-- pages" integer )',
        counted.replace("create table", "CREATE TABLE"),
    ]


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    """A default value is shown as it can be, a comment is dropped, a name is refused."""
    path = write_database(
        tmp_path / "d.sqlite",
        "create table book (title text default 'caf__' /* n__ */, pages integer)",
    )
    content = path.read_bytes()
    path.write_bytes(content.replace(b"caf__", b"caf\xe9_").replace(b"n__", b"n\xe9_"))
    expected = "CREATE TABLE book (title text default 'caf\ufffd_' , pages integer)"
    assert schema_lines(path) == [expected]
    path.write_bytes(content.replace(b"pages integer", b"page\xe9 integer"))
    with pytest.raises(DataError, match=r"d\.sqlite: a name .* is not UTF-8 .*page\\xe9"):
        schema_lines(path)
    folder = tmp_path / "set" / "database" / "shop"
    folder.mkdir(parents=True)
    path.rename(folder / "shop.sqlite")
    (tmp_path / "set" / "dev.json").write_text(json.dumps([QUESTION]))
    with pytest.raises(DataError, match="is not UTF-8"):
        read_sql_set(tmp_path / "set")


def test_a_damaged_schema_is_one_line(tmp_path: Path) -> None:
    path = write_database(tmp_path / "d.sqlite", BOOKS, "create table caf__ (x)")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"TABLE caf__ (x)", b"TABLE caf\xe9_ (("))  # quoted by SQLite
    with pytest.raises(DataError, match=r"d\.sqlite: not an SQLite database, or a damaged one"):
        schema_lines(path)
    path.write_bytes(content[:1000])
    with pytest.raises(DataError, match=r"d\.sqlite: not an SQLite database, or a damaged one"):
        schema_lines(path)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    folder = write_set(tmp_path, "database", [QUESTION])
    database, rows = folder / "database" / "shop" / "shop.sqlite", folder / "dev.json"
    for path in (database, rows):
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(DataError, match=rf"{path.name}: .*found a pipe"):
            read_sql_set(folder)


def test_spider(tmp_path: Path) -> None:
    folder = write_set(tmp_path, "database", [QUESTION, QUESTION | {"question": "Which?"}])
    first, second = read_sql_set(folder)
    assert first.prompt == (
        'CREATE TABLE book ( title text, "-- pages" integer );\nCREATE TABLE b (x);\n'
        "\nQuestion: How many?\nSQL:\n"
    )
    assert (first.gold, first.database.name) == ("select 1", "shop.sqlite")
    assert second.where.endswith("dev.json: question 2")
    assert sql_set_files(folder) == [folder / "dev.json", first.database]


def test_bird(tmp_path: Path) -> None:
    rows = [QUESTION | {"evidence": "all of them"}, QUESTION | {"evidence": ""}]
    first, second = read_sql_set(write_set(tmp_path, "dev_databases", rows))
    assert first.prompt.endswith("\n\nEvidence: all of them\nQuestion: How many?\nSQL:\n")
    assert second.prompt.endswith(";\n\nQuestion: How many?\nSQL:\n")
    assert first.gold == "select 2"


def test_plain(tmp_path: Path) -> None:
    database = write_database(tmp_path / "database.sqlite", BOOKS)
    rows = tmp_path / "questions.jsonl"
    rows.write_text('{"prompt": "p\\n", "completion": "select 3"}\n')
    [question] = read_sql_set(tmp_path)
    assert (question.prompt, question.gold, question.database) == ("p\n", "select 3", database)
    assert question.where == f"{rows}:1"
    assert sql_set_files(tmp_path) == [rows, database]


def test_the_files_that_are_hashed_are_those_that_are_read(tmp_path: Path) -> None:
    folder = write_set(tmp_path, "database", [QUESTION])
    (folder / "questions.jsonl").write_text("a stray file")
    [question] = read_sql_set(folder)
    assert question.gold == "select 1"
    assert sql_set_files(folder) == [folder / "dev.json", question.database]


def test_an_empty_prompt_is_refused(tmp_path: Path) -> None:
    write_database(tmp_path / "database.sqlite", BOOKS)
    (tmp_path / "questions.jsonl").write_text('{"prompt": "", "completion": "select 3"}\n')
    with pytest.raises(DataError, match=r"questions\.jsonl:1: the prompt is empty"):
        read_sql_set(tmp_path)


def test_a_training_file_finds_its_databases(tmp_path: Path) -> None:
    folder = write_set(tmp_path, "train_databases", [])
    (folder / "train.json").write_text(json.dumps([QUESTION]))
    [question] = read_questions(folder / "train.json", "bird")
    assert question.database == folder / "train_databases" / "shop" / "shop.sqlite"


def test_preprocessing_reads_the_prompts_that_are_evaluated(tmp_path: Path) -> None:
    tokenizer = save_sentencepiece(tmp_path / "pieces.model")
    folder, prefix = write_set(tmp_path, "database", [QUESTION] * 2), tmp_path / "corpus"
    given = [f"--input={folder / 'dev.json'}", f"--output-prefix={prefix}", "--format=spider"]
    assert preprocess_data.main([*given, f"--tokenizer={tokenizer}"]) == 0
    corpus, question = Corpus(prefix), read_sql_set(folder)[0]
    assert len(corpus) == 2
    prompt = load_tokenizer(tokenizer).encode(question.prompt)
    assert corpus[1].tokens[: len(prompt)].tolist() == prompt
    assert corpus[1].loss_mask.tolist().index(True) == len(prompt)
    before = corpus.description.source
    write_database(folder / "database" / "shop" / "shop.sqlite", "create table c (y)")
    assert preprocess_data.main([*given, f"--tokenizer={tokenizer}"]) == 0
    assert Corpus(prefix).description.source != before


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([QUESTION, QUESTION | {"db_id": "x"}], "dev.json: question 2: no such database"),
        ([{"db_id": "shop"}], "dev.json: question 1: missing key (expected 'question'"),
        ([QUESTION | {"db_id": "x" * 300}], "dev.json: question 1: no such database"),
        ([QUESTION, 1], "dev.json: question 2: not an object"),
        ({}, "dev.json: not a list of questions"),
        ([], "no questions"),
    ],
)
def test_mistakes(tmp_path: Path, rows: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_sql_set(write_set(tmp_path, "database", rows))
    assert message in str(caught.value)


def test_unknown_layouts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not a known layout .*found nothing"):
        read_sql_set(tmp_path)
    with pytest.raises(DataError, match=r"not a known layout .*found no directory"):
        read_sql_set(tmp_path / "missing")
    (tmp_path / "dev.json").write_text("[")
    with pytest.raises(DataError, match=r"not a known layout .*found dev\.json"):
        read_sql_set(tmp_path)
    with pytest.raises(DataError, match=r"no databases beside this file .*database/"):
        list(read_questions(tmp_path / "dev.json", "spider"))
    (tmp_path / "database").mkdir()
    with pytest.raises(DataError, match="not JSON"):
        read_sql_set(tmp_path)
    (tmp_path / "dev_databases").mkdir()
    with pytest.raises(DataError, match="not a known layout"):  # two of them
        read_sql_set(tmp_path)
