"""Keeps the answers of slow gold queries, so that a query of minutes runs once."""

from __future__ import annotations

import hashlib
import sqlite3
import zlib
from functools import cache
from pathlib import Path

from megatron_replay.errors import DataError
from megatron_replay.files import read_json, sha256_of_files, write_json

_KEY = "gold_answers"


class GoldAnswers:
    """Answers by the hash of what decides them: database, query and SQLite's version.

    An answer is the text that `server.serve` wrote and reads back, stored with its crc32.

    Args:
        path: a JSON file, written after each answer that is added; None: they are kept in memory.

    Raises:
        DataError: the file is damaged, or is something else.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known: dict[str, list[object]] = {}
        self._sha256 = cache(lambda database: sha256_of_files([database]))
        if path is not None and path.exists():
            fix = "Remove it, or choose another --output"
            found = read_json(path, DataError, fix=fix).get(_KEY)
            if not isinstance(found, dict) or not all(map(_is_whole, found.values())):
                raise DataError("damaged, or not gold answers", where=path, fix=fix)
            self._known = found

    def get(self, database: Path, sql: str) -> str | None:
        """The answer of ``sql`` on ``database``, if it is known."""
        found = self._known.get(self._key(database, sql)) if self._known else None
        return None if found is None else str(found[1])

    def add(self, database: Path, sql: str, answer: str) -> None:
        """Keep an answer.

        Raises:
            OutputError: the file cannot be written.
        """
        self._known[self._key(database, sql)] = [zlib.crc32(answer.encode()), answer]
        if self._path is not None:
            write_json(self._path, {_KEY: self._known})

    def _key(self, database: Path, sql: str) -> str:
        parts = (self._sha256(database), sqlite3.sqlite_version, sql)
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _is_whole(entry: object) -> bool:
    """Whether an entry is a text behind its crc32."""
    match entry:
        case [int(crc), str(answer)]:
            return zlib.crc32(answer.encode("utf-8", "surrogatepass")) == crc
    return False
