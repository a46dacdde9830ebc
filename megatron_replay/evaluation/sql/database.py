"""Opens SQLite files so that nothing can change them, and reads their tables as text."""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_replay.errors import DataError
from megatron_replay.files import require_regular

#: Strings, quoted names and comments. One that is not closed runs to the end, so that no text is
#: searched twice: the time is linear in its length.
QUOTED_OR_COMMENT = re.compile(
    r"'(?:[^']|'')*(?:'|\Z)|\"(?:[^\"]|\"\")*(?:\"|\Z)|`[^`]*(?:`|\Z)|\[[^\]]*(?:\]|\Z)"
    r"|--[^\n]*|/\*.*?(?:\*/|\Z)",
    re.DOTALL,
)
#: What surrogateescape makes of bytes that are not UTF-8.
_NOT_UTF8 = re.compile("[\udc80-\udcff]+")


@contextmanager
def open_read_only(database: Path) -> Iterator[sqlite3.Connection]:
    """A connection that can neither write nor lock ``database``.

    Raises:
        DataError: it is missing, is not SQLite, is damaged, has a name that is not UTF-8, or has a
            journal that ``immutable`` would ignore.
    """
    if not os.path.exists(database):
        raise DataError("no such database", where=database)
    require_regular(database, DataError)
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
        # Bytes that are not UTF-8 must stay distinct from one another when compared.
        connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
        _require_readable_names(_statements(connection, database), database)
        # At their first use SQLite creates these pure table functions, which the authorizer sees as
        # an UPDATE of sqlite_master, like that of pragma_… and others that are not pure. Created
        # before there is an authorizer, they need only the right to read.
        with suppress(sqlite3.OperationalError):  # an SQLite without JSON has neither
            connection.execute("select 1 from json_each('[]'), json_tree('[]')").fetchall()
        yield connection
    finally:
        connection.close()


def schema_lines(database: Path) -> list[str]:
    """The CREATE TABLE statements of ``database``, a line each, in the order they were made.

    As they were written, without comments; bytes of a default value that are not UTF-8 are shown
    as U+FFFD.

    Raises:
        DataError: see `open_read_only`.
    """
    with open_read_only(database) as connection:
        tables = _statements(
            connection, database, "and type = 'table' and name not like 'sqlite\\_%' escape '\\'"
        )
    plain = (QUOTED_OR_COMMENT.sub(_not_a_comment, sql) for sql in tables)
    return [
        " ".join(sql.encode("utf-8", "surrogateescape").decode("utf-8", "replace").split())
        for sql in plain
    ]


def _statements(connection: sqlite3.Connection, database: Path, only: str = "") -> list[str]:
    """The statements that made tables, views and indexes, in the order they were made.

    Raises:
        DataError: SQLite cannot read them: it reads all of them before the first query.
    """
    sql = f"select cast(sql as text) from sqlite_master where sql is not null {only} order by rowid"
    try:
        return [statement for (statement,) in connection.execute(sql)]
    except (sqlite3.Error, UnicodeDecodeError) as error:  # a message may quote the schema's bytes
        raise DataError(
            f"not an SQLite database, or a damaged one: {error}", where=database
        ) from error


def _require_readable_names(statements: list[str], database: Path) -> None:
    """Raise DataError if a name is not UTF-8: Python's sqlite3 can read no column called so."""
    for statement in statements:
        names = QUOTED_OR_COMMENT.sub(_only_a_name, statement)
        if found := _NOT_UTF8.search(names):
            around = names[max(0, found.start() - 20) : found.end() + 20]
            raise DataError(
                "a name of a table or column is not UTF-8",
                where=database,
                found=ascii(around.encode("utf-8", "surrogateescape")),
                fix="Rename it (ALTER TABLE … RENAME), or leave this database out",
            )


def _not_a_comment(found: re.Match[str]) -> str:
    return " " if found[0].startswith(("--", "/*")) else found[0]


def _only_a_name(found: re.Match[str]) -> str:
    return " " if found[0].startswith(("--", "/*", "'")) else found[0]
