"""Reads questions about SQLite databases, each with its gold query: three layouts, one prompt.

=========  ===============================================  ======================================
layout     questions                                        databases
=========  ===============================================  ======================================
plain      ``questions.jsonl``: prompt, completion          ``database.sqlite``, one for all
Spider     ``dev.json``: question, query, db_id             ``database/ID/ID.sqlite``
BIRD       ``dev.json``: question, SQL, db_id, evidence     ``dev_databases/ID/ID.sqlite``
=========  ===============================================  ======================================

A plain layout's prompt is used as it is. Spider's and BIRD's are built from the database itself:

    CREATE TABLE book (title text, pages integer);
    …

    Evidence: BIRD's hint beside the question; the line is left out where there is none
    Question: how many books have more than 100 pages?
    SQL:

A conversation asks for the query in a sentence, in place of the last line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from megatron_replay.data.rows import Row, parse_row, read_lines
from megatron_replay.errors import DataError
from megatron_replay.evaluation.sql.database import schema_lines
from megatron_replay.files import read_text

_ROWS, _DATABASE, _DEV = "questions.jsonl", "database.sqlite", "dev.json"


@dataclass(frozen=True, kw_only=True)
class SqlQuestion:
    """One question: what the model reads, and ``gold``, the query that answers it.

    ``name``: what --leave-out knows it by.
    """

    where: str
    database: Path
    prompt: str
    gold: str
    name: str = ""


class Layout(NamedTuple):
    """A published layout: where the databases are (the first folder found), and the query's key."""

    folders: tuple[str, ...]
    query: str


LAYOUTS = {
    "spider": Layout(("database",), "query"),
    "bird": Layout(("dev_databases", "train_databases"), "SQL"),
}


def sql_prompt(schema: list[str], question: str, evidence: str = "", *, chat: bool = False) -> str:
    """The prompt of a question, the same in preprocessing and in evaluation.

    Args:
        chat: it is a user's message; otherwise the query continues it.
    """
    tables = "".join(f"{line};\n" for line in schema)
    hint = f"Evidence: {evidence.strip()}\n" if evidence.strip() else ""
    ending = "Answer with one SQL query and nothing else." if chat else "SQL:\n"
    return f"{tables}\n{hint}Question: {question.strip()}\n{ending}"


def read_sql_set(directory: Path, *, chat: bool = False) -> list[SqlQuestion]:
    """Read a directory in one of the three layouts; ``chat``: as in `sql_prompt`.

    Raises:
        DataError: it has none of them, a question lacks something, or a database is missing.
    """
    questions = list(_layout(directory, chat)[1])
    if not questions:
        raise DataError("no questions", where=directory)
    return questions


def sql_set_files(directory: Path) -> list[Path]:
    """The files that decide a set: its questions and their databases.

    Raises:
        DataError: as `read_sql_set`.
    """
    databases = {question.database for question in read_sql_set(directory)}
    return [_layout(directory, False)[0], *sorted(databases)]


def _layout(directory: Path, chat: bool) -> tuple[Path, Iterator[SqlQuestion]]:
    """The file that holds a set's questions, and the questions, which are not yet read."""
    rows, dev = directory / _ROWS, directory / _DEV
    found: list[tuple[Path, Iterator[SqlQuestion]]] = []
    if rows.exists() and (directory / _DATABASE).exists():
        found.append((rows, _read_plain(directory)))
    for name, layout in LAYOUTS.items():
        if dev.exists() and (directory / layout.folders[0]).exists():
            found.append((dev, read_questions(dev, name, chat=chat)))
    if len(found) != 1:
        inside = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else None
        raise DataError(
            "not a known layout of SQL questions",
            where=directory,
            expected="one of questions.jsonl + database.sqlite; dev.json + database/ (Spider); "
            "dev.json + dev_databases/ (BIRD)",
            found="no directory" if inside is None else ", ".join(inside[:8]) or "nothing",
        )
    return found[0]


def _read_plain(directory: Path) -> Iterator[SqlQuestion]:
    for where, line in read_lines(directory / _ROWS):
        row = parse_row(where, line)
        yield SqlQuestion(
            where=where,
            database=directory / _DATABASE,
            prompt=row.text("prompt"),
            gold=row.text("completion"),
        )


def read_questions(file: Path, layout: str, *, chat: bool = False) -> Iterator[SqlQuestion]:
    """The questions of one file of Spider or BIRD, such as ``train_spider.json``.

    Args:
        file: a JSON list; the databases are in a folder next to it.
        layout: a key of ``LAYOUTS``.
        chat: as in `sql_prompt`.

    Raises:
        DataError: the file has another format, a question lacks something, or a database is
            missing.
    """
    folders, query = LAYOUTS[layout]
    folder = next((file.parent / name for name in folders if (file.parent / name).is_dir()), None)
    if folder is None:
        raise DataError(
            "no databases beside this file", where=file, expected=f"{' or '.join(folders)}/"
        )
    schema = cache(schema_lines)
    for row in _read_list(file):
        name = row.text("db_id")
        database = folder / name / f"{name}.sqlite"
        if not os.path.exists(database):  # pathlib's raises for a name that is too long
            raise DataError("no such database", where=row.where, expected=database)
        evidence = row.text("evidence") if "evidence" in row.fields else ""
        yield SqlQuestion(
            where=row.where,
            database=database,
            prompt=sql_prompt(schema(database), row.text("question"), evidence, chat=chat),
            gold=row.text(query),
        )


def _read_list(file: Path) -> Iterator[Row]:
    try:
        values = json.loads(read_text(file, DataError).removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", where=file) from error
    if not isinstance(values, list):
        raise DataError("not a list of questions", where=file, expected="[{…}, …]")
    for number, fields in enumerate(values, start=1):
        where = f"{file}: question {number}"
        if not isinstance(fields, dict):
            raise DataError("not an object", where=where)
        yield Row(where, fields)
