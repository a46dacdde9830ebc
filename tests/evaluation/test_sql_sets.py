"""Three layouts of SQL questions, one prompt, and the mistakes in them."""

from __future__ import annotations

import json
import os

import pytest

from megatron_replay.data.corpus import Corpus
from megatron_replay.data.tokenizer import load_tokenizer
from megatron_replay.errors import DataError
from megatron_replay.evaluation.sql.database import schema_lines
from megatron_replay.evaluation.sql.sets import read_questions, read_sql_set, sql_set_files
from tests.data.tiny_tokenizers import save_sentencepiece
from tests.evaluation.site import write_database
from tools import preprocess_data

BOOKS = 'create table book (\n  title text, -- as printed\n  "-- pages" integer /* > 0 */)'
QUESTION = {"db_id": "shop", "question": " How many? ", "query": "select 1", "SQL": "select 2"}


def write_set(folder, databases, rows):
    write_database(folder / databases / "shop" / "shop.sqlite", BOOKS, "create table b (x)")
    (folder / "dev.json").write_text(json.dumps(rows))
    return folder


def test_schema_lines(tmp_path):
    counted = "create table n (i integer primary key autoincrement)"  # adds sqlite_sequence
    path = write_database(tmp_path / "d.sqlite", BOOKS, counted, "create index i on book (title)")
    assert schema_lines(path) == [
        'CREATE TABLE book ( title text, "-- pages" integer )',
        counted.replace("create table", "CREATE TABLE"),
    ]


def test_schemas_that_are_not_utf8_or_damaged(tmp_path):
    """A default value is shown as it can be, a comment is dropped, a name is refused."""
    path = write_database(
        tmp_path / "d.sqlite",
        "create table book (title text default 'caf__' /* n__ */, pages integer)",
    )
    content = path.read_bytes()
    path.write_bytes(content.replace(b"caf__", b"caf\xe9_").replace(b"n__", b"n\xe9_"))
    expected = "CREATE TABLE book (title text default 'caf\ufffd_' , pages integer)"
    assert schema_lines(path) == [expected]
    for damaged, message in (
        (content.replace(b"pages integer", b"page\xe9 integer"), r"a name .* UTF-8 .*page\\xe9"),
        (content.replace(b"TABLE book (", b"TABLE boo\xe9 (("), "SQLite database, or a damaged"),
        (content[:1000], "SQLite database, or a damaged one"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"d\.sqlite: .*{message}"):
            schema_lines(path)
    folder = write_set(tmp_path / "set", "database", [QUESTION])
    path.write_bytes(content.replace(b"pages integer", b"page\xe9 integer"))
    path.rename(folder / "database" / "shop" / "shop.sqlite")
    with pytest.raises(DataError, match="is not UTF-8"):
        read_sql_set(folder)


def test_only_regular_files_are_read(tmp_path):
    folder = write_set(tmp_path, "database", [QUESTION])
    for path in (folder / "database" / "shop" / "shop.sqlite", folder / "dev.json"):
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(DataError, match=rf"{path.name}: .*found a pipe"):
            read_sql_set(folder)


def test_spider(tmp_path):
    folder = write_set(tmp_path, "database", [QUESTION, QUESTION | {"question": "Which?"}])
    (folder / "questions.jsonl").write_text("a stray file")
    first, second = read_sql_set(folder)
    assert first.prompt == (
        'CREATE TABLE book ( title text, "-- pages" integer );\nCREATE TABLE b (x);\n'
        "\nQuestion: How many?\nSQL:\n"
    )
    assert (first.gold, first.database.name) == ("select 1", "shop.sqlite")
    assert second.where.endswith("dev.json: question 2")
    assert sql_set_files(folder) == [folder / "dev.json", first.database]


def test_bird(tmp_path):
    rows = [QUESTION | {"evidence": "all of them"}, QUESTION | {"evidence": ""}]
    first, second = read_sql_set(write_set(tmp_path, "dev_databases", rows))
    assert first.prompt.endswith("\n\nEvidence: all of them\nQuestion: How many?\nSQL:\n")
    assert second.prompt.endswith(";\n\nQuestion: How many?\nSQL:\n")
    assert first.gold == "select 2"
    folder = write_set(tmp_path / "train", "train_databases", [QUESTION])
    [question] = read_questions(folder / "dev.json", "bird")
    assert question.database == folder / "train_databases" / "shop" / "shop.sqlite"


def test_plain(tmp_path):
    database, rows = (
        write_database(tmp_path / "database.sqlite", BOOKS),
        tmp_path / "questions.jsonl",
    )
    rows.write_text('{"prompt": "p\\n", "completion": "select 3"}\n')
    [question] = read_sql_set(tmp_path)
    assert (question.prompt, question.gold, question.database) == ("p\n", "select 3", database)
    assert question.where == f"{rows}:1"
    assert sql_set_files(tmp_path) == [rows, database]


def test_preprocessing_reads_the_prompts_that_are_evaluated(tmp_path):
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
def test_mistakes(tmp_path, rows, message):
    with pytest.raises(DataError) as caught:
        read_sql_set(write_set(tmp_path, "database", rows))
    assert message in str(caught.value)


def test_unknown_layouts(tmp_path):
    def refused(match, directory=tmp_path):
        with pytest.raises(DataError, match=match):
            read_sql_set(directory)

    refused(r"not a known layout .*found nothing")
    refused(r"not a known layout .*found no directory", tmp_path / "missing")
    (tmp_path / "dev.json").write_text("[")
    refused(r"not a known layout .*found dev\.json")
    with pytest.raises(DataError, match=r"no databases beside this file .*database/"):
        list(read_questions(tmp_path / "dev.json", "spider"))
    (tmp_path / "database").mkdir()
    refused("not JSON")
    (tmp_path / "dev_databases").mkdir()
    refused("not a known layout")  # two of them
