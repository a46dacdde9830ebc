"""SQLite files: opened so that nothing can change them, and their tables as text."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_replay.errors import ConfigError, DataError

#: What is not SQL's own: strings, quoted names, comments.
QUOTED_OR_COMMENT = re.compile(
    r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?(?:\*/|$)", re.DOTALL
)


@contextmanager
def open_read_only(database: Path) -> Iterator[sqlite3.Connection]:
    """A connection that can neither write nor lock ``database``.

    Raises:
        DataError: it is missing, is not SQLite, or has a journal that ``immutable`` would ignore.
        ConfigError: this Python cannot limit the length of a value.
    """
    if not hasattr(sqlite3.Connection, "setlimit"):
        raise ConfigError("SQL execution needs sqlite3.Connection.setlimit", expected="Python 3.11")
    if not database.is_file():
        raise DataError("no such database", where=database)
    for suffix in ("-wal", "-journal"):
        journal = database.with_name(database.name + suffix)
        if journal.exists() and journal.stat().st_size:
            raise DataError(
                "the database has an unfinished transaction",
                where=journal,
                fix="Open and close it with sqlite3 once, so that the transaction is settled",
            )
    uri = f"{database.absolute().as_uri()}?mode=ro&immutable=1"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None)
    try:
        # Bytes that are no UTF-8 must stay distinct from one another when compared.
        connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
        try:
            connection.execute("select count(*) from sqlite_master").fetchone()
        except sqlite3.DatabaseError as error:
            raise DataError(f"not an SQLite database: {error}", where=database) from error
        yield connection
    finally:
        connection.close()


def schema_lines(database: Path) -> list[str]:
    """The CREATE TABLE statements of ``database``, a line each, in the order they were made.

    As they were written, without comments.

    Raises:
        DataError: see `open_read_only`.
    """
    with open_read_only(database) as connection:
        tables = connection.execute(
            "select sql from sqlite_master where type = 'table' and name not like 'sqlite\\_%' "
            "escape '\\' order by rowid"
        ).fetchall()
    return [" ".join(QUOTED_OR_COMMENT.sub(_not_a_comment, sql).split()) for (sql,) in tables]


def _not_a_comment(found: re.Match[str]) -> str:
    return " " if found[0].startswith(("--", "/*")) else found[0]
